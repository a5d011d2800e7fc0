"""What a training recipe may ask for beside the model: each changes the numbers, and none of them the law."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.test_train import sha256
from train import events, trained
from train.data.stream import Stream
from train.models.build import build

KEYS = ["data.mask_documents=true", "model.z_loss=1e-3", "model.loss_chunk=40"]
AGAIN = "model.checkpoint_activations=full"


def test_the_result_does_not_depend_on_ranks_or_sharding(tiny: list[str], tmp_path: Path) -> None:
    """All of it together, in bf16 with dropout."""
    tiny = [*tiny, "precision=bf16", "model.dropout=0.1", "eval.every=0", "checkpoint.every=0", "steps=4"]
    whole = sha256(tiny, *KEYS, "name=one", "devices=1")
    assert sha256(tiny, *KEYS, AGAIN, "name=three", "devices=3", "sharding=full") == whole
    assert sha256(tiny, "name=without", "devices=2") != whole
    run = trained.load(tmp_path / "runs" / "one", -1, torch.device("cpu"))
    assert run.model.separator == run.prepared.eot
    assert trained.load(tmp_path / "runs" / "without", -1, torch.device("cpu")).model.separator is None


def test_prompts_are_in_no_loss_on_any_number_of_ranks(tiny: list[str], tmp_path: Path) -> None:
    """The loss of a step by hand: nats of its answers' targets over their number, which no rank sees all of."""
    lines = [{"ask": f"what is {n}? ", "say": f"the number after {n - 1} is {n}."} for n in range(900)]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tiny = [one for one in tiny if not one.startswith("data.path")]
    tiny += [f"data.path={path}", "data.field=say", "data.prompt_field=ask", "eval.every=0", "checkpoint.every=0"]
    whole = sha256(tiny, "name=one", "devices=1", "steps=4")
    assert sha256(tiny, "name=three", "devices=3", "steps=4") == whole
    steps = {name: kept(tmp_path / "runs" / name) for name in ("one", "three")}
    assert steps["one"] == steps["three"]
    run = trained.load(tmp_path / "runs" / "one", -1, torch.device("cpu"))
    model = build(run.config.model, run.prepared.vocab, seed=run.config.seed, device=torch.device("cpu"))
    loaded, nats, count = Stream.of(run.config, run.prepared), 0.0, 0
    for v in range(run.config.batch.virtual_ranks):
        stored = torch.from_numpy(loaded.micro_batch(0, v, 0))
        inputs, targets = stored[:, :-1] % run.prepared.vocab, stored[:, 1:]
        answers = targets < run.prepared.vocab
        logits = model(inputs)[answers].detach()
        nats += float(torch.nn.functional.cross_entropy(logits, targets[answers], reduction="sum"))
        count += int(answers.sum())
    assert 0 < count < 10 * 32
    assert steps["one"][0] == pytest.approx(nats / count, rel=1e-6)


def kept(folder: Path) -> list[float]:
    return [one["loss"] for one in events.read(folder / "events.jsonl") if one["kind"] == "step"]
