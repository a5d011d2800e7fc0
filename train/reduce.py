"""The sum of the V gradients, in the order of the canonical tree, wherever its leaves were computed.

A rank adds the gradients of the virtual ranks it hosts as it goes, which leaves it the sums of the few maximal
subtrees of what it hosts. The rest of the tree is finished between ranks, bucket by bucket, while the last leaf's
backward is still under way: a bucket goes out as soon as its gradients are there; it is cut in W chunks; an
all-to-all brings every subtree's chunk c to rank c; rank c finishes the tree for its chunk. Then an all-gather spreads
the sums or, where the optimizer is sharded (`sharding=optimizer`), rank c updates its chunk of the parameters and they
are spread instead. With one subtree a rank that is 2(W-1)/W of the gradient's bytes a rank, as many as a ring
all-reduce sends.

The sum is written over the last leaf, which has been sent by then; nothing else is overwritten before the step is
committed, and there is no buffer besides. When a rank is lost, the others keep the subtrees that they have finished:
the same step is begun again, with other ranks, and what is at hand is not computed twice.

With `reduce.dtype=bf16` every node of the tree is rounded, leaves included, not every message: the law holds.

Canonical trees for data-parallel determinism: EasyScale (SC'23) fixes virtual workers and the order of their
gradients; TBIK (arXiv 2511.17826) orders the adds of tensor-parallel matrix products along a tree.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from train.batch import Node, children, fold, maximal, spine
from train.buckets import Reducer, Started
from train.flat import Buffer, Range, chunk
from train.ranks import Ranks, Wait


class ExactReducer(Reducer):
    """Bitwise the same sum for every world size from 1 to V, however the leaves are shared out."""

    def assign(self, hosted: Sequence[Sequence[int]]) -> None:
        self._host(hosted)
        self._subtrees = [maximal(own, self._root) for own in hosted]
        self._most_losses = max(map(len, self._subtrees))

    def _leaves(self) -> Iterator[tuple[int, Buffer]]:
        self._parts: list[Buffer] = []
        self._lefts: list[Buffer] = []
        self._final = None
        subtrees = self._subtrees[self.ranks.rank]
        path, end = spine(subtrees[-1], self._done) if subtrees else ([], None)
        self._path = path
        for node in subtrees[:-1]:
            self._parts.append((yield from self._subtree(node)))
        for node in path:
            self._lefts.append((yield from self._subtree(node)))
        self._last = self._zeros()
        if end in self._done:
            self._last.tensor.copy_(self._done[end].tensor)
            self._last.numbers.copy_(self._done[end].numbers)
        elif end is not None:
            self._final = end.first
            yield from self._last_leaf()

    def _subtree(self, node: Node) -> Generator[tuple[int, Buffer], None, Buffer]:
        """`fold`, with the leaves computed by whoever iterates. log2(n) + 1 buffers are alive at most."""
        if node not in self._done:
            if node.is_leaf:
                self._done[node] = yield from self._whole_leaf(node)
            else:
                left, right = children(node)
                yield from self._subtree(left)
                yield from self._subtree(right)
                self._done[node] = self._add(self._done.pop(left), self._done.pop(right))
        return self._done[node]

    def _whole_leaf(self, node: Node) -> Generator[tuple[int, Buffer], None, Buffer]:
        buffer = self._zeros()
        yield from self._leaf(node.first, buffer)
        self._evidence.of_leaf(node.first, buffer.tensor, 0)
        if self.dtype == torch.float32:
            return buffer
        rounded = self._take(self.dtype)
        rounded.tensor.copy_(buffer.tensor)
        rounded.numbers.copy_(buffer.numbers)
        self._give(buffer)
        return rounded

    def _add(self, left: Buffer, right: Buffer) -> Buffer:
        left.tensor.add_(right.tensor)
        left.numbers.add_(right.numbers)
        self._give(right)
        return left

    def _own(self, bucket: Range) -> Tensor:
        """The sum of the last subtree, in place if nothing is rounded; zeros where this rank hosts none."""
        a, b = bucket
        value = self._last.tensor[a:b].to(self.dtype)
        for left in reversed(self._lefts):
            value.add_(left.tensor[a:b])  # left + value: two numbers have the same sum either way round
        return value

    def _keep(self) -> None:
        if self._final is None or self.dtype != torch.float32:
            return
        for a, b in self._buckets[self._next :]:
            self._evidence.of_leaf(self._final, self._last.tensor[a:b], a)
            self._own((a, b))
        self._last.numbers.copy_(self._losses()[-1])
        for node in self._path:
            del self._done[node]
        self._done[self._subtrees[self.ranks.rank][-1]] = self._last

    def _exchange(self, bucket: Range) -> Started:
        a, b = bucket
        value = self._own(bucket)
        if self.ranks.world == 1:
            self._finish_chunk(value, a)
            return lambda: lambda: None
        sent = [part.tensor[a:b] for part in self._parts] + [value] * bool(self._subtrees[self.ranks.rank])
        return self._between(bucket, sent)

    def _between(self, bucket: Range, sent: list[Tensor]) -> Started:
        """Start to add up what the ranks have of a bucket; `sent`: this one's subtree sums."""
        exchange = Exchange(self.ranks, self._subtrees, sent, bucket, self.dtype)
        c, _ = chunk(bucket, self.ranks.rank, self.ranks.world)

        def go_on() -> Wait:
            own = fold(self._root, exchange.sums().get, Tensor.add_).to(self.flat.device)
            self._finish_chunk(own, c)
            return (lambda: None) if self._sharded else self._gather(self._last.tensor[slice(*bucket)], own)

        return go_on

    def _finish_chunk(self, sum: Tensor, start: int) -> None:
        total = sum.float()
        self._summed(total, start)
        own = self._last.tensor[start : start + total.numel()]
        if own.data_ptr() != total.data_ptr():
            own.copy_(total)

    def _losses(self) -> list[Tensor]:
        last = self._last.numbers
        for left in reversed(self._lefts):
            last = left.numbers + last
        return [part.numbers for part in self._parts] + [last] * bool(self._subtrees[self.ranks.rank])

    def _loss(self, losses: Tensor) -> Tensor:
        sums = {node: losses[r, i] for r, nodes in enumerate(self._subtrees) for i, node in enumerate(nodes)}
        total: Tensor = fold(self._root, sums.get, torch.add)
        return total


class Exchange:
    """Every subtree's chunk c of a bucket on its way to rank c."""

    def __init__(
        self, ranks: Ranks, subtrees: list[list[Node]], sent: list[Tensor], bucket: Range, dtype: torch.dtype
    ) -> None:
        """`sent`: this rank's subtree sums of the bucket, not to be written to before `sums`."""
        cuts = [chunk(bucket, rank, ranks.world) for rank in range(ranks.world)]
        sizes = [end - first for first, end in cuts]
        own = sizes[ranks.rank]
        # To rank c go the c-th chunks of all our subtrees. One subtree lies in memory that way already.
        parts = sent if len(sent) == 1 else [s[a - bucket[0] : b - bucket[0]] for a, b in cuts for s in sent]
        packed = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
        self._sent = packed.to(ranks.wire)
        self._nodes = [node for of_rank in subtrees for node in of_rank]
        self._received = torch.empty(len(self._nodes), own, dtype=dtype, device=ranks.wire)
        self._ranks, self._what = ranks, f"the exchange of elements {bucket[0]:,} to {bucket[1]:,}"
        self._work = ranks.exchange(
            self._received.view(-1),
            self._sent,
            from_each=[len(of_rank) * own for of_rank in subtrees],
            to_each=[len(sent) * size for size in sizes],
        )

    def sums(self) -> dict[Node, Tensor]:
        """Wait; this rank's chunk of every subtree's sum."""
        self._ranks.wait(self._work, self._what)
        return dict(zip(self._nodes, self._received, strict=True))
