"""What a rank can see of its own bits.

A bit that flips in a stored weight or moment makes no noise: the loss goes on, a little wrong, on all ranks, since
they all add what the sick one computed. So each rank takes a checksum of its state when a step is committed, and again
before anything made from that state can count: before its sum is complete, before the optimizer changes it, before it
is saved or handed on. A rank whose state has changed in between says so and ends; what it computed is lost with it,
and the others go on as after any other loss. That needs no second copy, no majority and no neighbour.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from train.channel import Channel
from train.config import Train
from train.evidence import word
from train.faults.inject import Injector, Phase
from train.faults.plan import plan
from train.optim import Stored
from train.ranks import Ranks

CHECKED = ("reduce", "optimizer", "evaluation", "checkpoint", "regroup")


class Corrupted(Exception):
    """This rank's state is not what it was when the last step was committed."""

    fault = "corrupted"


def watched(config: Train, ranks: Ranks, member: int, channel: Channel, record: Path, stored: Stored) -> Phase:
    """What is called at each phase of a rank: the channel, faults on order behind it, and the guard around both.

    `record`: the run's events. On a GPU there is no guard: to read its checksum would wait for the device.
    """
    planned, wanted = plan(config), int(config.devices) * config.least_nodes
    phase = Injector(planned, ranks, wanted, member, channel, record, stored) if planned else channel.phase
    if not config.recovery.guard or config.accelerator != "cpu":
        return phase
    return Guard(phase, lambda: stored.checksum(stored.parameters()), lambda: stored.checksum(stored.moments()))


class Guard:
    """A rank's watch over the bits that it holds, called at each phase."""

    def __init__(self, phase: Phase, parameters: Callable[[], int], moments: Callable[[], int]) -> None:
        """`phase`: what else is called. The others: checksums of what this rank holds, 64 bits each."""
        self._phase, self._parameters, self._moments = phase, parameters, moments
        self._taken: tuple[int, int] | None = None
        self._step = 0  # how many steps were committed when it was taken

    def __call__(self, phase: str, step: int) -> None:
        if phase == "commit":
            self._take(step + 1)
        elif phase == "forward" and self._taken is None:  # after a start, or a regroup that may have brought the state
            self._take(step)
        self._phase(phase, step)
        if phase in CHECKED and self._step == step:
            self._check(phase)
        if phase == "regroup":
            self._taken = None

    def _take(self, step: int) -> None:
        self._taken, self._step = (self._parameters(), self._moments()), step

    def _check(self, phase: str) -> None:
        if self._taken is None:
            return
        moments = self._taken[1] if phase == "reduce" else self._moments()  # which no gradient is made from
        now = self._parameters(), moments
        if now != self._taken:
            was, found = (" ".join(map(word, pair)) for pair in (self._taken, now))
            raise Corrupted(f"bits of the state changed before {phase}: checksums {was}, now {found}")
