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
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from train import events
from train.channel import Channel
from train.faults.plan import Injection
from train.optim import Stored

Phase = Callable[[str, int], None]  # takes a phase's name and the steps committed
EXIT = 3  # the exit code of a rank that leaves without a word


class Seat(Protocol):
    """A rank's place among those that there are now."""

    rank: int
    world: int


def armed(
    planned: Sequence[Injection],
    seat: Seat,
    wanted: int,
    member: int,
    channel: Channel,
    record: Path,
    stored: Stored | None = None,
) -> Phase:
    """What the loop calls at each phase: the channel's, with an injector behind it where faults are planned.

    `wanted`: ranks that the run shall have. `record`: its events. `stored`: the rank's state, whose bits may flip.
    """
    return Injector(planned, seat, wanted, member, channel, record, stored) if planned else channel.phase


class Injector:
    def __init__(
        self,
        planned: Sequence[Injection],
        seat: Seat,
        wanted: int,
        member: int,
        channel: Channel,
        record: Path,
        stored: Stored | None,
    ) -> None:
        self._seat, self._wanted, self._member, self._stored = seat, wanted, member, stored
        self._channel, self._record = channel, record
        self._ahead = [(one, rank) for one in planned for rank in one.ranks]  # by step
        self._factor, self._slow_until = 1.0, 0
        self._computing, self._since = False, 0.0

    def __call__(self, phase: str, step: int) -> None:
        self._channel.phase(phase, step)
        self._drag(phase, step)
        while (due := self._due(phase, step)) and self._struck(*due):
            pass  # elsewhere, and forgotten here
        if due:
            self._strike(*due, phase, step)

    def _due(self, phase: str, step: int) -> tuple[Injection, int] | None:
        for one, rank in self._ahead:
            if one.step > step:
                break
            if one.phase == phase and rank % self._seat.world == self._seat.rank and not self._takes_all(one):
                return one, rank
        return None

    def _takes_all(self, one: Injection) -> bool:
        """Whether nobody would be left, though not all ranks were meant: then it waits until more are back."""
        places = {rank % self._seat.world for rank in one.ranks}
        return len(places) == self._seat.world and len(one.ranks) < self._wanted

    def _struck(self, one: Injection, rank: int) -> bool:
        with self._record.open("rb") as lines:
            injected = [json.loads(line) for line in lines if b'"injected"' in line and line.endswith(b"\n")]
        past = {(record["id"], record["rank"]) for record in injected}
        self._ahead = [(one, rank) for one, rank in self._ahead if (one.id, rank) not in past]
        return (one.id, rank) in past

    def _strike(self, one: Injection, rank: int, phase: str, step: int) -> None:
        self._ahead.remove((one, rank))
        said = events.Injected(id=one.id, fault=one.kind, rank=rank, member=self._member, phase=phase, step=step)
        self._channel.send(said)
        self._channel.settle()
        if one.kind == "slow":
            self._factor, self._slow_until = one.amount, step + one.steps
        elif one.kind == "flip" and self._stored is not None:
            flip([tensor for _, tensor in self._stored.tensors()], int(one.amount), one.id)
        elif one.kind == "nan" and self._stored is not None:
            self._stored.gradients()[0].view(-1)[0] = float("nan")
        elif one.kind == "sdc" and self._stored is not None:
            self._stored.gradients()[0].view(-1)[0] += 0.01  # silent data corruption: a plausible wrong number
        elif one.kind == "exception":
            raise RuntimeError(f"a fault on order, {one.id.partition('#')[0]}")  # of two alike the cause is the same
        else:
            STRIKES[one.kind](one.amount)

    def _drag(self, phase: str, step: int) -> None:
        """A slow rank: what it computed since the last phase takes so much longer; waiting for others does not."""
        if self._computing and step < self._slow_until and phase != "regroup":
            time.sleep((time.perf_counter() - self._since) * (self._factor - 1))
        self._computing, self._since = phase in ("forward", "backward"), time.perf_counter()


def flip(tensors: Sequence[Tensor], bits: int, seed: str) -> None:
    """Turn over so many bits of these tensors, which `seed` chooses; all bits are alike."""
    rng, sizes = random.Random(seed), [tensor.numel() for tensor in tensors]
    for _ in range(bits):
        (tensor,) = rng.choices(tensors, sizes)
        tensor.view(torch.uint8)[rng.randrange(4 * tensor.numel())] ^= 1 << rng.randrange(8)


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
