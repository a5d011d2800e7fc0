"""How long a rank computes in a step, without what it waits for others."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class Clock:
    """On a GPU nothing is waited for: the seconds of a step are known a step later or two."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._began = self._paused = 0.0
        self.seconds = 0.0  # 0: not known yet

    def start(self) -> None:
        self._began, self._paused = time.perf_counter(), 0.0
        if self._on_gpu:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))  # type: ignore[no-untyped-call]
            self._events[-1][0].record()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def stop(self) -> None:
        if not self._on_gpu:
            self.seconds = time.perf_counter() - self._began - self._paused
            return
        self._events[-1][1].record()
        while len(self._events) > 1 and self._events[0][1].query():  # type: ignore[no-untyped-call]
            began, ended = self._events.popleft()
            self.seconds = began.elapsed_time(ended) / 1000
