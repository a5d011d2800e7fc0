"""Optimizers over the flat layout, and the learning rate as a pure function of the step.

AdamW (arXiv 1711.05101) runs fused over what this rank owns of the flat tensor's two sections: matrices, with decoupled
weight decay, and vectors (norms, biases), without. It is elementwise, and cuts lie at multiples of 1,024 elements, so
one long tensor gives the same bits as the many that it is made of. Muon is in `muon.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from train.config import Optimizer, OptimizerKind, Schedule, ScheduleKind
from train.flat import Flat, Piece
from train.muon import Muon
from train.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # in the order in which torch's function takes them


class AdamW:
    """torch's function without the base class of its optimizers, which imports torch's compiler: 2 s of each start."""

    def __init__(self, config: Optimizer, flat: Flat) -> None:
        matrices, vectors = ([tensor for _, tensor in half] for half in flat.owned)
        decays, rate = ((matrices, config.weight_decay), (vectors, 0.0)), {"lr": config.lr}
        self.param_groups: list[dict[str, Any]] = [{"params": p, "weight_decay": decay, **rate} for p, decay in decays]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        for one in [*matrices, *vectors]:  # from the start, so that saving and restoring need no cases
            self.state[one] = {name: torch.zeros_like(one, requires_grad=False) for name in MOMENTS[:2]}
            self.state[one]["step"] = torch.zeros((), dtype=torch.float32, device=one.device)
        self._fixed: dict[str, Any] = {"beta1": config.beta1, "beta2": config.beta2, "eps": config.eps}
        self._fixed |= {"fused": True, "amsgrad": False, "maximize": False}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            tensors, settings = group["params"], {key: group[key] for key in ("lr", "weight_decay")}
            averages, squares, steps = ([self.state[one][name] for one in tensors] for name in MOMENTS)
            adamw(tensors, [one.grad for one in tensors], averages, squares, [], steps, **settings, **self._fixed)


def build(config: Optimizer, flat: Flat, ranks: Ranks | None = None) -> AdamW | Muon:
    """`ranks` are those that share the state in `flat`; none, where this one has it all."""
    if config.kind is OptimizerKind.muon:
        return Muon(config, flat, ranks or Ranks(0, 1, torch.device("cpu")), AdamW)
    return AdamW(config, flat)


def pieces(optimizer: AdamW | Muon, flat: Flat) -> list[Piece]:
    """The optimizer's moments that this rank holds, by their name and the parameter's."""
    replicated = flat.ranges == [(0, flat.size)]
    return [
        piece
        for half in flat.owned
        for start, tensor in half
        for moment, values in optimizer.state[tensor].items()
        if moment != "step"
        for piece in flat.named_parts("optimizer", f"{moment}.", start, values, replicated)
    ]


class Stored:
    """All numbers of the state that this rank holds, as 1-D views into it."""

    def __init__(self, optimizer: AdamW | Muon, flat: Flat) -> None:
        self._optimizer, self._flat = optimizer, flat

    def parameters(self) -> list[tuple[int, Tensor]]:
        """Each with where it begins in the flat layout."""
        return self._flat.held()

    def moments(self) -> list[tuple[int, Tensor]]:
        owned = [(start, self._optimizer.state[tensor]) for half in self._flat.owned for start, tensor in half]
        return [(start, state[name]) for start, state in owned for name in state if name != "step"]

    def gradients(self) -> list[Tensor]:
        """Of the leaf that is being computed, a tensor each parameter."""
        return [parameter.grad for parameter in self._flat.items if parameter.grad is not None]

    def checksum(self, tensors: list[tuple[int, Tensor]] | None = None) -> int:
        """64 bits of these tensors, or of all. A single changed bit always changes them: all weights are odd."""
        tensors = self.parameters() + self.moments() if tensors is None else tensors
        parts = [self._flat.checksum(tensor, start).sum() for start, tensor in tensors]
        return int(sum((2 * i + 1) * part for i, part in enumerate(parts)))


def set_step(optimizer: AdamW | Muon, step: int) -> None:
    """How many updates the moments have seen: Adam's bias correction depends on it."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)


def set_learning_rate(optimizer: AdamW | Muon | torch.optim.Optimizer, rate: float) -> None:
    """`rate` is that of `optimizer.lr`; a group with a `scale` has so many times as much."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1)


def learning_rate(optimizer: Optimizer, schedule: Schedule, step: int, steps: int) -> float:
    """The rate of step 0 … steps-1.

    All schedules warm up linearly over `warmup_steps`. Then `constant` stays; `cosine` falls to `floor` along half a
    cosine (arXiv 1608.03983); `wsd` stays until the last `decay` share of the steps, then falls to `floor` in a
    straight line (arXiv 2404.06395).
    """
    if step < schedule.warmup_steps:
        return optimizer.lr * (step + 1) / (schedule.warmup_steps + 1)
    match schedule.kind:
        case ScheduleKind.constant:
            share = 1.0
        case ScheduleKind.cosine:
            progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
            share = 0.5 * (1 + math.cos(math.pi * progress))
        case ScheduleKind.wsd:
            share = min(1.0, (steps - step) / max(1.0, schedule.decay * steps))
    return optimizer.lr * (schedule.floor + (1 - schedule.floor) * share)
