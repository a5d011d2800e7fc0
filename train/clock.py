"""How long a rank computes in a step, and for how long it then waits for the sum of the gradients.

What of the sum is done while a backward pass goes on costs nothing and is in neither. The wait has three parts, which
nobody can tell apart from inside: others that are not there yet, bytes on their way, and the last additions.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class Clock:
    """On a GPU nothing is waited for: the seconds of a step are known a step later or two.

    There a wait within the last backward pass is not told from computing: its stream does both.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: deque[tuple[torch.cuda.Event, ...]] = deque()  # three of each step that was summed up
        self._marks: tuple[torch.cuda.Event, ...]  # those of the step in flight, which may be begun again
        self._began = self._ended = self._paused = 0.0
        self.seconds = 0.0  # that it computed; 0: not known yet
        self.waited = 0.0  # seconds

    def start(self) -> None:
        """A step begins."""
        self._began, self._paused = time.perf_counter(), 0.0
        if self._on_gpu:
            self._marks = tuple(torch.cuda.Event(enable_timing=True) for _ in range(3))  # type: ignore[no-untyped-call]
            self._marks[0].record()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def stop(self) -> None:
        """All leaves are computed."""
        self._ended = time.perf_counter()
        if self._on_gpu:
            self._marks[1].record()
        else:
            self.seconds = self._ended - self._began - self._paused

    def summed(self) -> None:
        """The sum is there."""
        if not self._on_gpu:
            self.waited = time.perf_counter() - self._ended + self._paused
            return
        self._marks[2].record()
        self._events.append(self._marks)
        while len(self._events) > 1 and self._events[0][2].query():  # type: ignore[no-untyped-call]
            began, ended, summed = self._events.popleft()
            self.seconds, self.waited = began.elapsed_time(ended) / 1000, ended.elapsed_time(summed) / 1000
