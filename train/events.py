"""The run's record: what happened, one JSON object a line.

A run is described by its events and by nothing else: the console, the summary and every report are computed from
them. Ranks send theirs to the supervisor, which is the only writer of the file. A line is written with one `write`,
so that a crash can tear only the last one; a torn last line is cut before the next append. A number that is not
finite becomes null, because JSON has no NaN.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from train.checks import MALFORMED, require


@dataclass(slots=True, kw_only=True)
class Event:
    kind: ClassVar[str] = ""
    time: float = field(default_factory=time.time)  # Unix seconds

    def __init_subclass__(cls, kind: str = "") -> None:
        cls.kind = kind or cls.kind  # `slots` makes each class anew, without this argument

    def record(self) -> dict[str, Any]:
        return {"time": self.time, "kind": self.kind, **asdict(self)}


@dataclass(slots=True, kw_only=True)
class Launch(Event, kind="launch"):
    """The supervisor begins to start ranks: so many are wanted from here on."""

    world: int
    again: bool  # all of them anew after a loss; else the command was given


@dataclass(slots=True, kw_only=True)
class Start(Event, kind="start"):
    """The ranks are up and the state is in place: what runs, where, from which step."""

    step: int
    world: int
    virtual_ranks: int
    micro_batch: int
    micro_batches: int
    device: str
    peak_flops: float | None  # of all ranks together
    peak_source: str
    precision: str
    compiled: bool
    parameters: int
    flops_per_token: float
    memory_bytes: int  # expected, a rank
    tokens_per_step: int
    steps: int
    fingerprint: dict[str, Any]
    identity: dict[str, Any]  # the settings that have a say in the result, flattened: they may change at a restart


@dataclass(slots=True, kw_only=True)
class Step(Event, kind="step"):
    """A committed step. `tokens` is cumulative; `seconds` is the time since the step before."""

    step: int
    loss: float  # nats per token
    loss_hex: str  # the same number, every bit of it
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    world: int


@dataclass(slots=True, kw_only=True)
class Digests(Event, kind="digests"):
    """Checksums of a committed step, 16 hexadecimal digits each: evidence of what it was computed from."""

    step: int
    tokens: list[str]  # by virtual rank
    leaves: list[str]  # by virtual rank: of its gradient
    parameters: list[str]  # before the step; one in all, or one a parameter in the flat layout's order
    gradient: list[str]  # of the sum


@dataclass(slots=True, kw_only=True)
class Handshake(Event, kind="handshake"):
    """All ranks computed one same micro-batch; `digests` by rank. Unequal: the law does not hold between them."""

    step: int
    equal: bool
    digests: list[str]
    seconds: list[float]  # by rank


@dataclass(slots=True, kw_only=True)
class Ownership(Event, kind="ownership"):
    """From here on each rank hosts so many virtual ranks, in this order."""

    step: int
    shares: list[int]
    why: str


@dataclass(slots=True, kw_only=True)
class Profiled(Event, kind="profiled"):
    """Where the time of so many steps went on rank 0, and what to open in Perfetto."""

    step: int
    steps: int
    parts: dict[str, float]  # seconds of a step: they add up to it
    trace: str


@dataclass(slots=True, kw_only=True)
class Throughput(Event, kind="throughput"):
    """A logging step: what the steps since the last one achieved."""

    step: int
    tokens_per_s: float
    mfu: float | None  # model FLOP/s as a share of the devices' dense peak
    memory_bytes: int  # peak of rank 0's process on a CPU, of its allocator on a GPU
    watts: float | None = None  # of rank 0's GPU, or of the CPU packages of its machine; None: no meter
    waiting: list[float] = field(default_factory=list)  # by rank: the share of the time; [] of one rank


@dataclass(slots=True, kw_only=True)
class Routing(Event, kind="routing"):
    """A logging step of a model with experts: where all tokens of its global batch went."""

    step: int
    experts: list[list[int]]  # by layer: how often each was chosen
    balance: float  # the load-balancing loss, 1 where even; mean of layers and micro-batches
    router_z: float  # the router's z-loss, likewise


@dataclass(slots=True, kw_only=True)
class Evaluated(Event, kind="eval"):
    step: int
    loss: float  # nats per token
    bpb: float | None  # bits per byte; None where the corpus has no bytes to count
    tokens: int
    whole: bool  # the whole validation set, not a part of it
    seconds: float
    experts: list[list[int]] = field(default_factory=list)  # by layer: how often each was chosen
    balance: float | None = None  # the load-balancing loss, 1 where even; mean of layers and micro-batches
    router_z: float | None = None  # the router's z-loss, likewise
    sample: str = ""


@dataclass(slots=True, kw_only=True)
class Saved(Event, kind="checkpoint"):
    step: int
    path: str
    bytes: int
    seconds: float  # that the step waited
    wall: float  # until it was whole on the disk


@dataclass(slots=True, kw_only=True)
class Restored(Event, kind="restore"):
    step: int
    path: str
    refused: list[str]  # checkpoints that were damaged, and how


@dataclass(slots=True, kw_only=True)
class Fault(Event, kind="fault"):
    """Something died or went wrong: which process (its number as a member), in which phase of which step, and why."""

    fault: str
    phase: str
    rank: int
    step: int | None
    cause: str
    flight: dict[str, str] = field(default_factory=dict)  # of a hang: where each process was, by its number


@dataclass(slots=True, kw_only=True)
class Ready(Event, kind="ready"):
    """A new process could take part: it waits to be made a member."""

    rank: int


@dataclass(slots=True, kw_only=True)
class Regroup(Event, kind="regroup"):
    """The ranks have changed and go on, all with the state after `step`."""

    step: int
    epoch: int
    members: list[int]  # by rank
    world: int
    why: str  # "lost", "joined", "resized"
    kept: int  # virtual ranks of the step in flight that need not be computed again
    redone: int  # those that must
    seconds: float  # for rank 0, from when it knew to here


@dataclass(slots=True, kw_only=True)
class Injected(Event, kind="injected"):
    """A fault on order, said before it strikes: `id` is the injection's in the plan, `rank` the one it names there."""

    id: str
    fault: str
    rank: int
    member: int  # the process that it strikes
    phase: str
    step: int


@dataclass(slots=True, kw_only=True)
class Warned(Event, kind="warning"):
    rank: int
    text: str
    step: int | None = None  # of the checkpoint, where it is about one


@dataclass(slots=True, kw_only=True)
class Slow(Event, kind="slow"):
    """A rank takes much longer than the others for the same work."""

    rank: int
    step: int
    times: float  # as long as the median rank


@dataclass(slots=True, kw_only=True)
class Audited(Event, kind="audit"):
    """Two ranks did not compute the same bits; one of them is wrong."""

    step: int
    virtual_rank: int
    suspects: list[int]


@dataclass(slots=True, kw_only=True)
class RolledBack(Event, kind="rollback"):
    """The loss of a step cannot be right: all starts again from before it."""

    step: int
    left_out: list[int]  # batches, which no step sees any more


@dataclass(slots=True, kw_only=True)
class Asked(Event, kind="asked"):
    """Somebody wants the run to save and stop."""

    rank: int | None  # the one that was told; None: the supervisor
    by: str  # the signal's name, or stop_after=…


@dataclass(slots=True, kw_only=True)
class Finished(Event, kind="end"):
    """What rank 0 says at the end of a run, or of a part of it; the summary is made from it."""

    step: int
    stopped: bool  # on request, before the last step
    state_sha256: str
    sample: str = ""
    yardsticks: dict[str, float | None] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Left(Event, kind="left"):
    """The last word of every rank that ended by itself."""

    rank: int
    step: int
    stopped: bool


def line(record: dict[str, Any]) -> str:
    """One event as one line of JSON, without its newline."""
    return json.dumps(_finite(record), allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class EventLog:
    """The append side. Not shared between processes."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._cut_torn_line()
        self._waiting = b""

    def _cut_torn_line(self) -> None:
        end = size = os.fstat(self._file).st_size
        while end > 0:
            start = max(0, end - 65_536)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._file, end)

    def append(self, record: dict[str, Any]) -> None:
        """What does not fit on a full disk waits for the next event: the record of a run must not end it."""
        self._waiting += line(record).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            self._waiting = self._waiting[os.write(self._file, self._waiting) :]

    def sync(self) -> None:
        """Have it on the disk, if there is room."""
        self._write()
        with contextlib.suppress(OSError):  # where a network's disk says that it is full
            os.fsync(self._file)

    def close(self) -> None:
        self._write()
        os.close(self._file)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file, oldest first, but for a torn last line. Raises Refused at any other line that is none."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.endswith(b"\n"):
                try:
                    event = json.loads(raw)
                    sound = isinstance(event["kind"], str)
                except MALFORMED:
                    sound = False
                require(sound, f"{path}:{number}", "is no event of a run: remove this line")
                yield event
