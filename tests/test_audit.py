"""A rank that computes wrongly, now and then or always, is found by another one that computes the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.bench import detection
from tests.test_recovery import answers, watching
from tests.test_resume import numbers
from tests.test_train import summary, train
from train import compose, events, plan, supervisor
from train.audit import drawn
from train.checks import FAILED, Refused
from train.folder import RunFolder

STEPS = ("steps=16", "checkpoint.every=4", "eval.every=0")


def of_kind(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in events.read(folder / "events.jsonl") if record["kind"] == kind]


def test_each_gradient_is_drawn_with_the_same_probability(tiny: list[str]) -> None:
    """Whatever the number of ranks; others with another seed."""
    drawn_by = {}
    for seed, share in ((0, 0.1), (1, 0.1), (0, 0.0), (0, 1.0)):
        config = plan.resolve(compose.config("train", [*tiny, f"seed={seed}", f"recovery.audit={share}"]))
        drawn_by[seed, share] = [(step, v) for step in range(3200) for v in drawn(config, step)]
    assert len(drawn_by[0, 0.1]) / 16_000 == pytest.approx(0.1, abs=0.01), "four standard deviations"
    assert drawn_by[0, 0.1] != drawn_by[1, 0.1]
    assert len(drawn_by[0, 0.0]) == 0
    assert len(drawn_by[0, 1.0]) == 16_000


@pytest.mark.parametrize("more", [(), ("precision=bf16", "reduce.dtype=bf16", "sharding=optimizer")])
def test_a_wrong_gradient_is_found_and_undone(
    more: tuple[str, ...], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every gradient is audited: before the step is saved the run goes back, and no bit is changed in the end."""
    answers(monkeypatch)
    at = "faults.at=[sdc:1@backward:6]"
    _, twin = train(tiny, *STEPS, *more, "name=twin", "devices=1", "recovery.audit=1")
    assert of_kind(twin, "audit") == [], "nothing is found where nothing is wrong"
    code, folder = train(tiny, *STEPS, *more, "name=a", "devices=3", at, "recovery.audit=1")
    assert code == 0
    (found,) = of_kind(folder, "audit")
    assert found["step"] == 7
    assert 1 in found["suspects"]
    assert [start["step"] for start in of_kind(folder, "start")] == [0, 4]
    last = {step["step"]: step["loss_hex"] for step in of_kind(folder, "step")}
    assert last == numbers(twin)
    assert summary(folder)["state_sha256"] == summary(twin)["state_sha256"]
    if not more:
        code, folder = train(tiny, *STEPS, "name=b", "devices=3", at)
        assert code == 0
        assert summary(folder)["state_sha256"] != summary(twin)["state_sha256"], "without the audit it goes unseen"


def test_who_is_always_wrong_is_left_out(tiny: list[str]) -> None:
    """Found with one partner and another: only the sick one was there each time. The run goes on without its place.

    The strikes lie so far apart that each is found before the next one: a rank gets one step ahead of the find at most.
    """
    at = "faults.at=[sdc:1@backward:5,sdc:1@backward:9,sdc:1@backward:13]"
    code, folder = train(tiny, *STEPS, "name=a", "devices=3", at, "recovery.audit=1")
    assert code == 0
    _, twin = train(tiny, *STEPS, "name=twin", "devices=1")
    (warning,) = of_kind(folder, "warning")
    assert warning["rank"] == 1
    assert "3 audits" in warning["text"]
    assert summary(folder)["world_sizes"] == [3, 3, 3, 2]
    assert summary(folder)["state_sha256"] == summary(twin)["state_sha256"]


def test_as_many_wrong_gradients_are_found_as_are_audited() -> None:
    """`make bench-detection` in short."""
    assert detection.single(0.1, 1000) == pytest.approx(0.1, abs=0.03), "three standard deviations"
    assert detection.single(1.0, 50) == 1


@pytest.mark.parametrize("seed", range(12))
def test_who_is_always_wrong_is_named_though_few_are_audited(seed: int) -> None:
    """After a find the same step comes again. Audited by the same rank each time, both would be suspected alike."""
    _, finds, right = detection.persistent(0.1, seed)
    assert right
    assert finds < 10


def test_who_is_suspected_is_who_computed_it() -> None:
    """In a step that was taken over that is not whose share it is, which the reducer is back at by then."""
    ranks = detection.Ranks(share=1.0, seed=0)
    regular, ranks.hosted = ranks.hosted, [[1, 2, 3], [4, 5], [0, 6], [7]]  # type: ignore[list-item]
    for one in ranks.audits:
        one._reducer = SimpleNamespace(hosted=regular, computed=ranks.hosted)  # type: ignore[assignment]
    ranks.wrong = {(2, 0)}
    assert ranks.take(0)
    ((host, _),) = ranks.suspected
    assert host == 2


def test_two_ranks_that_never_agree_end_the_run(tiny: list[str], tmp_path: Path) -> None:
    """There is no third one to tell which of them is wrong, and going back does not help."""
    config = plan.resolve(compose.config("train", [*tiny, "name=a", "devices=2", "recovery.audit=0.1"]))
    step = {"loss": 1.0, "loss_hex": "", "lr": 0.1, "grad_norm": 1.0, "tokens": 1, "seconds": 0.1, "world": 2}
    deaf: Any = SimpleNamespace(event=lambda record: None, say=lambda text: None, error=lambda text: None)
    cause = "virtual rank 1's gradient in step 6 is 01 from rank 0 and 02 from rank 1"
    with RunFolder(tmp_path / "run") as run:
        run.write(config, {"digest": "d"})
        watch = watching(config, run, deaf)
        codes: list[int | None] = []
        while len(codes) < 100 and FAILED not in codes:
            watch._last["step"], watch._members, watch._present = 0, [0, 1], [0, 1]
            watch.record(events.Step(step=5, **step))  # type: ignore[arg-type]
            fault = events.Fault(fault="miscomputed", phase="commit", rank=1, step=5, cause=cause).record()
            codes.append(watch._bury([SimpleNamespace(member=1, spot=(0, 1), fault=fault)]))  # type: ignore[list-item]
            watch._record({"kind": "start", "time": 0.0})
        assert codes == [None] * 2 * supervisor.TRIES + [FAILED]


@pytest.mark.parametrize("more", ["evidence.digests=false", "reduce=fast", "sharding=full"])
def test_what_cannot_be_audited_is_refused(more: str, tiny: list[str]) -> None:
    with pytest.raises(Refused, match=r"recovery\.audit"):
        compose.config("train", [*tiny, "name=a", "recovery.audit=0.1", more])
