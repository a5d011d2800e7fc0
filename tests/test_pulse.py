"""How long a rank may be silent: learnt by phase, on a clock that the test turns."""

from __future__ import annotations

import multiprocessing
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from train import compose, plan, processes, pulse
from train.processes import LOOKS, Rank, forkserver, log_to
from train.pulse import AT_FIRST, LEAST, OFTEN, OFTENER, Pulse

Silence = Callable[[float], "tuple[float, str] | None"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def heart(tmp_path: Path, clock: SimpleNamespace) -> tuple[Pulse, Silence]:
    """A rank's side, and what the supervisor sees after so many seconds more."""
    memory = pulse.create(tmp_path / "logs" / "pulse")

    def after(seconds: float) -> tuple[float, str] | None:
        clock.now += seconds
        found = pulse.silent(memory)
        clock.now -= seconds
        return found

    return Pulse(tmp_path / "logs" / "pulse"), after


def live(rank: Pulse, clock: SimpleNamespace, *phases: tuple[str, float]) -> None:
    for phase, seconds in phases:
        rank.beat(phase)
        clock.now += seconds


def test_a_start_takes_what_it_takes(heart: tuple[Pulse, Silence], clock: SimpleNamespace) -> None:
    rank, silent = heart
    assert silent(1e6) is None
    rank.beat()
    assert silent(1e6) is None
    live(rank, clock, ("regroup", 0.1), ("end", 0.0))
    assert silent(1e6) is None


def test_a_known_phase_may_last_some_times_the_longest_seen(
    heart: tuple[Pulse, Silence], clock: SimpleNamespace
) -> None:
    rank, silent = heart
    live(rank, clock, ("forward", 2.0), ("backward", 0.5), ("forward", 0.1), ("forward", 0.0))
    assert silent(OFTEN * 2.0 - 0.1) is None
    assert silent(OFTEN * 2.0 + 0.1) == (pytest.approx(OFTEN * 2.0 + 0.1), "forward")  # type: ignore[comparison-overlap]
    rank.beat("backward")
    assert silent(LEAST - 0.1) is None, "however short it was before"
    assert silent(LEAST + 0.1) == (pytest.approx(LEAST + 0.1), "backward")  # type: ignore[comparison-overlap]


def test_evaluation_may_last_by_its_size(heart: tuple[Pulse, Silence], clock: SimpleNamespace) -> None:
    """Its first sign comes before anything is computed; then 8 sequences at once take longer than 2 in training."""
    rank, silent = heart
    rank.heavier = {"evaluation": 8 / 2}
    live(rank, clock, ("forward", 1.0), ("backward", 2.0), ("evaluation", 0.01))
    rank.beat()
    assert silent(OFTEN * 4 * 2.0 - 0.1) is None
    assert silent(OFTEN * 4 * 2.0 + 0.1) is not None


def test_a_wait_is_no_silence(heart: tuple[Pulse, Silence], clock: SimpleNamespace) -> None:
    """However long it lasts; and it does not make the phase's limit longer."""
    rank, silent = heart
    live(rank, clock, ("forward", 0.1), ("reduce", 0.05))
    for _ in range(1000):
        rank.beat()
        clock.now += 0.05
    rank.beat()
    assert silent(LEAST - 0.1) is None
    assert silent(LEAST + 0.1) is not None


@pytest.mark.parametrize("pause", [0.2, 1.5])
def test_who_has_stood_still_itself_takes_nobody_for_silent(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    """A virtual machine that was held up, or a laptop that slept: the supervisor may be the first to go on."""
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: clock.now))
    process: Any = SimpleNamespace(is_alive=lambda: True)
    connection: Any = None
    rank = Rank(0, 0, 0, process, connection, pulse.create(tmp_path / "pulse"), tmp_path / "pulse", named=True)
    live(Pulse(tmp_path / "pulse"), clock, ("forward", 0.1), ("forward", 0.0))
    assert rank.silent() is None
    clock.now += 100
    assert rank.silent() is None
    waited = LOOKS  # which the look before counts for
    while (found := rank.silent()) is None:
        clock.now += pause
        waited += min(pause, LOOKS)
    assert found == (pytest.approx(waited), "forward")  # type: ignore[comparison-overlap]
    assert LEAST < waited <= LEAST + LOOKS, "one that hangs is found all the same, by who is slow to look, too"


def test_the_flight_record_says_which_collective_and_since_when(tmp_path: Path, clock: SimpleNamespace) -> None:
    memory = pulse.create(tmp_path / "pulse")
    rank = Pulse(tmp_path / "pulse")
    rank.doing = lambda: "step 3, waits for é" + "x" * 100
    rank.beat("reduce")
    clock.now += 2.0
    rank.beat()
    clock.now += 5.0
    said = pulse.flight(memory)
    assert said.startswith("reduce: step 3, waits for éxxx")
    assert said.endswith("x, for 7.0 s; last sign of life 5.0 s ago")
    assert len(said) < 140


def test_a_new_phase_is_given_time_by_what_is_known(heart: tuple[Pulse, Silence], clock: SimpleNamespace) -> None:
    rank, silent = heart
    live(rank, clock, ("regroup", 0.0))
    assert silent(AT_FIRST - 1) is None, "nothing is known"
    assert silent(AT_FIRST + 1) is not None
    live(rank, clock, ("regroup", 0.2), ("evaluation", 0.0))
    assert silent(OFTENER * 0.2 - 0.1) is None
    assert silent(OFTENER * 0.2 + 0.1) == (pytest.approx(OFTENER * 0.2 + 0.1), "evaluation")  # type: ignore[comparison-overlap]
    for phase, rank.first in (("forward", AT_FIRST), ("backward", 31.0)):
        rank.beat(phase)
        assert silent(rank.first - 1) is None, "a first time"
        assert silent(rank.first + 1) is not None


def test_the_first_micro_batch_may_last_by_its_size(tiny: list[str]) -> None:
    """Nobody waits ten minutes for a rank that hangs in its first step, where nothing is compiled."""
    small = plan.resolve(compose.config("train", [*tiny, "devices=2", "compile=false"]))
    assert pulse.COLD < pulse.first(small, 300) < pulse.COLD + 1
    long = plan.resolve(compose.config("train", [*tiny, "devices=2", "compile=false", "model.context=32768"]))
    assert pulse.first(long, 300) > pulse.COLD + 1
    compiled = plan.resolve(compose.config("train", [*tiny, "devices=2", "compile=true"]))
    assert pulse.first(compiled, 300) > AT_FIRST


def test_a_sign_that_is_being_written_is_not_taken_for_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank in another process writes as fast as it can, while we read; by clocks that stand still for neither."""
    memory = pulse.create(tmp_path / "pulse")
    code = (
        "import itertools, sys, pathlib, types; from train import pulse\n"
        "pulse.time = types.SimpleNamespace(monotonic=itertools.cycle((1000.0, 1001.0)).__next__)\n"
        "rank = pulse.Pulse(pathlib.Path(sys.argv[1])); rank.beat('forward'); print('beats', flush=True)\n"
        "while True: rank.beat('forward')"
    )
    monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: 1002.0))
    rank = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pulse")], stdout=subprocess.PIPE)
    try:
        assert rank.stdout is not None
        rank.stdout.readline()
        assert [found for _ in range(300_000) if (found := pulse.silent(memory))] == []
    finally:
        rank.kill()
        rank.communicate()


def late(log: Path, ready: Connection) -> None:
    """A rank that hangs, and does not get to its signals for half a second, as on a machine that is busy."""
    log_to(log)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    ready.send_bytes(b"")
    time.sleep(0.5)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
    time.sleep(60)


def test_a_rank_that_hangs_says_where_before_it_ends_however_long_that_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "DUMP", 60.0)
    ready, there = multiprocessing.Pipe()
    process = forkserver().Process(target=late, args=(tmp_path / "log", there), daemon=True)  # type: ignore[attr-defined]
    process.start()
    ready.recv_bytes()
    rank: Any = SimpleNamespace(process=process)
    Rank.dump(rank)
    assert process.exitcode == -signal.SIGUSR2
    assert re.search(r'File ".*test_pulse.py", line \d+ in late', (tmp_path / "log").read_text())
