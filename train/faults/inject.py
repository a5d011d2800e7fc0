"""How faults on order strike: at the phases of the loop, in the rank that the plan names, and once in a run's life.

What has struck is read from the run's record, where it is written before it strikes. So a step that is computed again,
a replacement, another process that has come to the same place, or the run's next start do not suffer it twice.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from train import events
from train.channel import Channel
from train.faults.plan import Injection
from train.optim import Stored
from train.ranks import Ranks

Phase = Callable[[str, int], None]  # takes a phase's name and the steps committed
EXIT = 3  # the exit code of a rank that leaves without a word
BEAT = 1.0  # seconds between a slow rank's signs of life


@dataclass(slots=True, eq=False)
class Injector:
    """What the loop calls at each phase where faults are planned: the channel, and then what is due."""

    planned: InitVar[Sequence[Injection]]
    ranks: Ranks  # that there are now
    wanted: int  # ranks that the run shall have
    member: int
    channel: Channel
    record: Path  # the run's events
    stored: Stored | None = None  # the rank's state, whose bits may flip
    ahead: list[tuple[Injection, int]] = field(init=False)  # with the rank that each is for, by step
    factor: float = field(init=False, default=1.0)
    slow_until: int = field(init=False, default=0)
    computing: bool = field(init=False, default=False)
    since: float = field(init=False, default=0.0)

    def __post_init__(self, planned: Sequence[Injection]) -> None:
        self.ahead = [(one, rank) for one in planned for rank in one.ranks]

    def __call__(self, phase: str, step: int) -> None:
        self.channel.phase(phase, step)
        self._drag(phase, step)
        while (due := self._due(phase, step)) and self._struck(*due):
            pass  # elsewhere, and forgotten here
        if due:
            self._strike(*due, phase, step)

    def _due(self, phase: str, step: int) -> tuple[Injection, int] | None:
        for one, rank in self.ahead:
            if one.step > step:
                break
            if one.phase == phase and rank % self.ranks.world == self.ranks.rank and not self._takes_all(one):
                return one, rank
        return None

    def _takes_all(self, one: Injection) -> bool:
        """Whether nobody would be left, though not all ranks were meant: then it waits until more are back."""
        places = {rank % self.ranks.world for rank in one.ranks}
        return len(places) == self.ranks.world and len(one.ranks) < self.wanted

    def _struck(self, one: Injection, rank: int) -> bool:
        with self.record.open("rb") as lines:
            injected = [json.loads(line) for line in lines if b'"injected"' in line and line.endswith(b"\n")]
        past = {(record["id"], record["rank"]) for record in injected}
        self.ahead = [(one, rank) for one, rank in self.ahead if (one.id, rank) not in past]
        return (one.id, rank) in past

    def _strike(self, one: Injection, rank: int, phase: str, step: int) -> None:
        self.ahead.remove((one, rank))
        said = events.Injected(id=one.id, fault=one.kind, rank=rank, member=self.member, phase=phase, step=step)
        self.channel.send(said)
        self.channel.settle()
        if one.kind == "slow":
            self.factor, self.slow_until = one.amount, step + one.steps
        elif one.kind in IN_MEMORY:
            assert self.stored is not None
            IN_MEMORY[one.kind](self.stored, one)
        elif one.kind == "exception":
            raise RuntimeError(f"a fault on order, {one.id.partition('#')[0]}")  # of two alike the cause is the same
        else:
            STRIKES[one.kind](one.amount)

    def _drag(self, phase: str, step: int) -> None:
        """A slow rank: what it computed since the last phase takes so much longer; waiting for others does not."""
        if self.computing and step < self.slow_until and phase != "regroup":
            now = time.perf_counter()
            until = now + (now - self.since) * (self.factor - 1)
            while (left := until - time.perf_counter()) > 0:
                time.sleep(min(left, BEAT))
                self.channel.pulse.beat()  # who is slow is not silent, however slow
        self.computing, self.since = phase in ("forward", "backward"), time.perf_counter()


def flip(tensors: Sequence[Tensor], bits: int, seed: str) -> None:
    """Turn over so many bits of these tensors, which `seed` chooses; all bits are alike."""
    rng, sizes = random.Random(seed), [tensor.numel() for tensor in tensors]
    for _ in range(bits):
        (tensor,) = rng.choices(tensors, sizes)
        tensor.view(torch.uint8)[rng.randrange(4 * tensor.numel())] ^= 1 << rng.randrange(8)


IN_MEMORY: dict[str, Callable[[Stored, Injection], object]] = {
    "flip": lambda stored, one: flip(
        [tensor for _, tensor in stored.parameters() + stored.moments()], int(one.amount), one.id
    ),
    "nan": lambda stored, one: stored.gradients()[0].view(-1)[:1].fill_(float("nan")),
    "sdc": lambda stored, one: stored.gradients()[0].view(-1)[:1].add_(0.01),  # a plausible wrong number
}


def _crash(_: float) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a hundred of them would fill the disk
    ctypes.string_at(0)


STRIKES: dict[str, Callable[[float], object]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "segv": _crash,
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "gil": lambda seconds: ctypes.PyDLL(None).usleep(int(seconds * 1e6)),  # in C, without letting go of the lock
    "hang": time.sleep,
    "exit": lambda _: os._exit(EXIT),
}
