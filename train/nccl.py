"""How ranks on GPUs that may lose one another talk: an NCCL communicator that can be left in the middle.

A collective on a GPU is waited for by a stream: the host goes on, and what it launches after one that never ends never
runs. So a rank that shall be able to leave must not run far ahead of its device, lest the queue of launches fill up and
hold it; it must have seen that the sum is there before it launches the optimizer; and only then may it abort the
communicator, whose kernels end at once, with anything at all in their buffers. torchft synchronizes once a step for the
same reason (`ProcessGroupNCCL.errored`).

The price is that host and device meet once a step. Unmeasured: no machine with several GPUs has run it yet.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

AHEAD = 8  # collectives that may be under way on the device when the host launches the next


class Launched:
    """The ends of collectives on the device that the host has not seen yet, oldest first."""

    def __init__(self, look: Callable[[], None]) -> None:
        """`look` is called all the time that is waited; what it raises ends the wait."""
        self._look = look
        self._ends: deque[torch.cuda.Event] = deque()

    def wait(self, work: Any) -> None:
        """Let the current stream wait for a collective, and the host for those long before it."""
        work.wait()
        end = torch.cuda.Event()  # type: ignore[no-untyped-call]
        end.record()
        self._ends.append(end)
        self.see(AHEAD)

    def see(self, ahead: int = 0) -> None:
        """Return when all but the last `ahead` collectives have ended on the device."""
        while len(self._ends) > ahead:
            while not self._ends[0].query():  # type: ignore[no-untyped-call]
                self._look()
            self._ends.popleft()

    def forget(self) -> None:
        """They belong to a communicator that has been left."""
        self._ends.clear()


def communicator(store: Store, rank: int, world: int, device: torch.device, timeout: timedelta) -> Any:
    """A communicator between the ranks that meet at a store: torch's backend, held by nobody else.

    Its errors are left alone until `leave`: torch's watchdog would end this process, or free the stream, on which the
    optimizer would then step by whatever is in the buffers.
    """
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    options = dist.ProcessGroupNCCL.Options()
    options._timeout, options.config.blocking = timeout, False  # a rank that is lost now holds up nobody for good
    made = dist.ProcessGroupNCCL(store, rank, world, options)
    made.eager_connect_single_device(device)
    return made


def leave(held: list[Any]) -> None:
    """End the kernels of the communicator in the list, and drop it. May take as long as the network does."""
    if held[0] is not None:
        held[0].abort()
    held.clear()
