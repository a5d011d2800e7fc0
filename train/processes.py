"""The processes that ranks live in: forked from one forkserver that has imported torch and lightning once.

No torch here. A process gets its orders when it is forked, and from then on through its pipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import mmap
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver as forkservers
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

from train import hardware, nodes, pulse
from train.channel import REQUESTS
from train.config import Train
from train.slots import Spot

PR_SET_PDEATHSIG = 1  # linux/prctl.h
KILLED = 10.0  # seconds after which a process that was killed is given up: its device or disk holds it
LOOKS = 1.0  # seconds between two looks at a rank; who takes longer has stood still itself meanwhile
DUMP = 5.0  # seconds in which a stack is written: a millisecond, if the rank finds a free core


def forkserver(*more: str) -> ForkServerContext:
    """Start the process that ranks are forked from; its imports, and `more`, go on while this one prepares the data.

    It has the requests' signals blocked for life, so that one that goes to all processes of a job does not end it, and
    the ranks with it. A rank begins like that too, and unblocks nothing until there is somebody to heed them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.light", "train.run", "train.supervisor", *more])
    multiprocessing.resource_tracker.ensure_running()  # here, because it leaves these signals unblocked
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return context


def _begin(config: Train, order: str, connection: Connection, listener: socket.socket | None) -> None:
    """Where a forked process begins. Only there is `train.run` imported: this module stays free of torch."""
    importlib.import_module("train.run").worker(config, order, connection, listener)


@dataclass(slots=True, eq=False)
class Rank:
    """A process of this node that is a rank, or is to become one."""

    member: int
    slot: int  # on this node, with its device; a replacement takes it over
    port: int  # of the store that it hosts when it is the first of the group
    process: ForkServerProcess
    connection: Connection
    pulse: mmap.mmap
    trace: Path  # of its pulse, until it has opened it
    named: bool  # a membership has named it: it hears of all that follow
    node: int = 0
    stands_by: bool = False  # it may be made a member
    left: bool = False  # it has said its last word
    fault: dict[str, Any] | None = None  # what it says has ended it
    given_up: float = float("inf")  # from when on, on the monotonic clock
    looked: float = 0.0  # when it was looked at last, on the same clock
    heard: float = 0.0  # its last sign of life, later by what this process has stood still since

    @property
    def spot(self) -> Spot:
        return self.node, self.slot

    @property
    def alive(self) -> bool:
        return time.monotonic() < self.given_up and self.process.is_alive()

    @property
    def killed(self) -> bool:
        """Whether a signal has ended it."""
        return (self.process.exitcode or 0) < 0

    def sources(self) -> list[Any]:
        """What to wait for: a word of it, or its end."""
        return [self.process.sentinel] + [self.connection] * (not self.connection.closed)

    def tell(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended by itself
            self.connection.send_bytes(message)

    def words(self) -> Iterator[bytes]:
        """All that it has sent."""
        try:
            while not self.connection.closed and self.connection.poll():
                yield self.connection.recv_bytes()
        except (EOFError, OSError):  # the latter where it has died in the middle of one
            self.connection.close()

    def silent(self) -> tuple[float, str] | None:
        """For how many seconds it has given no sign of life, and in which phase, if that is too long.

        While this process has stood still the whole machine may have, the rank included: that counts for nothing.
        """
        now = time.monotonic()
        stood, self.looked = max(0.0, now - self.looked - LOOKS), now
        self.heard = min(now, max(self.heard, pulse.last(self.pulse)) + stood)
        return pulse.silent(self.pulse, self.heard) if self.alive else None

    def flight(self) -> str:
        """Where it is, for the record of a hang."""
        return pulse.flight(self.pulse)

    def died_of(self) -> str:
        """Why the process has ended, in one line."""
        return died_of(self.process.exitcode or 0)

    def dump(self) -> None:
        """Have it write all its threads' stacks to its log, and end; one that is stopped does so when it goes on."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, signal.SIGUSR2)
            os.kill(self.process.pid or 0, signal.SIGCONT)
            self.process.join(DUMP)

    def kill(self) -> None:
        self.process.kill()
        self.given_up = min(self.given_up, time.monotonic() + KILLED)

    def end(self) -> None:
        self.kill()
        self.process.join(max(0.0, self.given_up - time.monotonic()))
        self.connection.close()
        self.trace.unlink(missing_ok=True)


@dataclass(slots=True)
class Here:
    """This node, where ranks can be forked."""

    node: nodes.Node
    config: Train
    folder: Path  # of the run
    record: Path  # of its events on this node
    context: ForkServerContext
    devices: int  # how many ranks shall live here, spares aside

    @property
    def index(self) -> int:
        return self.node.index

    @property
    def host(self) -> str:
        return self.node.host

    def fork(self, slot: int, order: dict[str, Any]) -> Rank:
        """A process at this place. `order`: what the supervisor has to say of it; the rest depends on the node."""
        config, member = self.config, order["member"]
        gpus = len(hardware.gpus()) if config.accelerator == "cuda" else 0
        place: dict[str, Any] = {
            "member": member,
            "local_rank": slot,
            "device": f"cuda:{slot % gpus}" if gpus else "cpu",
            "loopback": self.node.alone,
            "backend": config.backend,
            "heals": config.heals,
        }
        words = {key: order[key] for key in ("writer_epoch", "resume", "joins", "left_out")}
        paths = {"folder": str(self.folder), "record": str(self.record)}
        text = json.dumps({**paths, "threads": 1, "place": place, **words})
        with nodes.listen(self.node) as listener:
            port = listener.getsockname()[1]
            ours, theirs = self.context.Pipe()
            heart = pulse.create(trace := self.folder / "logs" / f"rank-{member}.pulse")
            told = (config, text, theirs, listener)
            process = self.context.Process(target=_begin, args=told, name=f"rank-{member}")
            process.start()
        theirs.close()
        return Rank(member, slot, port, process, ours, heart, trace, named=not order["joins"], node=self.index)


def died_of(code: int) -> str:
    """What an exit code says, in one line."""
    if code >= 0:
        return f"ended with exit code {code}"
    cause = "killed by " + next((one.name for one in signal.Signals if one == -code), f"signal {-code}")
    if code == -signal.SIGKILL:
        cause += "; if nobody did that, the machine ran out of memory: use a smaller batch.micro_batch or fewer devices"
    return cause


def die_with_parent() -> None:
    """End this process when the supervisor has gone, however it went, and whatever this process is stuck in.

    On Linux the kernel does it, which reaches a stopped process too: the forkserver, whose child this is, ends when
    the last end of its pipe to the supervisor is closed, and its death kills. multiprocessing hands that end to every
    child as well, so it is closed here. Elsewhere a thread watches.
    """
    supervisor = parent_process()
    assert supervisor is not None

    def watch(timeout: float | None = None) -> None:
        if wait([supervisor.sentinel], timeout):
            os._exit(1)

    if sys.platform == "linux":
        os.close(forkservers._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        watch(timeout=0)  # it may have gone before that call
    else:
        threading.Thread(target=watch, daemon=True).start()


def log_to(path: Path) -> None:
    """Standard output and error of this process, native code's included, go to the rank's log; see `Rank.dump`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.register(signal.SIGUSR2, chain=True)  # to the system's own handler, which ends the process
