"""Each fault strikes where the plan says, once, and after it was said. Each in a process of its own."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train import compose, events, pulse
from train.channel import MARK, RECORDED, Channel
from train.faults.detect import watched
from train.faults.inject import EXIT, Injector
from train.faults.plan import PHASES, parse
from train.pulse import Pulse
from train.ranks import Ranks

STEP_PHASES = PHASES[:5]


def seat(rank: int, world: int) -> Ranks:
    return Ranks(rank, world, torch.device("cpu"))


def channel(connection: Connection, folder: Path) -> Channel:
    pulse.create(folder / "pulse")
    return Channel(connection, Pulse(folder / "pulse"))


def walk(phase: Callable[[str, int], None], steps: int = 4) -> None:
    for step in range(steps):
        for name in STEP_PHASES:
            phase(name, step)


def life(record: Path, *texts: str, at: Ranks | None = None, wanted: int = 4, patience: float = 60.0) -> int | None:
    """The exit code of a process that walks through four steps under these faults; None: it had to be ended.

    `patience`: for how many seconds it may say nothing, once it has been answered that a fault is on record.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    log = events.EventLog(record)
    planned = sorted(map(parse, texts), key=lambda one: one.step)

    def rank(connection: Connection) -> None:
        ours.close()
        faulthandler.disable()  # pytest's own would write of the crash on order
        walk(Injector(planned, at or seat(1, 4), wanted, 7, channel(connection, record.parent), record))

    process = context.Process(target=rank, args=(theirs,))
    process.start()
    theirs.close()
    answered = False
    try:
        while ours.poll(patience if answered else 60.0):
            message = ours.recv_bytes()
            if message == MARK:
                ours.send_bytes(RECORDED)
                answered = True
            else:
                log.append(json.loads(message))
    except EOFError:
        process.join(patience)
    alive = process.is_alive()
    process.kill()
    process.join()
    log.close()
    return None if alive else process.exitcode


def said(record: Path) -> list[tuple[Any, ...]]:
    return [(r["id"], r["rank"], r["member"], r["phase"], r["step"]) for r in events.read(record)]


@pytest.mark.parametrize(
    ("kind", "code"),
    [("kill", -signal.SIGKILL), ("segv", -signal.SIGSEGV), ("exit", EXIT), ("exception", 1), ("slow", 0)],
)
def test_a_fault_strikes_where_it_shall_and_is_on_record(kind: str, code: int, tmp_path: Path) -> None:
    record, text = tmp_path / "events.jsonl", f"{kind}:1@reduce:2"
    assert life(record, text) == code
    assert said(record) == [(text, 1, 7, "reduce", 2)]


@pytest.mark.parametrize("kind", ["stop", "gil", "hang"])
def test_what_does_not_end_a_process_holds_it_up_until_somebody_does(kind: str, tmp_path: Path) -> None:
    record, text = tmp_path / "events.jsonl", f"{kind}:1@commit:0"
    assert life(record, text, patience=1.0) is None
    assert said(record) == [(text, 1, 7, "commit", 0)]


@pytest.mark.parametrize("kind", ["gil", "hang"])
def test_a_fault_may_pass(kind: str, tmp_path: Path) -> None:
    started = time.monotonic()
    assert life(tmp_path / "events.jsonl", f"{kind}:1@commit:0:0.4") == 0
    assert time.monotonic() - started > 0.4


def test_a_fault_strikes_once_in_a_runs_life(tmp_path: Path) -> None:
    """Not a second time in the process that computes the step again, whichever place it had before."""
    record = tmp_path / "events.jsonl"
    assert life(record, "kill:1@reduce:2", "exit:1@commit:3") == -signal.SIGKILL
    assert life(record, "kill:1@reduce:2", "exit:1@commit:3") == EXIT
    assert life(record, "kill:1@reduce:2", "exit:1@commit:3") == 0
    assert len(said(record)) == 2


def test_other_ranks_go_on(tmp_path: Path) -> None:
    record = tmp_path / "events.jsonl"
    assert life(record, "kill:1@reduce:2", at=seat(2, 4)) == 0
    assert said(record) == []


def test_it_comes_late_rather_than_never(tmp_path: Path) -> None:
    """Its step has gone by before, and its rank's place has gone too: rank 3 of three is the first."""
    record = tmp_path / "events.jsonl"
    assert life(record, "kill:3@backward:0", "kill:1@reduce:3", at=seat(0, 3)) == -signal.SIGKILL
    assert said(record) == [("kill:3@backward:0", 3, 7, "backward", 0)]


def test_a_node_is_struck_rank_by_rank_and_never_the_last(tmp_path: Path) -> None:
    record, node = tmp_path / "events.jsonl", "kill:1+2@reduce:1"
    for rank in (1, 2):
        assert life(record, node, at=seat(rank, 4)) == -signal.SIGKILL
    assert [struck[1] for struck in said(record)] == [1, 2]
    last = tmp_path / "last.jsonl"
    assert life(last, node, at=seat(0, 2)) == 0  # of four ranks two are left, and both would go
    assert life(last, "kill:0+1@reduce:1", at=seat(0, 2), wanted=2) == -signal.SIGKILL  # as was ordered


def test_a_slow_rank_takes_a_multiple_of_what_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that is long it is heard of all the same: it would be taken for one that hangs."""
    now = heard = silence = 0.0

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    def beats(pulse: Pulse, phase: str | None = None) -> None:
        nonlocal heard, silence
        heard, silence = now, max(silence, now - heard)

    monkeypatch.setattr(Pulse, "beat", beats)

    monkeypatch.setattr("train.faults.inject.time", SimpleNamespace(perf_counter=lambda: now, sleep=passes))
    connection, other = multiprocessing.get_context("fork").Pipe()
    other.send_bytes(RECORDED)
    (tmp_path / "events.jsonl").touch()
    slow = [parse("slow:0@forward:1:30:1")]
    phase = Injector(slow, seat(0, 1), 1, 0, channel(connection, tmp_path), tmp_path / "events.jsonl")
    seconds = []
    for step in range(3):
        phase("forward", step)
        started = now
        passes(1.0)
        phase("reduce", step)
        seconds.append(now - started)
        silence = max(silence, now - heard)
        passes(5.0)  # waiting for the others
        heard = now  # else it would have been heard of meanwhile
        phase("commit", step)
    assert seconds == [1.0, pytest.approx(30.0), 1.0]
    assert silence == 1.0


def test_without_faults_there_is_nothing_in_the_way(tmp_path: Path) -> None:
    connection, _ = multiprocessing.get_context("fork").Pipe()
    straight = channel(connection, tmp_path)
    run = compose.config("train", ["devices=1", "recovery.guard=false"])
    assert watched(run, seat(0, 1), 0, straight, tmp_path, None) == straight.phase  # type: ignore[arg-type]
