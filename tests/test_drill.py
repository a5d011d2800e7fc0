"""`colossus drill`: what it says of a run and its twin, on hand-made events; and a whole one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.test_ledger import fault, injected, launch, regroup, start
from train import cli
from train.drill import _show, report
from train.faults.plan import Injection, parse

Record = dict[str, Any]


def step(time: float, number: int, loss: float = 0.5) -> Record:
    words = {"loss": loss, "loss_hex": loss.hex(), "tokens": 10 * number}
    return {"kind": "step", "time": time, "step": number, "seconds": 1.0, **words}


def end(time: float, number: int, state: str = "ab") -> Record:
    words = {"stopped": False, "state_sha256": state, "yardsticks": {}}
    return {"kind": "end", "time": time, "step": number, **words}


TWIN = [launch(0.0, 4), start(10.0, 4), *(step(10.0 + n, n) for n in (1, 2, 3)), end(14.0, 3)]
RUN = [
    launch(100.0, 4),
    start(101.0, 4),
    step(102.0, 1),
    injected(102.5, at=1),
    fault(103.0),
    regroup(103.25, at=1, world=3),
    *(step(102.0 + n, n) for n in (2, 3)),
    injected(105.5, at=3, fault="slow", member=0),
    end(109.0, 3),
]
PLANNED = [parse("kill:1@reduce:1"), parse("slow:0@reduce:3")]


def changed(records: list[Record], kind: str, **words: Any) -> list[Record]:
    return [{**record, **words} if record["kind"] == kind else record for record in records]


def test_a_drill_that_passed(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(RUN, TWIN, PLANNED)
    assert (found["planned"], found["struck"], found["survived"], found["never_struck"]) == (2, 2, 2, [])
    assert found["equal"]
    assert found["first_difference"] is None
    assert found["passed"]
    assert found["efficiency"] == pytest.approx(4.0 / 8.0)  # from the first start on
    assert found["kinds"]["kill"]["recovery_s"] == {"p50": 0.25, "p99": 0.25}
    assert [(one["id"], one["after_s"]) for one in found["timeline"]] == [
        ("kill:1@reduce:1", 2.5),
        ("slow:0@reduce:3", 5.5),
    ]
    json.dumps(found)
    _show(found)
    shown = capsys.readouterr().out
    for words in (
        "survived 2 of 2 faults, 2 planned",
        "bits changed 0: state ab",
        "kill:1@reduce:1, step 1: noticed after 0.50 s, regroup after 0.25 s more",
        "efficiency (the twin's wall time by the run's) 50.0 %",
    ):
        assert words in shown


@pytest.mark.parametrize(
    ("run", "planned", "words"),
    [
        (changed(RUN, "end", state_sha256="cd"), PLANNED, "BITS CHANGED: state cd and ab"),
        (
            changed(RUN, "step", loss=0.25, loss_hex="0x1.0p-2"),
            PLANNED,
            "their losses part at step 1: 0x1.0p-2 and 0x1.",
        ),
        ([r for r in RUN if r["kind"] != "regroup"], PLANNED, "survived 1 of 2 faults"),
        (RUN, [*PLANNED, parse("exit:2@commit:2")], "never struck: exit:2@commit:2"),
        ([], PLANNED, "BITS CHANGED: state none and ab"),
    ],
    ids=["state", "losses", "unrecovered", "never struck", "nothing"],
)
def test_a_drill_that_failed(
    run: list[Record], planned: list[Injection], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(run, TWIN, planned)
    assert not found["passed"]
    _show(found)
    assert words in capsys.readouterr().out


def test_a_node_counts_as_one_fault() -> None:
    both = [{**injected(102.5, at=1), "id": "kill:1+2@reduce:1", "rank": rank, "member": rank} for rank in (1, 2)]
    run = [*RUN[:3], *both, fault(103.0, 1), fault(103.0, 2), *RUN[5:8], end(109.0, 3)]
    found = report(run, TWIN, [parse("kill:1+2@reduce:1")])
    assert (found["struck"], found["survived"], found["passed"]) == (1, 1, True)


def test_a_drill_without_faults(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs, beside each other, one answer; and asked again, the same one."""
    for _ in range(2):
        assert cli.main(["drill", *tiny, "faults=none", "name=d", "devices=2", "format=json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["planned"], found["equal"], found["passed"]) == (0, True, True)


def test_a_drill_changes_no_bit(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["name=d", "devices=3", "steps=60", "eval.every=20", "checkpoint.every=20", "faults.count=4"]
    settings.append("faults.kinds=[kill,exception,stop,slow]")
    assert cli.main(["drill", *tiny, *settings, "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["planned"], found["struck"], found["survived"], found["equal"]) == (4, 4, 4, True)
    assert len(found["kinds"]) == 4
