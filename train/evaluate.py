"""Evaluation: nats over a fixed validation set, shared by all ranks, equal to the bit for any number of them.

Micro-batch i is computed by rank i mod W and its sum put in place i of a vector that is zero elsewhere; adding zeros is
exact, and the vector's sum is rounded once (`math.fsum`), so it does not matter who computed what. How often each
expert was chosen is counted in integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn

from train import trained
from train.commands import Evaluate
from train.data.prepare import whole
from train.data.stream import IGNORED, Validation
from train.flat import to_device
from train.folder import locate
from train.models.experts import Router, watched


@dataclass(frozen=True, slots=True)
class Score:
    nats: float  # over all tokens
    tokens: int
    bytes: int | None  # None where the corpus has no bytes to count
    experts: list[list[int]]  # by layer: how often each was chosen
    balance: float | None  # the load-balancing loss, mean of layers and micro-batches; None without experts
    router_z: float | None  # the router's z-loss, likewise

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Of a token; other tokens have another one."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bpb(self) -> float | None:
        """Bits per byte: nats over all tokens, ends of documents included / ln 2 / UTF-8 bytes."""
        return None if not self.bytes else self.nats / math.log(2) / self.bytes


@torch.no_grad()
def evaluate(
    model: nn.Module, validation: Validation, fabric: Fabric, beat: Callable[[], object] = lambda: None
) -> Score:
    """The score on all ranks together; `beat` is called with every micro-batch."""
    was_training = model.training
    model.eval()
    layers = [module.weight.size(0) for module in model.modules() if isinstance(module, Router)]
    counts = torch.zeros(len(layers), max(layers, default=0), dtype=torch.int64, device=fabric.device)
    sums = torch.zeros(validation.micro_batches, 3, dtype=torch.float64, device=fabric.device)
    last = validation.micro_batches - 1
    for first in range(0, last + 1, fabric.world_size):
        # As many on every rank, since they may need each other to gather parameters: what is too much is not counted.
        beat()
        i = first + fabric.global_rank
        read = map(torch.from_numpy, validation.micro_batch(min(i, last)))
        inputs, targets = (to_device(side, fabric.device) for side in read)
        with fabric.autocast(), watched(model) as routings:
            nats = model(inputs, targets)
        if i <= last:
            sums[i, 0] = nats
            for layer, routing in enumerate(routings):
                scored = routing.chosen_NK[targets.flatten() != IGNORED]
                counts[layer] += torch.bincount(scored.flatten(), minlength=counts.size(1))
                sums[i, 1:] += torch.stack((routing.balance, routing.z)) / len(layers)
    sums, counts = fabric.strategy.all_reduce(sums), fabric.strategy.all_reduce(counts) if layers else counts
    model.train(was_training)
    nats, balance, z = (math.fsum(column) for column in zip(*sums.tolist(), strict=True))
    means = (balance / validation.micro_batches, z / validation.micro_batches) if layers else (None, None)
    return Score(nats, validation.counted, validation.bytes, counts.tolist(), *means)


def main(config: Evaluate) -> int:
    """`colossus eval`: the score of a run's model, on its own validation set or on `data`, beside gzip's."""
    on = trained.device(config.accelerator)
    run = trained.load(locate(config.run), config.step, on)
    context, size = run.config.model.context, config.micro_batch
    prepared = whole(config.data, run.prepared.tokenizer) if config.data else run.prepared
    validation = Validation(prepared, context=context, tokens=config.tokens, micro_batch=size)
    score = evaluate(run.model, validation, trained.fabric(run, on))
    facts: dict[str, Any] = {"run": config.run, "step": run.step, "loss": score.loss, "bpb": score.bpb}
    facts |= {"perplexity": score.perplexity, "tokens": score.tokens, "bytes": score.bytes, **validation.yardsticks()}
    if score.experts:
        facts |= {"balance": score.balance, "router_z": score.router_z, "experts": score.experts}
    config.format.tell(facts, _show)
    return 0


def _show(facts: dict[str, Any]) -> None:
    meaning = {
        "loss": "nats per token",
        "bpb": "bits per byte",
        "perplexity": "perplexity of a token",
        "gzip_windows": "gzip -9, windows of the context",
    }
    meaning |= {"gzip_documents": "gzip -9, whole documents", "balance": "load-balancing loss (1: even)"}
    meaning |= {"router_z": "router z-loss", "experts": "experts chosen, by layer"}
    for key, value in facts.items():
        shown = f"{value:.4f}" if isinstance(value, float) else "n/a" if value is None else str(value)
        print(f"{meaning.get(key, key):32} {shown}")
