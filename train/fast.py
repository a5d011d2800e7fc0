"""`reduce=fast`: the backend's own all-reduce, whose order of addition, and so the sum, depends on the world size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from train.buckets import Reducer, Started
from train.flat import Buffer, Range, chunk
from train.ranks import Wait


class FastReducer(Reducer):
    _most_losses = 1

    def assign(self, hosted: Sequence[Sequence[int]]) -> None:
        self._host(hosted)
        self._final = hosted[self.ranks.rank][-1]

    def _leaves(self) -> Iterator[tuple[int, Buffer]]:
        self._last = self._zeros()
        for virtual_rank in self.hosted[self.ranks.rank][:-1]:
            yield from self._leaf(virtual_rank, self._last)
        yield from self._last_leaf()

    def _exchange(self, bucket: Range) -> Started:
        a, b = bucket
        c, d = chunk(bucket, self.ranks.rank, self.ranks.world)
        whole = self._last.tensor[a:b]
        if self.ranks.world == 1:
            self._summed(whole, a)
            return lambda: lambda: None
        on_wire = whole.to(self.ranks.wire, self.dtype)
        work = self.ranks.sum_up(on_wire)

        def go_on() -> Wait:
            self.ranks.wait(work, f"the sum of elements {a:,} to {b:,}")
            whole.copy_(on_wire)  # nothing to do where they are the same tensor
            self._summed(self._last.tensor[c:d], c)
            return lambda: None

        return go_on

    def _losses(self) -> list[Tensor]:
        return [self._last.numbers]

    def _loss(self, losses: Tensor) -> Tensor:
        total: Tensor = losses.sum((0, 1))
        return total
