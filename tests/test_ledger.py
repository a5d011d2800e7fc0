"""The ledger: every rank-second of a run in one part, whatever happened; and recovery times, from the same events."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from train.ledger import PARTS, by_kind, ledger, recoveries

Record = dict[str, Any]


def launch(time: float, world: int, again: bool = False) -> Record:
    return {"kind": "launch", "time": time, "world": world, "again": again}


def start(time: float, world: int, step: int = 0) -> Record:
    return {"kind": "start", "time": time, "world": world, "step": step}


def step(time: float, number: int, seconds: float = 1.0) -> Record:
    return {"kind": "step", "time": time, "step": number, "seconds": seconds}


def injected(time: float, at: int, fault: str = "kill", member: int = 1) -> Record:
    words = {"id": f"{fault}:{member}@reduce:{at}", "fault": fault, "rank": member, "member": member}
    return {"kind": "injected", "time": time, "phase": "reduce", "step": at, **words}


def fault(time: float, member: int = 1) -> Record:
    return {"kind": "fault", "time": time, "rank": member, "step": None, "fault": "lost"}


def regroup(time: float, at: int, world: int, why: str = "lost", **more: Any) -> Record:
    words = {"members": list(range(world)), "seconds": 0.5, **LEAVES, **more}
    return {"kind": "regroup", "time": time, "step": at, "world": world, "why": why, **words}


LEAVES = {"kept": 6, "redone": 2}


def spent(records: list[Record]) -> dict[str, Any]:
    """Rank-seconds by part, the empty ones left out; all of them are there."""
    found = ledger(records)
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_s"])
    scale = found["rank_s"] / found["wall_s"]
    return {part: pytest.approx(s * scale) for part, s in found["seconds"].items() if s * scale > 1e-9}


def test_a_run_to_which_nothing_happened() -> None:
    records = [
        launch(0.0, 4),
        start(2.0, 4),
        step(5.0, 1, seconds=2.5),  # 1.5 s longer than usual, and half a second before it began
        step(6.0, 2),
        step(7.5, 3),  # half a second beside the steps, of which the checkpoint was given a fifth
        {"kind": "checkpoint", "time": 7.9, "step": 2, "seconds": 0.1},
        {"kind": "eval", "time": 8.0, "step": 3, "seconds": 0.5},
        {"kind": "end", "time": 9.0, "step": 3},
        {"kind": "left", "time": 9.5, "rank": 0, "step": 3},
    ]
    assert spent(records) == {
        "start_up": 8.0,
        "warm_up": 8.0,
        "steps": 12.0,
        "checkpoint": 0.4,
        "evaluation": 2.0,
        "other": 1.6 + 4.0,
        "idle": 2.0,
    }


def test_a_loss_costs_its_leaves_its_detection_and_its_regrouping() -> None:
    """Of 8 leaves 2 went with the dead rank: a quarter of the half second that four ranks had put into the step."""
    records = [
        start(0.0, 4),
        step(1.0, 1),
        injected(1.5, at=1),
        fault(1.75),
        regroup(2.0, at=1, world=3),
        step(3.0, 2),
        regroup(4.0, at=2, world=4, why="joined", kept=0, redone=0, seconds=0.25),
        step(5.0, 3),
    ]
    assert spent(records) == {
        "steps": 4.0 + 1.5 + 3.0 + 0.75 * 3 + 4.0,
        "redone": 0.5,
        "detection": 1.0,
        "regrouping": 0.25 * 3 + 0.25 * 3,
        "missing": 2.25,
    }


def test_the_death_of_one_that_stood_by_is_nobodys_time() -> None:
    records = [start(0.0, 2), step(1.0, 1), fault(1.5, member=2), step(2.0, 2)]
    assert spent(records) == {"steps": 4.0}


def test_a_restart_costs_the_steps_behind_it_and_a_stop_is_nobodys_time() -> None:
    records = [
        launch(0.0, 2),
        start(0.0, 2),
        *(step(float(n), n) for n in (1, 2, 3)),
        fault(3.5),
        launch(4.0, 2, again=True),
        {"kind": "restore", "time": 5.0, "step": 1},
        start(6.0, 2, step=1),
        step(7.0, 2),
        {"kind": "end", "time": 7.0, "step": 2},
        launch(17.0, 4),
        start(18.0, 4, step=2),
        step(19.0, 3),
    ]
    assert spent(records) == {
        "steps": 2.0 + 2.0 + 4.0,
        "redone": 4.0 + 1.0,
        "regrouping": 0.5,
        "missing": 0.5,
        "start_up": 2.0 + 4.0,
        "restore": 2.0,
        "idle": 20.0,
    }


def test_ranks_that_were_given_back_are_not_missing() -> None:
    records = [start(0.0, 4), step(1.0, 1), regroup(1.0, at=1, world=2, why="resized", kept=0, redone=0), step(2.0, 2)]
    assert spent(records) == {"steps": 6.0}


def mess(seed: int) -> list[Record]:
    """Random events in random order; where the seed is odd four ranks are wanted throughout."""
    rng = random.Random(seed)
    makers: list[Callable[[float, int, int], Record]] = [
        lambda t, n, w: launch(t, w, again=rng.random() < 0.5),
        lambda t, n, w: start(t, w, n),
        *[lambda t, n, w: step(t, n, seconds=rng.uniform(0, 3))] * 5,
        lambda t, n, w: injected(t, n, member=w),
        lambda t, n, w: fault(t, w),
        lambda t, n, w: regroup(t, n, w, why=rng.choice(["lost", "joined"]), kept=n, redone=w),
        lambda t, n, w: {"kind": "checkpoint", "time": t, "step": n, "seconds": rng.random()},
        lambda t, n, w: {"kind": "eval", "time": t, "step": n, "seconds": rng.random()},
        lambda t, n, w: {"kind": "restore", "time": t, "step": n},
        lambda t, n, w: {"kind": "end", "time": t, "step": n},
    ]
    worlds = [4] if seed % 2 else [1, 2, 3, 4]
    count = rng.randrange(2, 80)
    return [rng.choice(makers)(rng.uniform(0, 100), rng.randrange(9), rng.choice(worlds)) for _ in range(count)]


def test_whatever_happens_the_parts_are_the_whole() -> None:
    """The rank-seconds are those of the wanted ranks, and no part is negative."""
    for seed in range(300):
        records = mess(seed)
        found = ledger(records)
        assert set(found["seconds"]) == set(PARTS)
        assert sum(found["seconds"].values()) == pytest.approx(found["wall_s"])
        assert min(found["seconds"].values()) > -1e-9
        if seed % 2 and any(record["kind"] in ("launch", "start") for record in records):
            assert found["rank_s"] == pytest.approx(4 * found["wall_s"])


def test_nothing_takes_no_time() -> None:
    assert ledger([])["wall_s"] == ledger([start(1.0, 2)])["wall_s"] == 0.0


def test_recoveries_are_timed_from_the_fault_to_the_notice_to_going_on() -> None:
    records = [
        start(0.0, 4),
        step(1.0, 1),
        injected(1.5, at=1),
        step(1.6, 2),  # committed by the others, while nobody knew
        fault(1.75),
        regroup(2.0, at=2, world=3),
        injected(2.1, at=2, fault="slow", member=0),
        step(3.0, 3),
        injected(3.5, at=3, member=2),
        fault(4.5, member=2),
        start(6.5, 4, step=1),
        step(7.0, 2),
        step(8.0, 3),
    ]
    killed, slow, last = recoveries(records)
    assert (killed["detection_s"], killed["recovery_s"], killed["by"]) == (0.25, 0.25, "regroup")
    assert (slow["detection_s"], slow["recovery_s"], slow["by"], slow["survived"]) == (None, None, None, True)
    assert (last["detection_s"], last["recovery_s"], last["by"]) == (1.0, 2.0, "restart")
    assert (killed["survived"], last["survived"]) == (True, False)  # it is not yet where it was
    table = by_kind(recoveries([*records, step(9.0, 4)]))
    assert table["kill"] == {
        "n": 2,
        "survived": 2,
        "detection_s": {"p50": 0.25, "p99": 1.0},
        "recovery_s": {"p50": 0.25, "p99": 2.0},
    }
    assert table["slow"]["recovery_s"] == {"p50": None, "p99": None}


def test_a_number_that_is_none_is_told_by_all_and_struck_one() -> None:
    told = [fault(1.5 + i / 10, member=member) | {"fault": "not finite"} for i, member in enumerate((2, 0))]
    slow, nan = injected(1.0, at=1, fault="slow", member=2), injected(1.25, at=1, fault="nan", member=1)
    slow, nan = recoveries([start(0.0, 3), slow, nan, *told, start(2.0, 3, step=0), step(3.0, 1), step(4.0, 2)])
    assert (slow["detection_s"], slow["by"], slow["survived"]) == (None, None, True)
    assert (nan["detection_s"], nan["recovery_s"], nan["by"]) == (0.25, 0.5, "restart")
    unseen = injected(0.5, at=0, fault="sdc", member=0)  # unnoticed, and finite: what comes later is not its doing
    unseen, nan = recoveries([start(0.0, 3), unseen, injected(1.25, at=1, fault="nan", member=1), *told])
    assert (unseen["detection_s"], nan["detection_s"]) == (None, 0.25)


def test_what_nobody_recovered_from_was_not_survived() -> None:
    (one,) = recoveries([start(0.0, 2), injected(1.0, at=0), step(1.5, 1), fault(2.0)])
    assert (one["detection_s"], one["by"], one["survived"]) == (1.0, None, False)
