"""Signs of life: how a rank that hangs is told from one that waits for it, or has much to do.

A rank notes the time in a few bytes of memory that it shares with the supervisor, whenever it comes to another phase
and in every slice of a wait for others: so whoever waits is alive, and who is silent is the culprit. How long silence
may last is learnt, by phase: many times the longest that was seen there, more where only others were seen, and at
least a few seconds.

Beside it stands which collective it waits for, or has come out of last, and since when: of all ranks together, at the
moment when one is found to hang, that is the flight record of who waited for whom.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config import Train
from train.flops import flops_per_token

LAYOUT = struct.Struct("dd16s")  # time of the last sign (monotonic); seconds of silence that are in order; phase
FLIGHT = struct.Struct("d80s")  # since when a rank has been at what stands there
LEAST = 4.0  # seconds of silence that are always in order
OFTEN = 5.0  # times the longest silence seen in the phase
OFTENER = 50.0  # in a phase that is new: times the longest seen in any other
AT_FIRST = 600.0  # where none was seen yet
COMPILED = ("forward", "backward")  # whose first time tells nothing of others, and others nothing of it
COLD = 30.0  # for caches, in the first of these on a CPU; compilers and GPUs take up to AT_FIRST
SLOWEST = 1e9  # FLOP/s of a rank: what is slower than this is taken for silent
UNWATCHED = ("start", "end")  # model building, last words: they take what they take


def first(config: Train, vocab: int) -> float:
    """Seconds that the first forward or backward pass of a process may last."""
    flops = flops_per_token(config.model, vocab) * config.model.context * int(config.batch.micro_batch)
    return (COLD if config.accelerator == "cpu" and not config.compile else AT_FIRST) + flops / SLOWEST


def create(path: Path) -> mmap.mmap:
    """The supervisor's side of a rank's pulse."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(LAYOUT.pack(time.monotonic(), float("inf"), b"start") + FLIGHT.pack(time.monotonic(), b""))
    return _map(path)


def _map(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), LAYOUT.size + FLIGHT.size)


def last(memory: mmap.mmap) -> float:
    """When a rank has given its last sign of life, on the monotonic clock."""
    return float(_read(memory, LAYOUT, 0)[0])


def silent(memory: mmap.mmap, since: float = 0.0) -> tuple[float, str] | None:
    """For how many seconds a rank has given no sign of life, and in which phase, if that is too long; else None.

    What was before `since`, on the monotonic clock, does not count.
    """
    last, limit, phase = _read(memory, LAYOUT, 0)
    seconds = time.monotonic() - max(last, since)
    return (seconds, phase.rstrip(b"\0").decode()) if seconds > limit else None


def flight(memory: mmap.mmap) -> str:
    """Where a rank is: in which phase, at or after which collective, for how long; and when it was last heard of."""
    (last, _, phase), (since, doing) = _read(memory, LAYOUT, 0), _read(memory, FLIGHT, LAYOUT.size)
    where, what = (text.rstrip(b"\0").decode(errors="replace") for text in (phase, doing))
    now = time.monotonic()
    return f"{where}: {what}, for {now - since:.1f} s; last sign of life {now - last:.1f} s ago"


def _read(memory: mmap.mmap, layout: struct.Struct, at: int) -> tuple[Any, ...]:
    while (content := memory[at : at + layout.size]) != memory[at : at + layout.size]:
        pass  # it is being written just now
    return layout.unpack(content)


class Pulse:
    """A rank's side."""

    def __init__(self, path: Path) -> None:
        """Both sides have it now, and nothing stays behind in the folder."""
        self._memory = _map(path)
        path.unlink()
        self._last, self._phase = time.monotonic(), "start"
        self._longest: dict[str, float] = {}
        self.doing: Callable[[], str] = str  # says which collective this rank is at; nothing yet
        self._told = ""
        self.first = AT_FIRST  # what `first` says, once there is a configuration
        self.heavier: dict[str, float] = {}  # phase -> times the sequences of a micro-batch that are computed at once

    def beat(self, phase: str | None = None) -> None:
        """A sign of life, in a phase that begins or, without one, in the phase that goes on."""
        now = time.monotonic()
        if self._phase not in UNWATCHED:
            self._longest[self._phase] = max(self._longest.get(self._phase, 0.0), now - self._last)
        self._last, self._phase = now, phase or self._phase
        # Not `pack_into`, which first writes zeros, for the reader to see: a sign of life from long ago.
        self._memory[: LAYOUT.size] = LAYOUT.pack(now, self._limit(), self._phase[:16].encode())
        if (doing := self.doing()) != self._told:
            self._memory[LAYOUT.size :] = FLIGHT.pack(now, doing.encode()[:80])
            self._told = doing

    def _limit(self) -> float:
        if self._phase in UNWATCHED:
            return float("inf")
        if self._phase in self._longest:
            pass_ = max(self._longest.get(phase, 0.0) for phase in COMPILED)
            return max(LEAST, OFTEN * max(self._longest[self._phase], self.heavier.get(self._phase, 0.0) * pass_))
        if self._phase in COMPILED:
            return self.first
        if not self._longest:
            return AT_FIRST
        return max(LEAST, OFTENER * max(self._longest.values()))
