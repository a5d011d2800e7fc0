"""What is a spike, and what the run does about it."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.test_recovery import answers, watching
from tests.test_resume import numbers
from tests.test_train import summary, train
from train import cli, compose, events, manifest, plan, supervisor
from train.checks import Refused
from train.data.order import passing
from train.faults.losses import FEWEST, Losses
from train.folder import RunFolder


def of_kind(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in events.read(folder / "events.jsonl") if record["kind"] == kind]


def test_no_false_alarm_in_a_hundred_thousand_steps() -> None:
    """A loss that falls as losses do, with noise of 1 % to 3 %; and a spike of 1.3 times among them is always seen."""
    rng, losses, seen = random.Random(1), Losses(8.0), []
    for step in range(1, 100_001):
        loss = (2.0 + 8.0 * math.exp(-step / 400)) * rng.gauss(1.0, 0.02 + 0.01 * math.sin(step / 1000))
        if losses.spikes({"step": step, "loss": loss}):
            seen.append(step)
        if step > 1000 and step % 100 == 50:
            assert losses.spikes({"step": step, "loss": 1.3 * loss + 0.3}), step
            assert not losses.spikes({"step": step, "loss": loss}), "recorded again, as it should be"
    assert seen == []


def test_little_is_known_at_first_and_nan_is_seen_by_the_ranks() -> None:
    losses = Losses(8.0)
    assert not any(losses.spikes({"step": step, "loss": float(10**step)}) for step in range(FEWEST))
    assert not losses.spikes({"step": FEWEST, "loss": None})
    assert not any(Losses(float("inf")).spikes({"step": step, "loss": float(step**9)}) for step in range(200))


def test_the_batches_that_are_passed_over() -> None:
    """Every other number comes exactly once, in order; those before the first one are as they were."""
    assert [passing(i, []) for i in range(4)] == [0, 1, 2, 3]
    assert [passing(i, [0, 2, 3, 7]) for i in range(6)] == [1, 4, 5, 6, 8, 9]


def test_it_goes_back_further_each_time_and_then_gives_up(tiny: list[str], tmp_path: Path) -> None:
    config = plan.resolve(compose.config("train", [*tiny, "name=a", "devices=2", "recovery.spike=8"]))
    with RunFolder(tmp_path / "run") as run:
        run.write(config, {"digest": "d"})
        watch = watching(config, run)
        root, out, kept = run.path / "checkpoints", [], []
        for time in range(supervisor.TRIES + 1):
            for step in range(0, 40, 5):
                (root / manifest.folder_name(step)).mkdir(parents=True, exist_ok=True)
            code = watch._roll_back(20)
            kept.append(max(manifest.step_of(path.name) or 0 for path in manifest.candidates(root)))
            out.append(len(json.loads((run.path / "data.json").read_text())["left_out"]))
            assert code == (None if time < supervisor.TRIES else 1)
            shutil.rmtree(root)
        assert out == [0, 1, 3, 7, 15, 31, 31]
        assert kept[:5] == [15, 15, 15, 15, 10], "no checkpoint of a state that has seen what is left out"


def test_an_interruption_has_no_say_in_what_is_a_spike(tiny: list[str], tmp_path: Path) -> None:
    """The run's next start knows the losses of the one before it, and how often it went back."""
    config = plan.resolve(compose.config("train", [*tiny, "name=a", "devices=2", "recovery.spike=8"]))
    step = {"loss_hex": "", "lr": 0.1, "grad_norm": 1.0, "tokens": 1, "seconds": 0.1, "world": 2}
    deaf: Any = SimpleNamespace(event=lambda record: None)
    with RunFolder(tmp_path / "run") as run:
        run.write(config, {"digest": "d"})
        first = watching(config, run, deaf)
        for i in range(1, 31):
            first.record(events.Step(step=i, loss=2.0 + 0.01 * (i % 3), **step))  # type: ignore[arg-type]
        first.record(events.RolledBack(step=30, left_out=[]))
        again = watching(config, run, deaf)
        again.record(events.Step(step=31, loss=2.9, **step))  # type: ignore[arg-type]
        assert again._wrong == 31
        assert again._rolled[30] == 1


def test_a_transient_nan_changes_no_bit(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch)
    more = ("steps=12", "checkpoint.every=4", "eval.every=0")
    code, folder = train(tiny, *more, "name=a", "devices=3", "faults.at=[nan:1@backward:6]")
    assert code == 0
    _, twin = train(tiny, *more, "name=b", "devices=1")
    assert numbers(folder) == numbers(twin)
    assert summary(folder)["state_sha256"] == summary(twin)["state_sha256"]
    assert [record["step"] for record in of_kind(folder, "start")] == [0, 4]
    assert {fault["fault"] for fault in of_kind(folder, "fault")} == {"not finite"}


def test_a_spike_is_gone_back_from_and_its_batch_left_out(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With a bar so low that ordinary noise is a spike: the same batches are left out on one rank and on three, one of
    which dies; the bits are equal; a step computed again afterwards still proves right; each step is done."""
    more = (
        "steps=40",
        "checkpoint.every=4",
        "checkpoint.keep=4",
        "eval.every=0",
        "recovery.spike=0.65",
        "optimizer.lr=0.00001",
    )
    folders = []
    for name, others in (("a", ["devices=1"]), ("b", ["devices=3", "faults.at=[kill:1@reduce:30]"])):
        code, folder = train(tiny, *more, f"name={name}", *others)
        assert code == 0
        folders.append(folder)
    one, three = folders
    rolled = of_kind(one, "rollback")
    assert rolled
    assert [(r["step"], r["left_out"]) for r in of_kind(three, "rollback")] == [
        (r["step"], r["left_out"]) for r in rolled
    ]
    out = rolled[-1]["left_out"]
    assert out
    assert json.loads((three / "data.json").read_text())["left_out"] == out
    losses = [{r["step"]: r["loss_hex"] for r in of_kind(folder, "step")} for folder in folders]  # those that stand
    assert losses[0] == losses[1]
    assert sorted(losses[0]) == list(range(1, 41))
    assert summary(one)["state_sha256"] == summary(three)["state_sha256"]
    found, _ = manifest.newest(one / "checkpoints")
    assert found is not None
    assert found.manifest["left_out"] == out
    capsys.readouterr()
    assert cli.main(["replay", f"run={three}", "step=40"]) == 0


def test_several_nodes_are_refused(tiny: list[str]) -> None:
    with pytest.raises(Refused, match=r"recovery\.spike"):
        compose.config("train", [*tiny, "name=a", "nodes=2", "devices=1", "recovery.spike=8"])
