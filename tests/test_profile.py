"""The table of a profile adds up to its steps, and knows its parts."""

from __future__ import annotations

import json

import pytest

from train import cli, compose, events
from train.profile import part


def test_a_profile_adds_up_to_its_steps(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*tiny, "name=p", "devices=2", "profile=2", "eval.every=0", "checkpoint.every=0"]
    assert cli.main(["train", *arguments]) == 0
    folder = compose.config("train", arguments).folder
    (said,) = [e for e in events.read(folder / "events.jsonl") if e["kind"] == "profiled"]
    trace = json.loads((folder / "profile-1.json").read_text())["traceEvents"]
    spans = [e for e in trace if e.get("ph") == "X"]
    phases = [e for e in spans if e["name"].startswith("phase ")]
    assert sum(e["name"] == "phase optimizer" for e in phases) == said["steps"] == 2
    assert sum(said["parts"].values()) == pytest.approx(sum(e["dur"] for e in phases) / 2e6, rel=1e-6)
    stretches = [(e["ts"], e["ts"] + e["dur"]) for e in phases]
    begin, end = min(stretches)[0], max(stretches)[1]
    ran = [e["ts"] for e in spans if e["tid"] == phases[0]["tid"] and begin <= e["ts"] <= end]
    assert len(ran) > 1000
    assert all(any(a <= at <= b for a, b in stretches) for at in ran), "nothing runs between two stretches"
    known = {"forward", "backward", "attention", "loss", "reduction exposed", "optimizer", "data", "host"}
    assert set(said["parts"]) == known | {"sum of leaves"}
    assert "where a step's time goes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["aten::bmm", "Attention", "phase forward"], "attention"),
        (["aten::mm", "autograd::engine::evaluate_function: MmBackward0", "phase backward"], "backward"),
        (["aten::add_", "phase backward"], "sum of leaves"),
        (["phase backward"], "host"),
        (["aten::mul_", "phase optimizer"], "optimizer"),
        (["tokens", "phase forward"], "data"),
        (["phase evaluation"], "evaluation, saving"),
    ],
)
def test_an_operation_belongs_to_the_part_that_it_is_in(names: list[str], found: str) -> None:
    assert part(names) == found
