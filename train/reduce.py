"""The sum of the V gradients, in the order of the canonical tree, wherever its leaves were computed.

A rank adds the gradients of the virtual ranks it hosts as it goes (`accumulate`), which leaves it the sums of the few
maximal subtrees of what it hosts. The rest of the tree is finished between ranks (`reduce`), bucket by bucket: a
bucket is cut in W chunks; an all-to-all brings every subtree's chunk c to rank c; rank c finishes the tree for its
chunk; an all-gather spreads the sums. With one subtree a rank, that is 2(W-1)/W of the gradient's bytes a rank,
as many as a ring all-reduce sends.

No buffer is overwritten before the step is committed: subtree sums stay as they are while the total is made.

`FastReducer` stands beside `ExactReducer`: the same interface over the backend's own all-reduce, whose order of
addition depends on the world size.

Canonical trees for data-parallel determinism: EasyScale (SC'23) fixes virtual workers and the order of their
gradients; TBIK (arXiv 2511.17826) orders the adds of tensor-parallel matrix products along a tree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from train.batch import Node, fold, maximal, root, shares
from train.config import Reduce, ReduceMode
from train.flat import BLOCK, Buffer, Flat
from train.group import Group, gather_flat

Leaf = Callable[[int, Buffer], None]  # adds a virtual rank's gradient to a buffer


class _Pool:
    """Gradient buffers, made when first needed and used again every step."""

    def __init__(self, flat: Flat, multiple: int) -> None:
        self._flat, self._multiple = flat, multiple
        self._free: list[Buffer] = []
        self._taken: list[Buffer] = []

    def take(self) -> Buffer:
        buffer = self._free.pop() if self._free else self._flat.buffer(self._multiple)
        self._taken.append(buffer)
        return buffer

    def give(self, buffer: Buffer) -> None:
        self._taken = [other for other in self._taken if other is not buffer]
        self._free.append(buffer)

    def reclaim(self) -> None:
        self._free += self._taken
        self._taken = []


class Reducer(ABC):
    """Turns the gradients of the hosted virtual ranks into the gradient of the step, equal on all ranks."""

    @abstractmethod
    def accumulate(self, leaf: Leaf) -> list[Buffer]:
        """Run `leaf` for every hosted virtual rank; returns what this rank contributes to the sum."""

    @abstractmethod
    def reduce(self, parts: list[Buffer]) -> Buffer:
        """The sum over all ranks. The scalars in it are summed along with the gradients."""


class ExactReducer(Reducer):
    """Bitwise the same sum for every world size from 1 to V."""

    def __init__(self, group: Group, flat: Flat, virtual_ranks: int, bucket_bytes: int) -> None:
        self._group = group
        self._root = root(virtual_ranks)
        self._subtrees = [maximal(hosted, self._root) for hosted in shares(virtual_ranks, group.world)]
        unit = BLOCK * group.world  # a bucket is cut in W chunks, each of whole blocks
        self._pool = _Pool(flat, unit)
        self._bucket = max(1, bucket_bytes // (4 * unit)) * unit

    def accumulate(self, leaf: Leaf) -> list[Buffer]:
        self._pool.reclaim()

        def at_hand(node: Node) -> Buffer | None:
            if not node.is_leaf:
                return None
            buffer = self._pool.take()
            buffer.tensor.zero_()
            leaf(node.first, buffer)
            return buffer

        return [fold(node, at_hand, self._add) for node in self._subtrees[self._group.rank]]

    def _add(self, left: Buffer, right: Buffer) -> Buffer:
        left.tensor.add_(right.tensor)
        self._pool.give(right)
        return left

    def reduce(self, parts: list[Buffer]) -> Buffer:
        if self._group.world == 1:
            return parts[0]
        total = self._pool.take()
        exchanges: deque[_Exchange] = deque()
        gathers = []
        for start in range(0, total.tensor.numel(), self._bucket):
            bucket = slice(start, start + self._bucket)
            sent = [part.tensor[bucket] for part in parts]
            exchanges.append(_Exchange(self._group, self._subtrees, sent, total.tensor[bucket]))
            if len(exchanges) == 2:  # one bucket is under way while the one before it is added up
                gathers.append(exchanges.popleft().finish(self._root))
        gathers += [exchange.finish(self._root) for exchange in exchanges]
        for gathered in gathers:
            gathered()
        return total


class _Exchange:
    """One bucket on its way: every subtree's chunk c to rank c, then the finished chunks to everybody."""

    def __init__(self, group: Group, subtrees: list[list[Node]], sent: list[Tensor], total: Tensor) -> None:
        """`sent`: this rank's subtree sums, each (W·chunk,); `total`, (W·chunk,), receives the sum over the tree."""
        self._total, self._wire = total, group.wire
        chunk = total.numel() // group.world
        self._nodes = [node for of_rank in subtrees for node in of_rank]
        # To rank c go the c-th chunks of all our subtrees. One subtree lies in memory that way already.
        packed = sent[0] if len(sent) == 1 else torch.stack([s.view(-1, chunk) for s in sent], dim=1).view(-1)
        self._received = torch.empty(len(self._nodes), chunk, dtype=total.dtype, device=group.wire)
        self._work = dist.all_to_all_single(
            self._received.view(-1),
            packed.to(group.wire),
            output_split_sizes=[len(of_rank) * chunk for of_rank in subtrees],
            input_split_sizes=[len(sent) * chunk] * group.world,
            async_op=True,
        )

    def finish(self, root: Node) -> Callable[[], object]:
        """Add up this rank's chunk and start to spread it; the returned call waits for the whole bucket."""
        self._work.wait()
        sums = dict(zip(self._nodes, self._received, strict=True))
        chunk = fold(root, sums.get, Tensor.add_)
        gathered = self._total if self._total.device == self._wire else torch.empty_like(self._total, device=self._wire)
        work = gather_flat(gathered, chunk, async_op=True)

        def wait() -> None:
            work.wait()
            self._total.copy_(gathered)  # nothing to do where they are the same tensor

        return wait


class FastReducer(Reducer):
    """The backend's own all-reduce. Its order of addition, and so the result, depends on the world size."""

    def __init__(self, group: Group, flat: Flat, virtual_ranks: int) -> None:
        self._group = group
        self._hosted = shares(virtual_ranks, group.world)[group.rank]
        self._buffer = flat.buffer(BLOCK)

    def accumulate(self, leaf: Leaf) -> list[Buffer]:
        self._buffer.tensor.zero_()
        for virtual_rank in self._hosted:
            leaf(virtual_rank, self._buffer)
        return [self._buffer]

    def reduce(self, parts: list[Buffer]) -> Buffer:
        if self._group.world > 1:
            dist.all_reduce(parts[0].tensor)
        return parts[0]


def build(config: Reduce, group: Group, flat: Flat, virtual_ranks: int) -> Reducer:
    """The reducer that `reduce=…` names."""
    if config.mode is ReduceMode.fast:
        return FastReducer(group, flat, virtual_ranks)
    return ExactReducer(group, flat, virtual_ranks, int(config.bucket_mib * 2**20))
