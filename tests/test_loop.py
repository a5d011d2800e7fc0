"""The loop, against a loop that we did not write, and against golden losses of its own past."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests import dist
from tests.conftest import without_model
from train import cli, compose, engine, events, flat, optim, plan
from train.config import Train
from train.data.prepare import Prepared
from train.data.stream import Stream
from train.folder import read_train
from train.models.build import build

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "losses.json"


def ours(overrides: list[str], *more: str) -> tuple[Train, Prepared, list[float], list[str]]:
    """Train through the front door; returns the losses of its steps."""
    config = compose.config("train", [*overrides, *more])
    assert cli.main(["train", *overrides, *more]) == 0
    steps = [record for record in events.read(config.folder / "events.jsonl") if record["kind"] == "step"]
    prepared = Prepared.read(config.folder / "data.json")
    losses, hexes = [step["loss"] for step in steps], [step["loss_hex"] for step in steps]
    return read_train(config.folder / "config.yaml"), prepared, losses, hexes


class Steps(Dataset[Tensor]):
    """The micro-batches of a run one after the other: (micro_batch, context + 1) each."""

    def __init__(self, config: Train, prepared: Prepared) -> None:
        batch, self.stream = config.batch, Stream.of(config, prepared)
        self.order = [(v, i) for v in range(batch.virtual_ranks) for i in range(batch.micro_batches)]
        self.steps = config.steps

    def __len__(self) -> int:
        return self.steps * len(self.order)

    def __getitem__(self, index: int) -> Tensor:
        step, place = divmod(index, len(self.order))
        return torch.from_numpy(self.stream.micro_batch(step, *self.order[place]))


class Module(LightningModule):
    """The same model under lightning.Trainer: its accumulation, its clipping, torch's own AdamW per parameter."""

    def __init__(self, config: Train, prepared: Prepared) -> None:
        super().__init__()
        self.config, self.accumulated = config, 0.0
        self.model = build(config.model, prepared.vocab, seed=config.seed, device=torch.device("cpu"))
        self.losses: list[float] = []

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        per_step = self.config.batch.virtual_ranks * self.config.batch.micro_batches
        loss = self.model(tokens[:, :-1], tokens[:, 1:]) / self.config.tokens_per_step
        self.accumulated += loss.item()
        if (index + 1) % per_step == 0:
            self.losses.append(self.accumulated)
            self.accumulated = 0.0
        scaled: Tensor = loss * per_step  # Trainer divides by the number of accumulated batches
        return scaled

    def configure_optimizers(self) -> Any:
        config = self.config
        groups = [
            {
                "params": [p for p in self.model.parameters() if p.dim() >= 2],
                "weight_decay": config.optimizer.weight_decay,
            },
            {"params": [p for p in self.model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        o = config.optimizer
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(o.beta1, o.beta2), eps=o.eps)

        def rate(step: int) -> float:
            return optim.learning_rate(o, config.schedule, min(step, config.steps - 1), config.steps)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_twenty_steps_equal_those_of_lightnings_trainer(tiny: list[str], tmp_path: Path) -> None:
    """Same data, model, clipping and schedule under lightning.Trainer: losses equal to 2e-5 relative.

    Not bitwise: Trainer adds the micro-batches one after the other, we along the tree, and 20 steps of AdamW
    amplify the last bit. A micro-batch too many or too few, or a rate one step off, shows from 1e-3 on.
    """
    config, prepared, losses, _ = ours(tiny, "name=a", "steps=20", "devices=2", "eval.every=0", "checkpoint.every=0")
    seed_everything(0, verbose=False)
    module = Module(config, prepared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=20,
            accumulate_grad_batches=config.batch.virtual_ranks * config.batch.micro_batches,
            gradient_clip_val=config.optimizer.clip_norm,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, DataLoader(Steps(config, prepared), batch_size=None, shuffle=False))
    assert len(module.losses) == len(losses) == 20
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(module.losses), rtol=2e-5, atol=0)
    assert losses[-1] < 0.8 * losses[0], "nothing was learned, so nothing was compared"


def test_losses_are_the_golden_ones(eight: list[str], request: pytest.FixtureRequest) -> None:
    """A refactoring changes no loss. To 1e-5 relative, since another CPU or torch rounds otherwise."""
    _, _, losses, _ = ours(eight, "name=a", "steps=12", "devices=2", "data.tokenizer.kind=bytes", "seed=3")
    if request.config.getoption("--write-golden"):
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(golden), rtol=1e-5, atol=0)


def test_plan_counts_what_is_built(eight: list[str], capsys: Any) -> None:
    """`colossus plan format=json`: parameters as built, and the buffers of the tree."""
    assert cli.main(["plan", *eight, "name=a", "devices=2", "format=json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    config = plan.resolve(compose.config("train", [*eight, "name=a", "devices=2"]))
    model = build(config.model, 300, seed=0, device=torch.device("meta"))
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["bytes"]["gradients"] == facts["parameters"] * 4 * 3  # log2(4) + 1 for 4 leaves
    assert facts["fits"] is True


def changed(tiny: list[str], more: list[str]) -> list[str]:
    """`more` may choose another model."""
    return [*(without_model(tiny) if more[0].startswith("model=") else tiny), *more]


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="only glibc is told to")
def test_memory_that_a_step_frees_serves_the_next(tiny: list[str]) -> None:
    engine._numerics(plan.resolve(compose.config("train", [*tiny, "name=a"])), torch.device("cpu"), threads=1)

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(5_000_000) for _ in range(4)]
        del blocks
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    found = [faults() for _ in range(4)]
    assert min(found) < 1000, found  # 80 MB are 19,531 pages


@pytest.mark.parametrize(
    ("world", "more"),
    [
        (1, ["data.mask_documents=true"]),
        (1, ["optimizer=muon", "precision=bf16"]),
        (3, ["reduce.dtype=bf16"]),
        (3, ["sharding=optimizer", "evidence.parameters=true"]),
        (2, ["sharding=full", "optimizer=muon"]),
        (2, ["reduce=fast"]),
        (1, ["model=grok_micro", "model.context=32"]),
    ],
    ids=lambda value: value if isinstance(value, int) else value[0],
)
def test_the_host_waits_for_nothing_in_a_step(tiny: list[str], world: int, more: list[str]) -> None:
    """What a GPU computes is not asked for, or it would stand still until the host has heard and sent it more."""
    overrides = [*changed(tiny, more), "name=a", f"devices={world}"]
    found = dist.run("tests.unread:steps", world, overrides=overrides)
    assert {"mm", "_fused_adamw_"} <= set(found[0][0])
    passes = 6 if "sharding=full" in more else 5  # where each needs the others' parts, both ranks make three
    assert sum(copies - 1 for _, copies in found) == passes, "the tokens of each micro-batch, and a rank's numbers"


@pytest.mark.parametrize("more", [["sharding=optimizer"], ["optimizer=muon", "precision=bf16", "model.dropout=0.1"]])
def test_a_step_does_not_import_the_compiler(tiny: list[str], more: list[str]) -> None:
    """It takes 2 s, in each rank by itself if the process that they are forked from has not imported it."""
    code = "import sys, train.light; from tests.unread import alone; alone(sys.argv[1:])"
    command = [sys.executable, "-c", code, *tiny, "name=a", "devices=1", *more]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("world", "more"),
    [
        (1, ["precision=bf16", "model.dropout=0.1"]),
        (3, ["optimizer=muon"]),
        (2, ["sharding=optimizer"]),
        (2, ["reduce=fast"]),
        (1, ["model=grok_micro", "model.context=32"]),
    ],
    ids=lambda value: value if isinstance(value, int) else value[0],
)
def test_nothing_is_kept_that_a_cuda_graph_overwrites(tiny: list[str], world: int, more: list[str]) -> None:
    """`compile=graphs`, whose replays put loss and gradients where those of the micro-batch before lay."""
    overrides = [*changed(tiny, more), "name=a", f"devices={world}", "batch.micro_batch=1"]
    plain, graphs = (
        dist.run("tests.unread:replayed", world, overrides=overrides, by_graphs=by) for by in (False, True)
    )
    assert plain == graphs
    assert "nan" not in plain[0]
    assert plain == [plain[0]] * world


def test_what_goes_to_a_gpu_leaves_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From other memory CUDA copies when all before it is done, and the host waits for that."""
    tensor, pinned, there = torch.ones(1), torch.ones(2), torch.ones(3)
    ways = {(1, ()): pinned, (2, (torch.device("cuda"), True)): there}
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: ways[x.numel(), ()])
    monkeypatch.setattr(Tensor, "to", lambda x, device, *, non_blocking=False: ways[x.numel(), (device, non_blocking)])
    assert flat.to_device(tensor, torch.device("cuda")) is there
