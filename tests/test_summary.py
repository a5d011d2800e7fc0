"""A run's summary from its events alone, across restarts; the console from the same events."""

from __future__ import annotations

from typing import Any

import pytest

from train import console
from train.summary import summarize


def step(number: int, time: float, seconds: float = 1.0) -> dict[str, Any]:
    return {"kind": "step", "step": number, "time": time, "seconds": seconds, "loss": 1 / number, "tokens": 10 * number}


def test_a_step_done_twice_counts_once_and_is_redone_work() -> None:
    records = [
        {"kind": "start", "time": 0.0, "world": 4, "step": 0},
        *(step(n, float(n)) for n in (1, 2, 3)),
        {"kind": "checkpoint", "time": 3.5, "seconds": 0.5, "step": 2},
        {"kind": "start", "time": 10.0, "world": 2, "step": 2},
        *(step(n, 9.0 + n, 0.5) for n in (3, 4)),
        {"kind": "throughput", "time": 12.5, "tokens_per_s": 20.0, "mfu": None},  # as runs before this figure have it
        {"kind": "throughput", "time": 13.0, "tokens_per_s": 20.0, "mfu": None, "waiting": [0.1, 0.3]},
        {"kind": "eval", "time": 14.0, "seconds": 1.0, "loss": 0.3, "bpb": 0.2, "step": 4},
        {"kind": "end", "time": 15.0, "stopped": False, "state_sha256": "ab", "yardsticks": {}},
    ]
    summary = summarize(records)
    assert (summary["steps"], summary["tokens"], summary["final_loss"]) == (4, 40, 0.25)
    assert summary["world_sizes"] == [4, 2]
    assert (summary["val_bpb"], summary["tokens_per_s"], summary["mfu"]) == (0.2, 20.0, None)
    assert summary["waiting"] == {"least": 0.1, "mean": 0.2, "most": 0.3}
    assert summarize(records[:-4])["waiting"] == {"least": None, "mean": None, "most": None}
    goodput = summary["goodput"]
    assert goodput["wall_s"] == 15.0
    assert sum(goodput["seconds"].values()) == pytest.approx(15.0)
    assert goodput["share"] == pytest.approx((2 * 4 + 2 * 2 * 0.5) / (10 * 4 + 5 * 2))  # rank-seconds
    assert goodput["seconds"]["redone"] == pytest.approx(15.0 * 4 / 50)


def test_what_a_restart_left_behind_counts_no_more() -> None:
    """Done with 4 steps, or so it was; damaged, begun again from step 2 and stopped after step 3."""
    records = [
        {"kind": "start", "time": 0.0, "world": 4, "step": 0},
        *(step(n, float(n)) for n in (1, 2)),
        {"kind": "eval", "time": 2.5, "seconds": 0.5, "loss": 0.7, "bpb": 0.6, "step": 2},
        *(step(n, float(n)) for n in (3, 4)),
        {"kind": "eval", "time": 5.0, "seconds": 0.5, "loss": 0.3, "bpb": 0.2, "step": 4},
        {"kind": "end", "time": 6.0, "stopped": False, "state_sha256": "ab", "yardsticks": {"gzip": 2.0}},
        {"kind": "start", "time": 10.0, "world": 1, "step": 2},
        step(3, 11.0),
    ]
    killed = summarize(records)
    assert (killed["steps"], killed["tokens"], killed["world_sizes"]) == (3, 30, [4, 1])
    assert (killed["stopped"], killed["state_sha256"], killed["yardsticks"]) == (True, None, {})
    assert (killed["val_loss"], killed["val_bpb"]) == (0.7, 0.6)
    assert killed["goodput"]["seconds"]["redone"] == pytest.approx(11.0 * 6 / 41)  # two steps, one cut short
    stopped = summarize(
        [*records, {"kind": "end", "time": 12.0, "stopped": True, "state_sha256": "cd", "yardsticks": {}}]
    )
    assert (stopped["steps"], stopped["stopped"], stopped["state_sha256"]) == (3, True, "cd")


def test_a_run_without_events_or_an_end_is_not_done() -> None:
    assert summarize([])["stopped"] is True
    assert summarize([{"kind": "start", "time": 0.0, "world": 1, "step": 0}, step(1, 1.0)])["state_sha256"] is None


def test_durations_are_readable() -> None:
    assert [console.duration(s) for s in (9.6, 99, 240, 7200)] == ["10 s", "99 s", "4 min", "2.0 h"]
