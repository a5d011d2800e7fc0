"""A process group as one of its ranks sees it, and how it leaves that in the middle of a collective: gloo and NCCL.

Who waits calls `look` all the time, which is a sign of life: else a rank that only waits would be taken for one that
hangs. Where ranks are replaced `look` raises when one was, and the group is then left by `leave`.

**gloo** has no way to end a collective but its time-out, and would write into our tensors when what it waits for
arrives after all. Shutting its connections down ends every collective at once, here and for whoever waits for this
rank; who waits for another one goes by the supervisor's word. Not quite every: gloo tells nobody of what was being
sent when its connection went (`Pair::signalException` passes unbound buffers in `tx_` by). Who waits for that goes by
the word, too, and the group's end, which nothing can reach, is left to a thread (tests/bench/cut_off.py).

**NCCL**'s collectives are waited for by a stream: the host goes on, and what it launches after one that never ends
never runs. So a rank that shall be able to leave must not run far ahead of its device, lest the queue of launches fill
up and hold it; it must have seen that the sum is there before it launches the optimizer; and only then may it abort the
communicator, whose kernels end at once, with anything at all in their buffers. torchft synchronizes once a step for the
same reason (`ProcessGroupNCCL.errored`). The price is that host and device meet once a step. Unmeasured: no machine
with several GPUs has run it yet.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from train import nodes

TIMEOUT = timedelta(minutes=30)  # of a collective; whom it waits for is the supervisor's business, which acts sooner
SLICE = timedelta(milliseconds=50)  # of waiting for gloo, between two looks
DROPPED = 1.0  # seconds in which a gloo group that is left comes to its end; one that was sending may never
ABORTED = 60.0  # seconds in which a communicator must be gone from the device
AHEAD = 8  # collectives that may be under way on the device when the host launches the next

Sockets = set[tuple[int, int]]  # number, inode


class Joined:
    """A group that is never left; without arguments, of a rank alone. On a GPU a stream waits, and the host seldom."""

    def __init__(self, processes: Any = None) -> None:
        self.processes = processes  # torch's, or a bare backend

    def wait(self, work: Any, look: Callable[[], None]) -> None:
        """For the end of a collective. Raises RuntimeError where it has failed, and whatever `look` raises."""
        work.wait()

    def settle(self, look: Callable[[], None], reads: bool) -> None:
        """Return when what was waited for is there; here, if the host `reads` it and so has to wait."""
        if reads:
            end = torch.cuda.Event()  # type: ignore[no-untyped-call]
            end.record()
            while not end.query():  # type: ignore[no-untyped-call]
                look()

    def leave(self, alive: Callable[[], object]) -> None:
        """Whatever it is stuck in; `alive` is called meanwhile."""
        self.processes = None


class Gloo(Joined):
    def __init__(self, store: Store, rank: int, world: int, before: Sockets) -> None:
        super().__init__(dist.ProcessGroupGloo(store, rank, world, TIMEOUT))
        self._sockets = nodes.sockets() - before

    def wait(self, work: Any, look: Callable[[], None]) -> None:
        while True:
            try:
                work.wait(SLICE)
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # it may have come to its end since
                    return
            look()

    def settle(self, look: Callable[[], None], reads: bool) -> None:
        """It is there: the host has waited."""

    def leave(self, alive: Callable[[], object]) -> None:
        for number, inode in self._sockets:
            with contextlib.suppress(OSError):  # closed already; its number may be another's by now
                if os.fstat(number).st_ino == inode:
                    with socket.socket(fileno=os.dup(number)) as connection:
                        local = connection.family == socket.AF_UNIX  # not gloo's: another thread has made it meanwhile
                        if not (local or connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
                            connection.shutdown(socket.SHUT_RDWR)
        held, self.processes = [self.processes], None
        _within(DROPPED, held.clear, alive)


class Nccl(Joined):
    def __init__(self, store: Store, rank: int, world: int, device: torch.device) -> None:
        """Errors of the communicator are left alone until `leave`.

        torch's watchdog would end this process, or free the stream, on which the optimizer would then step by whatever
        is in the buffers.
        """
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        options = dist.ProcessGroupNCCL.Options()
        options._timeout, options.config.blocking = TIMEOUT, False  # a rank that is lost now holds up nobody for good
        super().__init__(dist.ProcessGroupNCCL(store, rank, world, options))
        self.processes.eager_connect_single_device(device)
        self._ends: deque[torch.cuda.Event] = deque()  # of collectives, on the device; not seen yet, oldest first

    def wait(self, work: Any, look: Callable[[], None]) -> None:
        """Let the current stream wait for a collective, and the host for those long before it."""
        work.wait()
        end = torch.cuda.Event()  # type: ignore[no-untyped-call]
        end.record()
        self._ends.append(end)
        self._see(AHEAD, look)

    def settle(self, look: Callable[[], None], reads: bool) -> None:
        self._see(0, look)

    def _see(self, ahead: int, look: Callable[[], None]) -> None:
        """Return when all but the last `ahead` collectives have ended on the device."""
        while len(self._ends) > ahead:
            while not self._ends[0].query():  # type: ignore[no-untyped-call]
                look()
            self._ends.popleft()

    def leave(self, alive: Callable[[], object]) -> None:
        if not _within(ABORTED, self.processes.abort, alive):
            raise TimeoutError("a communicator that was to be left is still on the device")
        self.processes = None


def joined(store: Store, rank: int, world: int, wire: torch.device, heals: bool, before: Sockets) -> Joined:
    """This rank's place in a new group, once all its ranks have come to the store, however long that takes.

    `before`: the sockets that there were before this rank went to the store; the others end with the group.
    """
    if wire.type == "cpu":
        return Gloo(store, rank, world, before)
    if heals:
        return Nccl(store, rank, world, wire)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    return Joined(dist.group.WORLD)


def _within(seconds: float, act: Callable[[], object], alive: Callable[[], object]) -> bool:
    """Whether something is done in time; by a thread, which is left alone where it is not."""
    thread = threading.Thread(target=act, daemon=True, name="leave")
    thread.start()
    until = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < until:
        alive()
        thread.join(0.001)
    return not thread.is_alive()
