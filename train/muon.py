"""Muon for the matrices inside a model's layers, AdamW for everything else.

Muon (Keller Jordan, kellerjordan.github.io/posts/muon) steps along the orthogonalised momentum of a matrix: five
Newton-Schulz iterations in bf16. Orthogonal is a property of the whole matrix, so each is handed over whole and alone,
and its bits depend on nothing else; ranks that each hold all parameters therefore agree. (Steps over matrices that are
cut, or batched by owner, gave other bits for each number of ranks.) The arithmetic is torch's own `torch.optim.Muon`.

A tensor may hold several matrices: an expert of a layer is one, and so are the queries, keys and values of one
projection, which Jordan found to train better apart. Embeddings, the output matrix, positions, routers, norms and
biases are AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from train.config import Optimizer
from train.flat import Flat, Range, layer


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


class Muon(torch.optim.Optimizer):
    """Both, over a layout whose every parameter this rank owns.

    Moments stand by stretch of the layout, as AdamW's do by itself, so that checkpoints and checksums need no cases.
    """

    def __init__(
        self, config: Optimizer, flat: Flat, adamw: Callable[[Optimizer, Flat], torch.optim.Optimizer]
    ) -> None:
        """Cuts `flat.owned` into Muon's stretches, and AdamW's two kinds, with decay and without."""
        cut = [(mine, start, flat.stretch(start, end).requires_grad_()) for mine, (start, end) in runs(flat)]
        stretches = [(start, tensor) for mine, start, tensor in cut if mine]
        rest, vectors = [(start, tensor) for mine, start, tensor in cut if not mine], flat.owned[-1]
        flat.owned = [rest, vectors]
        self._adamw = adamw(config, flat)
        flat.owned = [rest, vectors, stretches]
        moments = {tensor: torch.zeros_like(tensor, requires_grad=False) for _, tensor in stretches}
        self._parts: list[tuple[Tensor, int, Tensor]] = []  # a stretch, where in it a matrix begins, the matrix
        of_torch: dict[Tensor, Tensor] = {}
        for begin, rows, columns in matrices(flat):
            start, stretch = next((s, t) for s, t in stretches if s <= begin < s + t.numel())
            inside = slice(begin - start, begin - start + rows * columns)
            matrix = stretch.detach()[inside].view(rows, columns).requires_grad_()
            self._parts.append((stretch, inside.start, matrix))
            of_torch[matrix] = moments[stretch][inside].view(rows, columns)
        self._muon = torch.optim.Muon(
            [{"params": list(of_torch), "scale": config.muon_lr / config.lr}],
            lr=config.muon_lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )
        for matrix, moment in of_torch.items():
            self._muon.state[matrix]["momentum_buffer"] = moment
        super().__init__([*self._adamw.param_groups, *self._muon.param_groups], {})
        self.state.update(self._adamw.state)
        self.state.update({tensor: {"momentum_buffer": moment} for tensor, moment in moments.items()})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for stretch, begin, matrix in self._parts:
            assert stretch.grad is not None
            matrix.grad = stretch.grad[begin : begin + matrix.numel()].view_as(matrix)
        self._muon.step()  # type: ignore[no-untyped-call]
        self._adamw.step()
