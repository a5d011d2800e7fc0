"""For how long each rank waits for the sum of the gradients, and how that comes into the record."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import dist
from tests.test_reduce import odd_model, used
from train import clock, compose, plan, telemetry
from train.fast import FastReducer
from train.flat import Flat
from train.group import Group
from train.reduce import ExactReducer

LATE = 3.0  # seconds that rank 0 takes longer, on the clock that both ranks read


def uneven(group: Group, mode: str) -> list[list[float]]:
    """A step in which time passes in rank 0's first leaf alone, when rank 1 already waits: (2, W) seconds."""
    flat = Flat(model := odd_model(), group.world)
    reducer = {"exact": ExactReducer, "fast": FastReducer}[mode](group, flat, 8)
    reads = 0

    def now() -> float:
        """Read where a step begins, where its leaves are computed, and where the sum is there: all is one bucket."""
        nonlocal reads
        reads += 1
        seconds = float(group.store.get("now"))
        if group.rank == 1 and reads == 2:
            group.store.set("waits", "1")
        return seconds

    clock.time = SimpleNamespace(perf_counter=now)  # type: ignore
    if group.rank == 0:
        group.store.set("now", "0")
    for v, _ in reducer.leaves():
        if v == 0:
            group.store.wait(["waits"])
            group.store.set("now", str(LATE))
        torch.stack([p.sum() for p in used(model)]).sum().backward()  # type: ignore[no-untyped-call]
    seconds: list[list[float]] = reducer.finish().seconds.tolist()
    return seconds


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_who_is_early_waits_for_who_is_late(mode: str) -> None:
    """No sum is there before rank 0's leaves are: what rank 1 does not compute until then it waits."""
    first, second = dist.run("tests.test_clock:uneven", 2, mode=mode)
    assert first == second  # all ranks know all ranks' numbers
    assert first == [[LATE / 4, 0], [0, LATE]]  # of a leaf, of which each has four; of the wait


def test_a_clock_tells_computing_from_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun at 10; a wait from 13 to 14 within the backward pass; computed at 16; the sum is there at 21."""
    ticks = iter([10.0, 13.0, 14.0, 16.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    one = clock.Clock(torch.device("cpu"))
    one.start()
    with one.paused():
        pass
    one.stop()
    one.summed()
    assert (one.seconds, one.waited) == (5.0, 6.0)


class Event:
    """A CUDA event on a device that is always done; like the real one, "done" where it was never recorded."""

    def __init__(self, now: list[float]) -> None:
        self._now, self._at = now, math.nan

    def record(self) -> None:
        self._at = self._now[0]

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        if math.isnan(self._at + end._at):
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return 1000 * (end._at - self._at)


@pytest.mark.parametrize("stopped", [False, True], ids=["in a leaf", "in the sum"])
def test_a_clock_on_a_gpu_forgets_a_step_that_was_interrupted(stopped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was recorded of it has no end to be measured by."""
    now = [0.0]
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event(now))
    one = clock.Clock(torch.device("cuda"))

    def step(computing: float, waiting: float) -> None:
        one.start()
        now[0] += computing
        one.stop()
        now[0] += waiting
        one.summed()

    step(3.0, 1.0)
    one.start()
    now[0] += 5.0
    if stopped:
        one.stop()
    step(4.0, 2.0)
    assert (one.seconds, one.waited) == (3.0, 1.0), "a step later"
    step(1.0, 1.0)
    assert (one.seconds, one.waited) == (4.0, 2.0)


def test_the_record_says_what_share_of_the_time_each_rank_waited(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of a second. The first one, which warms up, and those of another number of ranks are left out."""
    config = plan.resolve(compose.config("train", [*tiny, "name=a", "log.every=4"]))
    said: list[Any] = []
    fabric = SimpleNamespace(
        is_global_zero=True, device=torch.device("cpu"), world_size=2, log_dict=lambda *_, **__: None
    )
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    recorder = telemetry.Recorder(config, fabric, said.append, vocab=300)  # type: ignore[arg-type]

    def step(number: int, *waited: float) -> None:
        now[0] += 1.0
        seconds = torch.tensor([[0.1] * len(waited), list(waited)], dtype=torch.float64).view(torch.int64)
        numbers = torch.cat([torch.zeros(4 + 2 * 8 + 2, dtype=torch.int64), seconds.view(-1)])
        recorder.catch_up(number, 0.1, numbers, len(waited))

    step(1, 0.9, 0.9)
    step(2, 0.9, 0.9, 0.9)
    step(3, 0.1, 0.3)
    step(4, 0.2, 0.5)
    step(5, 0.0)
    step(6, 0.0)
    paces = [event for event in said if event.kind == "throughput"]
    assert [pace.step for pace in paces] == [4, 6]
    assert paces[0].waiting == pytest.approx([0.15, 0.4])
    assert paces[1].waiting == []
