"""What every sum of gradients between ranks has in common: leaves, buckets on their way, and the numbers beside them.

Gradients travel in buckets, and a bucket goes out as soon as its gradients are there, while the last leaf's backward
is still under way. Every rank sends the buckets in the same order, whenever they become ready.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn

from train.batch import Node, micro_batch_seed, root, shares
from train.clock import Clock
from train.evidence import GRADIENT, PARAMETERS, Evidence, NoEvidence
from train.flat import BLOCK, SLICE, Buffer, Flat, Range, chunk, squares, to_device
from train.ranks import Changed, Ranks, Wait, gather

Started = Callable[[], Wait]  # an exchange under way: the call goes on with it, what that returns waits for its end

IN_FLIGHT = 2  # pieces of a bucket: one is under way while the one before it is added up


def bucket_elements(size: int, world: int) -> int:
    """The elements of a piece on its way, where `size` bytes may be on their way at a time: a multiple of BLOCK·W."""
    return max(1, size // (4 * BLOCK * world * IN_FLIGHT)) * BLOCK * world if world > 1 else SLICE


@dataclass(frozen=True, slots=True)
class Total:
    """What the virtual ranks of a step add up to: equal on all ranks, on the device, not waited for."""

    gradient: Tensor  # (length,) float32; where the optimizer is sharded, only what this rank owns
    loss: Tensor  # () float64
    aside: Tensor  # (N,) float64: what the model told besides, added up
    norm: Tensor  # () float64, L2, of the gradient
    stops: Tensor  # () float64: how many ranks were asked to stop
    changes: Tensor  # () float64: how many ranks know of a change of the ranks
    seconds: Tensor  # (2, W) float64: what each rank took for a leaf; for how long it then waited for the sum
    leaves: Tensor  # (V, 2) int64: checksums of the tokens and of the gradient of each virtual rank
    state: Tensor  # (2, 1) or (2, P) int64: checksums of the parameters before the step, and of the gradient


class Reducer(ABC):
    """Turns the gradients of the hosted virtual ranks into the gradient of the step."""

    def __init__(
        self,
        ranks: Ranks,
        flat: Flat,
        virtual_ranks: int,
        micro_batches: int = 1,
        *,
        bucket_bytes: int = 8 << 20,
        dtype: torch.dtype = torch.float32,
        sharded: bool = False,
        evidence: Evidence | None = None,
    ) -> None:
        """`flat` must have room for `ranks.world`. Leaves are backward passes over `micro_batches` each.

        `sharded`: each rank's optimizer owns its chunks only. `evidence`: what takes checksums; None takes none.
        """
        self.ranks, self.flat, self.dtype, self.virtual_ranks = ranks, flat, dtype, virtual_ranks
        self._micro_batches, self._sharded = micro_batches, sharded
        self._evidence = evidence or NoEvidence(flat)
        self._free: list[Buffer] = []
        self._taken: list[Buffer] = []
        self._done: dict[Node, Buffer] = {}  # sums of whole subtrees of the step in flight
        self._under_way = False  # a step has begun and is not summed up
        self._bucket_bytes = bucket_bytes
        self._root = root(virtual_ranks)
        self._clock = Clock(flat.device)
        self._tokens: dict[int, int] = {}
        self._unready: list[int] = []  # gradients that each bucket still waits for
        self._changed: Changed | None = None  # the ranks did, in the middle of the last leaf
        self.hosted: Sequence[Sequence[int]]  # by rank
        self.computed: Sequence[Sequence[int]]  # by rank, in the last finished step, which may have been taken over
        self._regular: Sequence[Sequence[int]] | None = None  # to come back to after a step that was taken over
        self._last: Buffer
        self._final: int | None
        self._most_losses: int
        for index, parameter in enumerate(flat.items):  # each says when its gradient is there: once a micro-batch
            parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._ready(index))  # type: ignore[no-untyped-call]
        self.lay_out()
        if sharded:
            flat.own(self._chunks, ranks.rank)

    @classmethod
    def of(cls, model: nn.Module, virtual_ranks: int = 8, micro_batches: int = 1) -> Self:
        """For a training loop of one's own, in the place of DDP: over torch.distributed's default group, if any.

        `model` is on its device, its parameters float32 and none frozen; they move into one flat tensor and, as with
        DDP, rank 0's become everybody's. The optimizer over `model.parameters()` may be built before or after.
        """
        odd = [n for n, p in model.named_parameters() if p.dtype != torch.float32 or not p.requires_grad]
        if odd:
            raise ValueError(f"all parameters must be float32 and require gradients, not so {', '.join(odd)}")
        ranks = Ranks.default()
        flat = Flat(model, virtual_ranks)
        ranks.broadcast(flat.parameters.detach())
        return cls(ranks, flat, virtual_ranks, micro_batches)

    def lay_out(self) -> None:
        """Cut everything for the ranks that there are, and share out the virtual ranks evenly among them."""
        self._unready = []
        ranks, flat = self.ranks, self.flat
        self._buckets = flat.buckets(bucket_elements(self._bucket_bytes, ranks.world), ranks.world)
        self._chunks = [[chunk(bucket, rank, ranks.world) for bucket in self._buckets] for rank in range(ranks.world)]
        self._mine = self._chunks[ranks.rank]
        blocks = [[block for a, b in own for block in range(a // BLOCK, b // BLOCK)] for own in self._chunks]
        self._most_blocks = max(map(len, blocks))
        at = {block: rank * self._most_blocks + i for rank, own in enumerate(blocks) for i, block in enumerate(own)}
        self._where = torch.tensor([at[block] for block in range(flat.size // BLOCK)], device=flat.device)
        self._inside = [
            [i for i, (a, b) in enumerate(self._buckets) if a < start + n and start < b]
            for start, n, _ in flat.slots.values()
        ]
        self._passes = [0] * len(self._buckets)  # gradients that make each bucket complete
        for bucket in chain.from_iterable(self._inside):
            self._passes[bucket] += self._micro_batches
        self.assign(shares(self.virtual_ranks, ranks.world))

    def kept(self) -> set[int]:
        """The virtual ranks of the step in flight whose gradients this rank has finished and still has."""
        return {v for node in self._done for v in range(*node)}

    def forget(self) -> None:
        """Drop what is kept of the step in flight."""
        self._done = {}

    def take_over(self, hosted: Sequence[Sequence[int]]) -> None:
        """Let each rank host these virtual ranks for the rest of the step in flight."""
        regular = self.hosted
        self.assign(hosted)
        self._regular = regular

    @abstractmethod
    def assign(self, hosted: Sequence[Sequence[int]]) -> None:
        """Let each rank host these virtual ranks, from the next step on. It has no say in the bits."""

    def _host(self, hosted: Sequence[Sequence[int]]) -> None:
        self._regular = None
        self.hosted, widest = hosted, max(map(len, hosted))
        order = sorted((v, rank * widest + i) for rank, own in enumerate(hosted) for i, v in enumerate(own))
        self._places = torch.tensor([place for _, place in order], device=self.flat.device)  # of leaves, in rows of all

    # ------------------------------------------------------------------------------------ a step, in order

    def leaves(self) -> Iterator[tuple[int, Buffer]]:
        """The hosted virtual ranks, one after the other: whoever asks runs their backward passes in between.

        Parameters' gradients are attached to the buffer that comes along. During the last one's backward what is
        ready goes out. After `finish` they hold the sum.
        """
        self._clock.start()
        if not self._under_way:
            self._free += self._taken
            self._taken = []
        else:  # it was interrupted; into what is not finished an abandoned collective may still write
            self._taken = list(self._done.values())
        self._under_way, self._unready, self._changed = True, [], None
        kept = self.kept()
        self._tokens = {v: tokens for v, tokens in self._tokens.items() if v in kept}
        self._squares = [torch.zeros(0, device=self.flat.device)]
        self._evidence.begin(kept)
        for a, b in self._mine:
            if a < b:
                self._evidence.of_state(PARAMETERS, self.flat.stretch(a, b), a)
        self._finishing: deque[Started] = deque()
        self._gathering: list[Wait] = []
        self._next = 0
        yield from self._leaves()

    def micro_batches(self, seed: int, step: int) -> Iterator[tuple[int, int, Buffer]]:
        """`leaves`, micro-batch by micro-batch (v, i), a backward pass for each; torch is seeded for it before."""
        for v, buffer in self.leaves():
            for i in range(self._micro_batches):
                torch.manual_seed(micro_batch_seed(seed, step, v, i))  # type: ignore[no-untyped-call]
                yield v, i, buffer

    def finish(self, stop: bool = False, change: bool = False) -> Total:
        """The sum over all ranks; this one was asked to stop, or knows of a `change` of the ranks."""
        self._clock.stop()
        try:
            if self._changed is not None:
                raise self._changed
            self._drain()
        except Changed:
            if not self._gathering:  # no sum stands where the last leaf stood
                self._keep()
            raise
        self._clock.summed()
        total = self._exchange_numbers(stop, change)
        self.forget()
        self._under_way, self.computed = False, self.hosted
        if self._regular is not None:
            self.assign(self._regular)
        return total

    def spread(self) -> None:
        """After the optimizer's step: bring every rank's part of the parameters to all of them, if it is sharded."""
        if self._sharded and self.ranks.world > 1:
            stretch = self.flat.stretch
            gathers = [
                self._gather(stretch(a, b), stretch(c, d).clone())
                for (a, b), (c, d) in zip(self._buckets, self._mine, strict=True)
            ]
            for wait in gathers:
                wait()
        self.flat.release()

    @abstractmethod
    def _leaves(self) -> Iterator[tuple[int, Buffer]]:
        """Have the hosted leaves computed, the last of them, `self._final`, into `self._last`."""

    @abstractmethod
    def _exchange(self, bucket: Range) -> Started:
        """Start to sum up a bucket."""

    def _keep(self) -> None:  # noqa: B027 - nothing, where leaves are not told apart
        """Keep the last leaf, which is whole but cannot be summed up, of whose buckets `_next` have been sent."""

    def _gather(self, target: Tensor, own: Tensor) -> Wait:
        """Start to bring every rank's chunk of a bucket to all of them."""
        return gather(self.ranks, target, own)

    @abstractmethod
    def _losses(self) -> list[Tensor]:
        """The losses, and the numbers beside them, of what this rank contributes."""

    @abstractmethod
    def _loss(self, losses: Tensor) -> Tensor:
        """(W, most, 1 + N) -> (1 + N,): their sum over all ranks."""

    # ---------------------------------------------------------------------------------------------- buckets

    def _last_leaf(self) -> Iterator[tuple[int, Buffer]]:
        """The last hosted leaf, whose gradients are sent as they become ready."""
        assert self._final is not None
        self._unready = list(self._passes) if self.ranks.world > 1 else []
        yield from self._leaf(self._final, self._last)
        self._unready = []  # what is left (parameters without a gradient) goes out in `finish`

    def _ready(self, parameter: int) -> None:
        """A parameter's gradient is there: send the buckets that are complete, in their order on every rank.

        If the ranks change meanwhile, the backward pass is finished all the same: a leaf that is whole can be kept.
        """
        if not self._unready:
            return
        for bucket in self._inside[parameter]:
            self._unready[bucket] -= 1
            if self._unready[bucket] < 0:  # what has been sent, perhaps, was not all: the sum would depend on W
                raise RuntimeError(
                    f"{list(self.flat.slots)[parameter]}, or a parameter beside it, got a gradient twice in a micro-"
                    "batch: run one backward pass for each (v, i), and checkpoint with use_reentrant=False"
                )
        try:
            while self._changed is None and self._next < len(self._buckets) and self._unready[self._next] == 0:
                self._send()
        except Changed as changed:
            self._changed = changed

    def _send(self) -> None:
        a, b = self._buckets[self._next]
        if self._final is not None:
            self._evidence.of_leaf(self._final, self._last.tensor[a:b], a)
        self._next += 1  # whether or not it can be launched: `_exchange` may have added to the leaf in place
        self._finishing.append(self._exchange((a, b)))
        if len(self._finishing) == IN_FLIGHT:
            with self._clock.paused():  # waiting for others
                self._gathering.append(self._finishing.popleft()())

    def _drain(self) -> None:
        """Send what has not been sent, and wait until all has arrived."""
        while self._next < len(self._buckets):
            self._send()
        while self._finishing:
            self._gathering.append(self._finishing.popleft()())
        for gathered in self._gathering:
            gathered()
        self._gathering = []

    def _summed(self, own: Tensor, start: int) -> None:
        """This rank's chunk of a bucket is complete, float32: note what is to be known of it."""
        if not own.numel():
            return
        self._squares.append(squares(own))
        self._evidence.of_state(GRADIENT, own, start)

    # ----------------------------------------------------------------------------------- leaves and buffers

    def _leaf(self, virtual_rank: int, buffer: Buffer) -> Iterator[tuple[int, Buffer]]:
        """Have a leaf's gradient added to what is in `buffer`."""
        self.ranks.look()  # what is finished is kept, and what is not may be another's
        self.flat.attach(buffer)
        buffer.tokens = 0
        yield virtual_rank, buffer
        self._tokens[virtual_rank] = buffer.tokens

    def _take(self, dtype: torch.dtype) -> Buffer:
        """A buffer that is free, or a new one. They are kept for the next step."""
        free = next((i for i, buffer in enumerate(self._free) if buffer.tensor.dtype == dtype), None)
        self._taken.append(self.flat.buffer(dtype) if free is None else self._free.pop(free))
        return self._taken[-1]

    def _zeros(self) -> Buffer:
        buffer = self._take(torch.float32)
        buffer.tensor.zero_()
        buffer.numbers.zero_()
        return buffer

    def _give(self, buffer: Buffer) -> None:
        self._taken = [other for other in self._taken if other is not buffer]
        self._free.append(buffer)

    # ---------------------------------------------------------------------------------------------- numbers

    def _exchange_numbers(self, stop: bool, change: bool) -> Total:
        """The few numbers of a step that are not gradients, in one small all-gather: a row of int64 a rank."""
        device, hosted = self.flat.device, self.hosted[self.ranks.rank]
        losses, widest = self._losses(), max(map(len, self.hosted))
        missing = widest - len(hosted)
        seconds = self._clock.seconds / max(1, len(hosted))
        said = torch.tensor([stop, change, seconds, self._clock.waited], dtype=torch.float64).view(torch.int64)
        tokens = torch.tensor([self._tokens[v] for v in hosted] + [0] * missing, dtype=torch.int64)
        blocks = torch.zeros(self._most_blocks, dtype=torch.float64, device=device)
        mine = torch.cat(self._squares)
        blocks[: mine.numel()] = mine
        parts = [
            to_device(torch.cat([said, tokens]), device),
            torch.stack([*losses, *[torch.zeros_like(self._last.numbers)] * (self._most_losses - len(losses))]),
            torch.stack([self._evidence.leaf(v) for v in [*hosted, *[-1] * missing]]),
            self._evidence.state.view(-1),
            blocks,
        ]
        rows = self.ranks.all_gather(torch.cat([part.view(torch.int64).flatten() for part in parts]))
        sizes = [4, widest, *(part.numel() for part in parts[1:])]
        said, tokens, loss, gradients, sums, squares_of = (part.contiguous() for part in rows.split(sizes, dim=1))  # type: ignore[no-untyped-call]
        said = said.view(torch.float64)
        total = squares_of.view(torch.float64).view(-1)[self._where].sum()
        numbers = self._loss(loss.view(torch.float64).view(self.ranks.world, self._most_losses, -1))
        return Total(
            gradient=self._last.tensor,
            loss=numbers[0],
            aside=numbers[1:],
            norm=total.sqrt(),
            stops=said[:, 0].sum(),
            changes=said[:, 1].sum(),
            seconds=said[:, 2:].T,
            leaves=torch.stack([tokens.view(-1)[self._places], gradients.view(-1)[self._places]], dim=1),
            state=sums.view(self.ranks.world, 2, -1).sum(0),
        )
