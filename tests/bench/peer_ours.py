"""Ours among the contestants, and the machine's own limit beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from socket import socket
from typing import Any

import torch
from torch import nn

from tests.bench.loop_overhead import Memory
from tests.bench.work import Job, Turns, count
from train.flops import flops_per_token
from train.group import Place
from train.loop import Due, fit
from train.run import Order, assemble


class Member(Memory):
    """The channel of one rank of several."""

    def __init__(self, path: Path, world: int, port: int) -> None:
        super().__init__(path)
        self._members = {"epoch": 1, "members": list(range(world)), "host": "127.0.0.1", "port": port}

    def membership(self) -> dict[str, Any]:
        return self._members


def ours(job: Job, turns: Turns, listener: socket | None = None) -> None:
    """A rank as `colossus train` assembles it; only the pipe to the supervisor is a list."""
    heals = job.config.heals
    place = Place(member=job.rank, local_rank=job.rank, device="cpu", loopback=True, backend="gloo", heals=heals)
    where: dict[str, Any] = {"folder": job.folder, "record": f"{job.folder}/events.jsonl"}
    order = Order(**where, place=place, threads=job.threads, writer_epoch=1, resume=False, joins=False, left_out=[])
    channel = Member(Path(job.folder) / f"pulse-{job.rank}", job.world, job.port)
    recovery = assemble(job.config, order, channel, listener)
    recovery.regroup()
    state, parts = recovery.state, recovery.parts

    def after(step: int) -> None:
        if step and parts.recorder.last is not None:
            turns.ended(float(parts.recorder.last.numbers[:1].view(torch.float64)))
            parts.recorder.resume_clock()

    turns.begin(count(parts.model) if isinstance(parts.model, nn.Module) else 0)
    fit(state, replace(parts, due=(Due(1, after),)))


def ceiling(job: Job, turns: Turns) -> None:
    """No training: a step's FLOPs, as MFU counts them, as products of 1024 x 1024 matrices. Its ratio is ours' MFU."""
    config = job.config
    a = torch.randn(1024, 1024).to(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    needed = config.tokens_per_step * flops_per_token(config.model, job.vocab) / job.world
    turns.begin(0)
    while True:
        for _ in range(round(needed / (2 * 1024**3))):
            torch.mm(a, a)
        turns.ended(0.0)
