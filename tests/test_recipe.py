"""What a training recipe may ask for beside the model: each changes the numbers, and none of them the law."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.test_train import sha256
from train import trained

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
