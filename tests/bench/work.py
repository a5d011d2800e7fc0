"""The work that contestants do alike, and how they take turns at it.

The same work is: the same initial weights (the names of `train.models.hf`), rows of context + 1 tokens in the same
order, AdamW with the same numbers and decay on matrices alone, clipping at 1, a constant rate. All of it is said by one
configuration of ours, a `Job`. A contestant builds its trainer as its own documentation says, from the job's weights,
rows and settings; calls `turns.begin` with its number of parameters; and trains for ever, calling `turns.ended(loss)`
after each step with the mean loss of the tokens that this rank saw. Both calls wait for the contestant's next turn.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train import compose, plan
from train.config import Train
from train.models.build import build


@functools.cache  # composing takes half a second, which no contestant may pay in a step
def composed(overrides: tuple[str, ...]) -> Train:
    return plan.resolve(compose.config("train", list(overrides)))


@dataclass(frozen=True, slots=True)
class Job:
    """What a contestant is told."""

    overrides: tuple[str, ...]  # of our configuration, from which all the numbers come
    folder: str  # of this contestant alone
    rows: str  # uint16, (sequences, context + 1) without end
    nanogpt: str  # a checkout, or nothing
    vocab: int
    threads: int
    rank: int
    world: int
    port: int
    compiled: bool = False

    @property
    def config(self) -> Train:
        return composed(self.overrides)

    @property
    def piece(self) -> int:
        """Sequences of a micro-batch."""
        return int(self.config.batch.micro_batch)

    @property
    def pieces(self) -> int:
        """Micro-batches a step, of a rank."""
        return self.config.batch.sequences // self.world // self.piece

    def read(self) -> np.ndarray[Any, np.dtype[np.uint16]]:
        return np.memmap(self.rows, np.uint16, "r").reshape(-1, self.config.model.context + 1)

    def weights(self) -> dict[str, Tensor]:
        """The initial weights under our names."""
        config = self.config
        return dict(build(config.model, self.vocab, seed=config.seed, device=torch.device("cpu")).named_parameters())


class Turns:
    """A contestant's end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._left, self._losses = pipe, 0, list[Tensor | float]()

    def begin(self, parameters: int) -> None:
        self._pipe.send({"parameters": parameters})
        self._wait()

    def ended(self, loss: Tensor | float) -> None:
        self._losses.append(loss)
        self._left -= 1
        if not self._left:
            losses = [float(loss) for loss in self._losses]
            self._pipe.send({"seconds": time.perf_counter() - self._began, "losses": losses})
            self._losses.clear()
            self._wait()

    def _wait(self) -> None:
        try:
            self._left = self._pipe.recv()
        except EOFError:
            os._exit(0)  # out of a loop that knows no other way to end
        self._began = time.perf_counter()


def by_decay(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Decay on matrices alone, as we have it, nanoGPT, and Trainer."""
    listed = list(parameters)
    return [
        {"params": [p for p in listed if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in listed if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(config: Train, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    o = config.optimizer
    return torch.optim.AdamW(
        by_decay(parameters, o.weight_decay), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=True
    )


def renamed(ours: str, names: dict[str, str]) -> str:
    """A parameter's name in another's model: `names` has beginnings and, with a dot in front, what stands anywhere."""
    for old, new in names.items():
        if ours.startswith(old) or old[0] == ".":
            ours = ours.replace(old, new)
    return ours


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
