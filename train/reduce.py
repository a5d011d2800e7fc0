"""The sum of the V gradients, in the order of the canonical tree, wherever its leaves were computed.

A rank adds the gradients of the virtual ranks it hosts as it goes, which leaves it the sums of the few maximal
subtrees of what it hosts. The rest of the tree is finished between ranks, bucket by bucket, while the last leaf's
backward is still under way: a bucket goes out as soon as its gradients are there; it is cut in W chunks; an
all-to-all brings every subtree's chunk c to rank c; rank c finishes the tree for its chunk. Then an all-gather spreads
the sums or, where the optimizer is sharded (`sharding=optimizer`), rank c updates its chunk of the parameters and they
are spread instead. With one subtree a rank that is 2(W-1)/W of the gradient's bytes a rank, as many as a ring
all-reduce sends.

The sum is written over the last leaf, which has been sent by then; nothing else is overwritten before the step is
committed, and there is no buffer besides. A rank that must begin the sum again computes one leaf anew.

With `reduce.dtype=bf16` every node of the tree is rounded, leaves included, not every message: the law holds.

`FastReducer` stands beside `ExactReducer`: the same interface over the backend's own all-reduce, whose order of
addition depends on the world size.

Canonical trees for data-parallel determinism: EasyScale (SC'23) fixes virtual workers and the order of their
gradients; TBIK (arXiv 2511.17826) orders the adds of tensor-parallel matrix products along a tree.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from train.batch import Node, children, fold, maximal, root, spine
from train.buckets import Reducer, Started, Wait, gather
from train.config import ReduceMode, Sharding, Train
from train.evidence import Evidence
from train.flat import Buffer, Flat
from train.group import Ranks


class ExactReducer(Reducer):
    """Bitwise the same sum for every world size from 1 to V, however the leaves are shared out."""

    def assign(self, hosted: list[range]) -> None:
        super().assign(hosted)
        self._root = root(self.virtual_ranks)
        self._subtrees = [maximal(own, self._root) for own in hosted]
        self._most_losses = max(map(len, self._subtrees))
        *self._before, last = self._subtrees[self.ranks.rank]
        self._path, leaf = spine(last)
        self._final = leaf.first

    def _leaves(self) -> Iterator[tuple[int, Buffer]]:
        self._parts: list[Buffer] = []
        self._lefts: list[Buffer] = []
        for node in self._before:
            self._parts.append((yield from self._subtree(node)))
        for node in self._path:
            self._lefts.append((yield from self._subtree(node)))
        self._last = self._zeros()
        yield from self._last_leaf()

    def _subtree(self, node: Node) -> Generator[tuple[int, Buffer], None, Buffer]:
        """`fold`, with the leaves computed by whoever iterates. log2(n) + 1 buffers are alive at most."""
        if not node.is_leaf:
            left, right = children(node)
            left_sum = yield from self._subtree(left)
            return self._add(left_sum, (yield from self._subtree(right)))
        buffer = self._zeros()
        yield from self._leaf(node.first, buffer)
        self._evidence.of_leaf(node.first, buffer.tensor, 0)
        if self.dtype == torch.float32:
            return buffer
        rounded = self._take(self.dtype)
        rounded.tensor.copy_(buffer.tensor)
        rounded.loss.copy_(buffer.loss)
        self._give(buffer)
        return rounded

    def _add(self, left: Buffer, right: Buffer) -> Buffer:
        left.tensor.add_(right.tensor)
        left.loss.add_(right.loss)
        self._give(right)
        return left

    def _exchange(self, bucket: tuple[int, int]) -> Started:
        a, b = bucket
        value = self._last.tensor[a:b].to(self.dtype)
        for left in reversed(self._lefts):
            value.add_(left.tensor[a:b])  # left + value: two numbers have the same sum either way round
        if self.ranks.world == 1:
            self._finish_chunk(value, a)
            return lambda: lambda: None
        sent = [part.tensor[a:b] for part in self._parts] + [value]
        exchange = _Exchange(self.ranks, self._subtrees, sent)
        c, _ = self._chunk(bucket, self.ranks.rank)

        def go_on() -> Wait:
            chunk = exchange.sum(self._root).to(self.flat.parameters.device)
            self._finish_chunk(chunk, c)
            return (lambda: None) if self._sharded else gather(self.ranks, self._last.tensor[a:b], chunk)

        return go_on

    def _finish_chunk(self, chunk: Tensor, start: int) -> None:
        total = chunk.float()
        self._summed(total, start)
        own = self._last.tensor[start : start + total.numel()]
        if (self._sharded or self.ranks.world == 1) and own.data_ptr() != total.data_ptr():
            own.copy_(total)

    def _losses(self) -> list[Tensor]:
        last = self._last.loss
        for left in reversed(self._lefts):
            last = left.loss + last
        return [part.loss for part in self._parts] + [last]

    def _loss(self, losses: Tensor) -> Tensor:
        sums = {node: losses[r, i] for r, nodes in enumerate(self._subtrees) for i, node in enumerate(nodes)}
        total: Tensor = fold(self._root, sums.get, torch.add)
        return total


class _Exchange:
    """Every subtree's chunk c of a bucket on its way to rank c."""

    def __init__(self, ranks: Ranks, subtrees: list[list[Node]], sent: list[Tensor]) -> None:
        """`sent`: this rank's subtree sums, (W·chunk,) each, not to be written to before `sum`."""
        chunk = sent[0].numel() // ranks.world
        self._nodes = [node for of_rank in subtrees for node in of_rank]
        # To rank c go the c-th chunks of all our subtrees. One subtree lies in memory that way already.
        packed = sent[0] if len(sent) == 1 else torch.stack([s.view(-1, chunk) for s in sent], dim=1).view(-1)
        self._sent = packed.to(ranks.wire)
        self._received = torch.empty(len(self._nodes), chunk, dtype=self._sent.dtype, device=ranks.wire)
        self._work = dist.all_to_all_single(
            self._received.view(-1),
            self._sent,
            output_split_sizes=[len(of_rank) * chunk for of_rank in subtrees],
            input_split_sizes=[len(sent) * chunk] * ranks.world,
            async_op=True,
        )

    def sum(self, root: Node) -> Tensor:
        """Wait, and add up this rank's chunk along the tree."""
        self._work.wait()
        sums = dict(zip(self._nodes, self._received, strict=True))
        chunk: Tensor = fold(root, sums.get, Tensor.add_)
        return chunk


class FastReducer(Reducer):
    """The backend's own all-reduce. Its order of addition, and so the result, depends on the world size."""

    _most_losses = 1

    def assign(self, hosted: list[range]) -> None:
        super().assign(hosted)
        self._final = hosted[self.ranks.rank][-1]

    def _leaves(self) -> Iterator[tuple[int, Buffer]]:
        self._last = self._zeros()
        for virtual_rank in self.hosted[self.ranks.rank][:-1]:
            yield from self._leaf(virtual_rank, self._last)
        yield from self._last_leaf()

    def _exchange(self, bucket: tuple[int, int]) -> Started:
        a, b = bucket
        c, d = self._chunk(bucket, self.ranks.rank)
        whole = self._last.tensor[a:b]
        if self.ranks.world == 1:
            self._summed(whole, a)
            return lambda: lambda: None
        on_wire = whole.to(self.ranks.wire, self.dtype)
        work = dist.all_reduce(on_wire, async_op=True)

        def go_on() -> Wait:
            work.wait()
            whole.copy_(on_wire)  # nothing to do where they are the same tensor
            self._summed(self._last.tensor[c:d], c)
            return lambda: None

        return go_on

    def _losses(self) -> list[Tensor]:
        return [self._last.loss]

    def _loss(self, losses: Tensor) -> Tensor:
        total: Tensor = losses.sum()
        return total


def build(config: Train, ranks: Ranks, flat: Flat) -> Reducer:
    """The reducer that a run's configuration asks for."""
    kind = FastReducer if config.reduce.mode is ReduceMode.fast else ExactReducer
    return kind(
        ranks,
        flat,
        config.batch.virtual_ranks,
        config.batch.micro_batches,
        bucket_bytes=int(config.reduce.bucket_mib * 2**20),
        dtype=torch.bfloat16 if config.reduce.dtype == "bf16" else torch.float32,
        sharded=config.sharding is Sharding.optimizer,
        evidence=Evidence(flat, config.evidence.parameters) if config.evidence.steps else None,
    )
