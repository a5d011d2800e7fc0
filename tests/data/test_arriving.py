"""Runs of a dataset that is still arriving, where who prepares it fails or ends."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.data.corpora import jsonl, texts
from tests.running import TIMEOUT, at_step
from tests.test_train import sha256, summary, train
from train import compose, events, pulse
from train.data import writing
from train.data.prepare import prepare
from train.data.store import lock

BYTES = ("data.tokenizer.kind=bytes", "data.shard_tokens=8192", "data.validation=0.2")
LONG = ("eval.every=0", "checkpoint.every=0", "devices=2", "optimizer.lr=0.001")


@pytest.fixture
def arriving(tiny: list[str], tmp_path: Path) -> list[str]:
    """600 documents: more than are tokenized at once."""
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set" / "train.jsonl", texts(600))
    keys = [key for key in tiny if not key.startswith("data")]
    return [*keys, "data=hf", f"data.name={tmp_path / 'set'}", *BYTES]


def test_training_goes_on_with_what_is_there(
    arriving: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the first shard; who prepares the others has failed before the run begins, or it might end first."""
    with (tmp_path / "set" / "train.jsonl").open("a") as out:
        out.write("{broken\n")
    begin = writing._background

    def ended(job: writing.Job, held: int) -> subprocess.Popen[bytes]:
        process = begin(job, held)
        process.wait()
        return process

    monkeypatch.setattr(writing, "_background", ended)
    code, folder = train(arriving, *LONG, f"data.cache={tmp_path}/cache", "name=a", "steps=20")
    assert code == 0
    said = [record["text"] for record in events.read(folder / "events.jsonl") if record["kind"] == "warning"]
    assert any("train.jsonl:601" in text and "begun again in 5 s" in text for text in said)


def test_ranks_wait_for_what_another_run_prepares_and_go_on_when_it_ends(
    arriving: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than a rank may be silent: while the other run has the store, and while nobody has it."""
    more, mine = [*LONG, "steps=20"], [f"data.cache={tmp_path}/mine", "name=a"]
    config = compose.config("train", [*arriving, *more, *mine])
    with monkeypatch.context() as patch:
        patch.setattr("train.data.writing._background", lambda job, held: None)
        early, _ = prepare(config.data, seed=config.seed, context=config.model.context)
    held = lock(Path(early.stores[0]))
    assert held is not None
    record = tmp_path / "runs" / "a" / "events.jsonl"

    def other() -> None:
        until = time.monotonic() + TIMEOUT
        while not at_step(15)(list(events.read(record))) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(1.5 * pulse.LEAST)
        os.close(held)

    thread = threading.Thread(target=other)
    thread.start()
    code, folder = train(arriving, *more, *mine)
    thread.join()
    assert code == 0
    assert not [one for one in events.read(record) if one["kind"] == "fault"]
    assert summary(folder)["state_sha256"] == sha256(arriving, *more, f"data.cache={tmp_path}/other", "name=b")
