"""Muon for the matrices inside a model's layers, AdamW for everything else.

Muon (Keller Jordan, kellerjordan.github.io/posts/muon) steps along the orthogonalised momentum of a matrix: five
Newton-Schulz iterations in bf16. Momentum is elementwise and kept wherever the parameter is; orthogonal is a property
of the whole matrix, so each is handed over whole and alone, and its bits depend on nothing else. (Steps over matrices
that are cut, or batched by owner, gave other bits for each number of ranks.) The arithmetic is that of
`torch.optim.Muon`, bit for bit.

Where the state is sharded a matrix has an owner. Each rank steps the momentum of its chunks and sends what becomes of
them, in bf16 as the iterations begin; the owner puts the matrix together, orthogonalises it and sends the chunks back,
in bf16 as they end; each rank updates its own. That is 4 bytes a parameter of traffic, and work that is done once.

A tensor may hold several matrices: an expert of a layer is one, and so are the queries, keys and values of one
projection, which Jordan found to train better apart. Embeddings, the output matrix, positions, routers, norms and
biases are AdamW's.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.config import Optimizer
from train.flat import Flat, Range, layer
from train.ranks import Ranks

STEPS, A, B, C = 5, 3.4445, -4.7750, 2.0315  # of Newton-Schulz: Jordan's, and torch's defaults
EPS = 1e-7


def hidden(name: str, dimensions: int) -> bool:
    """Whether Muon steps the parameter called `name`."""
    return dimensions >= 2 and bool(layer(name)) and "router" not in name


def matrices(flat: Flat) -> Iterator[tuple[int, int, int]]:
    """Where each matrix of Muon's begins in the layout, its rows (outputs) and its columns (inputs)."""
    for name, (start, count, shape) in flat.slots.items():
        if not hidden(name, len(shape)):
            continue
        rows, columns = shape[-2:]
        parts = [rows] * (count // (rows * columns))  # of a stack of experts, each
        if name.endswith("attention.qkv.weight"):
            queries = flat.slots[name.replace("qkv", "out")][2][1]
            parts = [queries, (rows - queries) // 2, (rows - queries) // 2]
        for height in parts:
            yield start, height, columns
            start += height * columns


def runs(flat: Flat) -> list[tuple[bool, Range]]:
    """The matrices' section in stretches whose parameters are all Muon's, or none of them; the gaps are in it too."""
    slots = [(start, hidden(name, len(shape))) for name, (start, _, shape) in flat.slots.items() if start < flat.cut]
    first = [(mine, next(iter(run))[0]) for mine, run in groupby(slots, key=lambda slot: slot[1])]
    ends = [start for _, start in first[1:]] + [flat.cut]
    return [(mine, (start, end)) for (mine, start), end in zip(first, ends, strict=True)]


def overlap(ranges: Sequence[Range], begin: int, end: int) -> list[Range]:
    """What of [begin, end) lies in `ranges`, which are in order."""
    first = max(0, bisect_right(ranges, (begin, end)) - 1)
    found = [(max(a, begin), min(b, end)) for a, b in ranges[first : bisect_left(ranges, (end, end))]]
    return [(a, b) for a, b in found if a < b]


def orthogonal(update: Tensor) -> Tensor:
    """Five Newton-Schulz iterations towards the nearest orthogonal matrix, in bf16. `update` is written over."""
    x = update.T if update.size(0) > update.size(1) else update
    x.div_(x.norm().clamp(min=EPS))
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.T if update.size(0) > update.size(1) else x


class Round(NamedTuple):
    """A matrix for each rank to orthogonalise, all of about one size; in the last rounds some have none."""

    shapes: list[tuple[int, int]]  # of each rank's matrix
    here: list[list[tuple[Tensor, slice]]]  # what of each lies on this rank: stretches, and where in them
    own: list[list[slice]]  # where in this rank's matrix lies what each rank has of it


class Muon:
    """Both, over what this rank owns of a layout.

    Moments stand by stretch of the layout, as AdamW's do by itself, so that checkpoints and checksums need no cases.
    """

    def __init__(self, config: Optimizer, flat: Flat, ranks: Ranks, adamw: Callable[[Optimizer, Flat], Any]) -> None:
        """Cuts `flat.owned` into Muon's stretches, and AdamW's two kinds, with decay and without."""
        kinds = [(muon, *part) for muon, run in runs(flat) for part in overlap(flat.ranges, *run)]
        cut = [(muon, start, flat.stretch(start, end).requires_grad_()) for muon, start, end in kinds]
        stretches = [(start, tensor) for muon, start, tensor in cut if muon]
        rest, vectors = [(start, tensor) for muon, start, tensor in cut if not muon], flat.owned[-1]
        flat.owned = [rest, vectors]
        self._adamw = adamw(config, flat)
        flat.owned = [rest, vectors, stretches]
        self._ranks, self._momentum = ranks, config.momentum
        self._moments = {tensor: torch.zeros_like(tensor, requires_grad=False) for _, tensor in stretches}
        self._rounds = list(self._dealt(flat, stretches))
        muon = {"params": list(self._moments), "lr": config.muon_lr, "scale": config.muon_lr / config.lr}
        muon |= {"weight_decay": config.weight_decay}
        self.param_groups: list[dict[str, Any]] = [*self._adamw.param_groups, muon]
        momentum = {tensor: {"momentum_buffer": moment} for tensor, moment in self._moments.items()}
        self.state = {**self._adamw.state, **momentum}

    def _dealt(self, flat: Flat, stretches: list[tuple[int, Tensor]]) -> Iterator[Round]:
        """The matrices, the most work first, dealt to the ranks in turn; where all ranks hold all, each does all."""
        starts, world = [start for start, _ in stretches], len(flat.shares)
        mine = self._ranks.rank if world > 1 else 0

        def here(a: int, b: int) -> tuple[Tensor, slice]:
            start, tensor = stretches[bisect_right(starts, a) - 1]
            return tensor, slice(a - start, b - start)

        dealt = sorted(matrices(flat), key=lambda one: (-one[1] * one[2] * min(one[1:]), one[0]))
        for first in range(0, len(dealt), world):
            turn = dealt[first : first + world]
            spans = [(begin, begin + rows * columns) for begin, rows, columns in turn]
            own: list[list[slice]] = [[] for _ in flat.shares]
            if mine < len(turn):
                begin, _ = spans[mine]
                own = [[slice(a - begin, b - begin) for a, b in overlap(r, *spans[mine])] for r in flat.shares]
            parts = [[here(*part) for part in overlap(flat.ranges, *span)] for span in spans]
            parts += [[] for _ in range(world - len(turn))]
            yield Round([(rows, columns) for _, rows, columns in turn], parts, own)

    def step(self) -> None:
        group = self.param_groups[-1]
        for stretch, moment in self._moments.items():
            assert stretch.grad is not None
            moment.lerp_(stretch.grad, 1 - self._momentum)
            stretch.detach().mul_(1 - group["lr"] * group["weight_decay"])
        for turn in self._rounds:
            self._turn(turn, group["lr"])
        self._adamw.step()

    def _turn(self, turn: Round, rate: float) -> None:
        places = list(chain.from_iterable(turn.here))
        updates = [stretch.grad[at].lerp(self._moments[stretch][at], self._momentum) for stretch, at in places]  # type: ignore[index]
        here = [sum(at.stop - at.start for _, at in part) for part in turn.here]
        there = [sum(at.stop - at.start for at in part) for part in turn.own]
        mine = self._exchange([update.bfloat16() for update in updates], here, there)
        own, whole = list(chain.from_iterable(turn.own)), torch.empty_like(mine)
        if own:
            for at, part in zip(own, mine.split([at.stop - at.start for at in own]), strict=True):  # type: ignore[no-untyped-call]
                whole[at] = part
            shape = turn.shapes[self._ranks.rank if len(turn.own) > 1 else 0]
            whole = orthogonal(whole.view(shape)).flatten()
        back = self._exchange([whole[at] for at in own], there, here)
        parts = iter(back.split([at.stop - at.start for _, at in places]))  # type: ignore[no-untyped-call]
        for part, (rows, columns) in zip(turn.here, turn.shapes, strict=False):
            for stretch, at in part:
                stretch.detach()[at].add_(next(parts), alpha=-rate * math.sqrt(max(1, rows / columns)))

    def _exchange(self, sent: list[Tensor], to_each: list[int], from_each: list[int]) -> Tensor:
        """So many elements of `sent` to each rank; what comes from each, one after the other."""
        device = next(iter(self._moments.values())).device if self._moments else self._ranks.wire
        packed = torch.cat(sent) if sent else torch.empty(0, dtype=torch.bfloat16, device=device)
        if len(to_each) == 1:
            return packed
        received = torch.empty(sum(from_each), dtype=torch.bfloat16, device=self._ranks.wire)
        work = self._ranks.exchange(received, packed.to(self._ranks.wire), from_each, to_each)
        self._ranks.wait(work, "an exchange of Muon's updates")
        return received.to(device)
