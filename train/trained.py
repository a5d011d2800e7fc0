"""A run's model, loaded for use: by `sample`, by `eval`, or from a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision, Precision

from train import checkpoint, hardware, manifest
from train.checks import MALFORMED, Refused, needed
from train.config import Train
from train.data.prepare import Prepared
from train.data.tokenizer import Tokenizer
from train.flat import Piece
from train.folder import read_train
from train.models.build import build
from train.models.language import LanguageModel


@dataclass(frozen=True, slots=True)
class Trained:
    config: Train
    prepared: Prepared
    tokenizer: Tokenizer
    model: LanguageModel
    step: int


def precision(name: str, device: torch.device) -> Precision:
    """Fabric's precision for `precision=fp32|bf16`: bf16 is autocast over float32 parameters."""
    return MixedPrecision("bf16-mixed", device.type) if name == "bf16" else Precision()


def device(accelerator: str) -> torch.device:
    """The device of `accelerator=auto|cpu|cuda`: the first GPU where there is one."""
    if accelerator == "auto":
        accelerator = "cuda" if hardware.gpus() else "cpu"
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise Refused("accelerator", "cuda, but torch sees no GPU here: use accelerator=cpu")
    return torch.device(accelerator)


def load(run: Path, step: int, on: torch.device) -> Trained:
    """The model of a run's checkpoint (-1: the newest that is whole). Raises Refused where there is none."""
    config = read_train(run / "config.yaml")
    prepared = Prepared.read(run / "data.json")
    try:
        tokenizer = Tokenizer.load(str(prepared.tokenizer))
    except MALFORMED as error:
        raise Refused(str(run / "data.json"), f"does not say what the run was trained on ({error})") from error
    root = run / "checkpoints"
    try:
        found = manifest.verify(root / manifest.folder_name(step)) if step >= 0 else manifest.newest(root)[0]
    except manifest.Damaged as damage:
        raise Refused("step", str(damage)) from damage
    found = needed(found, str(root), "holds no checkpoint that is whole: train the run first")
    model = build(config.model, prepared.vocab, seed=config.seed, device=on, separator=prepared.separator)
    named = model.named_parameters()
    checkpoint.load(found, [Piece("model", name, p.shape, 0, p.detach().view(-1), True) for name, p in named])
    return Trained(config, prepared, tokenizer, model.eval(), found.step)


def fabric(trained: Trained, on: torch.device) -> Fabric:
    """One device, the run's own precision."""
    return Fabric(accelerator=on.type, devices=1, plugins=[precision(trained.config.precision, on)])
