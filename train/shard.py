"""Parameters that no rank holds whole: `sharding=full`.

Each rank keeps its chunks of every bucket, the same ones whose gradients it sums up and whose moments it owns. A layer
is gathered before its forward pass and before its backward pass, and released after each; what belongs to no layer
(embeddings, norms) is gathered for the length of a step.

FSDP2 was the other choice. It cuts each parameter by rows, so that the blocks in which norms are summed and the
vectors in which a fused AdamW rounds would depend on the number of ranks; here every mode of sharding cuts the one
flat layout at the same multiples of BLOCK, and the bits are the same.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from train.batch import Node, fold, maximal
from train.buckets import Started
from train.flat import BLOCK, Buffer, Flat, Piece, Range, chunk, up
from train.ranks import Ranks, Wait, gather
from train.reduce import ExactReducer, Exchange


class Unit:
    """A stretch of the flat parameters that is gathered and released as one."""

    def __init__(self, ranks: Ranks, parameters: Tensor, start: int, buckets: list[Range]) -> None:
        """`parameters`: the stretch, whole; `buckets`: how it is cut, each in as many chunks as there are ranks."""
        self._ranks, self.start, self.resident = ranks, start, True
        self.whole = torch.zeros(up(parameters.numel(), BLOCK * ranks.world), device=parameters.device)
        self.whole[: parameters.numel()] = parameters
        self._bytes = self.whole.untyped_storage().nbytes()
        self.mine: dict[int, Tensor] = {}  # by where it begins: this rank's chunk of a bucket, padded to the largest
        self._buckets: list[tuple[Tensor, Tensor]] = []
        for bucket in buckets:
            first, end = chunk(bucket, 0, ranks.world)
            begin = bucket[0] - start
            target = self.whole[begin : begin + (end - first) * ranks.world]
            own = target[ranks.rank * (end - first) :][: end - first].clone()
            mine = chunk(bucket, ranks.rank, ranks.world)
            if mine[0] < mine[1]:
                self.mine[mine[0]] = own
            self._buckets.append((target, own))

    def gather(self) -> None:
        if not self.resident:
            self.whole.untyped_storage().resize_(self._bytes)
            for wait in [gather(self._ranks, target, own) for target, own in self._buckets]:
                wait()
            self.resident = True

    def release(self) -> None:
        """The tensors that lie in it stay, without memory, until it is gathered again."""
        self.whole.untyped_storage().resize_(0)
        self.resident = False


class ShardedFlat(Flat):
    """The flat layout of a model whose parameters are gathered when they are used."""

    def __init__(self, model: nn.Module, ranks: Ranks, bucket_elements: int) -> None:
        self._units: list[Unit] = []
        self._mine: dict[int, Tensor] = {}  # this rank's chunks, by where they begin
        super().__init__(model)
        self._buckets = [
            (first, min(first + bucket_elements, end))
            for _, start, end in self.sections
            for first in range(start, end, bucket_elements)
        ]
        whole = self.parameters.detach()
        for layer, start, end in self.sections:
            inside = [bucket for bucket in self._buckets if start <= bucket[0] < end]
            unit = Unit(ranks, whole[start:end], start, inside)
            self._units.append(unit)
            self._mine |= unit.mine
            slots = zip(self.items, self.slots.values(), strict=True)
            members = [(parameter, at - start, n, shape) for parameter, (at, n, shape) in slots if start <= at < end]
            for parameter, at, n, shape in members:
                parameter.data = unit.whole[at : at + n].view(shape)
            self._use(model, layer, unit, [parameter for parameter, *_ in members])
        self._starts = list(self._mine)
        self.own([[chunk(bucket, r, ranks.world) for bucket in self._buckets] for r in range(ranks.world)], ranks.rank)
        del self.parameters
        self.release()

    def _use(self, model: nn.Module, layer: str, unit: Unit, members: list[nn.Parameter]) -> None:
        """Have a unit gathered whenever the module that it belongs to needs it."""
        module = model.get_submodule(layer)
        module.register_forward_pre_hook(lambda *_: unit.gather())
        if not layer:
            return  # of the whole model: it stays for the step
        waiting = 0  # gradients of this backward pass that are still to come

        def backward(*_: object) -> None:
            nonlocal waiting
            unit.gather()
            waiting = len(members)

        def ready(_: Tensor) -> None:
            nonlocal waiting
            waiting -= 1
            if waiting == 0:
                unit.release()

        module.register_forward_hook(lambda *_: unit.release())
        module.register_full_backward_pre_hook(backward)
        for parameter in members:
            parameter.register_post_accumulate_grad_hook(ready)  # type: ignore[no-untyped-call]

    def stretch(self, begin: int, end: int) -> Tensor:
        """One of this rank's chunks, or a part of one."""
        if not self._mine:  # not cut yet
            return super().stretch(begin, end)
        start = self._starts[bisect_right(self._starts, begin) - 1]
        return self._mine[start][begin - start : end - start]

    def held(self) -> list[tuple[int, Tensor]]:
        return [(begin, self.stretch(begin, end)) for begin, end in self.ranges]

    def buckets(self, elements: int, world: int) -> list[Range]:
        return self._buckets

    def pieces(self) -> list[Piece]:
        return [
            piece
            for begin, end in self.ranges
            for piece in self.named_parts("model", "", begin, self.stretch(begin, end), replicated=False)
        ]

    def release(self) -> None:
        for unit in self._units:
            unit.release()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        for unit in self._units:
            unit.gather()
        yield
        self.release()


class RoundReducer(ExactReducer):
    """The exact sum for `sharding=full`: only shards of it are kept.

    In round j rank r takes virtual rank j·W + r, whatever the speeds, and what is sent is added to the tree at once:
    besides a leaf there are log2(V) + 1 chunks. Where V leaves the last round short, the ranks without a leaf
    compute leaf 0 once more, since the others need them to gather the parameters; it is not sent.
    """

    def assign(self, hosted: Sequence[Sequence[int]]) -> None:
        world, leaves = self.ranks.world, self.virtual_ranks
        self._rounds = [range(first, min(first + world, leaves)) for first in range(0, leaves, world)]
        self._host([range(rank, leaves, world) for rank in range(world)])
        self._subtrees = [[Node(v, v + 1) for v in own] for own in self.hosted]
        self._most_losses = len(self._rounds)

    def _leaves(self) -> Iterator[tuple[int, Buffer]]:
        self._at_hand: list[dict[Node, Tensor]] = [{} for _ in self._buckets]
        self._computed: list[Tensor] = []
        self._last = self._zeros()
        for own in self._rounds:
            if self._computed:
                self._drain()
                self._last.tensor.zero_()
                self._last.numbers.zero_()
                self._next = 0
            self._round = own
            self._final = own[self.ranks.rank] if self.ranks.rank < len(own) else 0
            yield from self._last_leaf()
            self._computed.append(self._last.numbers.clone())

    def _exchange(self, bucket: Range) -> Started:
        a, b = bucket
        index, own = self._next - 1, self._round
        first, _ = chunk(bucket, self.ranks.rank, self.ranks.world)
        nodes = [[Node(own[r], own[r] + 1)] if r < len(own) else [] for r in range(self.ranks.world)]
        sent = [self._last.tensor[a:b].to(self.dtype)] if nodes[self.ranks.rank] else []
        exchange = Exchange(self.ranks, nodes, sent, bucket, self.dtype)

        def go_on() -> Wait:
            sums = self._at_hand[index]
            sums.update(exchange.sums())
            done = range(own[-1] + 1)
            sums = {node: fold(node, sums.get, torch.add) for node in maximal(done, self._root)}
            self._at_hand[index] = sums
            if self._root in sums:
                self._finish_chunk(sums[self._root].to(self.flat.device), first)
            return lambda: None

        return go_on

    def _losses(self) -> list[Tensor]:
        return self._computed[: len(self.hosted[self.ranks.rank])]
