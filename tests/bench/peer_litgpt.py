"""litgpt's pretraining among the contestants, in the llama family: it has no learned positions, hence no GPT-2.

`litgpt.pretrain.main` runs as `litgpt pretrain` calls it, on a Fabric made as its `setup` makes one. What is ours is
what its documentation lets one bring along: a data module, initial weights as a checkpoint folder, an optimizer by its
class, a logger and a Fabric callback. Its layout is ours but for names: query, key and value are one matrix, rotary
pairs are the two halves of a head. It always compiles; where the contestant shall not, dynamo is switched off.

A step is logged after its update, so a turn ends in the logger; its loss is the mean of the step's micro-batches. The
cosine that it has for a schedule is flat where its end is its beginning. On several CPUs it would ask for FSDP, which
lightning has on GPUs alone: it is measured on one rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tests.bench.work import Job, Turns, by_decay, count, renamed

NAMES = {
    "embedding.": "transformer.wte.",
    "head.": "lm_head.",
    "norm.": "transformer.ln_f.",
    "blocks.": "transformer.h.",
    ".attention.qkv.": ".attn.qkv.",
    ".attention.out.": ".attn.proj.",
    ".attention_norm.": ".norm_1.",
    ".ffn_norm.": ".norm_2.",
    ".ffn.gate.": ".mlp.fc_1.",
    ".ffn.up.": ".mlp.fc_2.",
    ".ffn.down.": ".mlp.proj.",
}


class Decayed(torch.optim.AdamW):
    """AdamW with decay on matrices alone: litgpt hands over all parameters as one list."""

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float, **more: Any) -> None:
        super().__init__(by_decay(parameters, weight_decay), **more)


class Tokens(Dataset[Tensor]):
    """Rows in order; the first one asked for is the beginning of training."""

    def __init__(self, job: Job, begin: Any = None) -> None:
        self.rows, self.begin = job.read(), begin

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        if self.begin is not None:
            self.begin()
            self.begin = None
        return torch.from_numpy(self.rows[index].astype(np.int64))


class Ended(Logger):
    """Where a step's loss goes."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self.turns = turns

    name = "turns"
    version = 0

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.turns.ended(metrics["loss"])

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """There is nowhere to write them."""


class Counted:
    """A Fabric callback that sees the model as it is set up."""

    parameters = 0

    def on_after_setup(self, fabric: Fabric, module: nn.Module) -> None:
        self.parameters = count(module)


def litgpt(job: Job, turns: Turns) -> None:
    from litgpt import Config, pretrain
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule

    torch._dynamo.config.disable = not job.compiled
    config, shape, o = job.config, shape_of(job), job.config.optimizer
    initial = Path(job.folder) / "initial"
    initial.mkdir()
    torch.save({renamed(name, NAMES): weight for name, weight in job.weights().items()}, initial / "lit_model.pth")
    counted = Counted()

    class Data(DataModule):  # type: ignore[misc]
        def connect(self, **_: Any) -> None:
            """Tokens are there."""

        def train_dataloader(self) -> DataLoader[Tensor]:
            return DataLoader(Tokens(job, lambda: turns.begin(counted.parameters)), batch_size=job.piece)

        def val_dataloader(self) -> DataLoader[Tensor]:
            return DataLoader(Tokens(job), batch_size=job.piece)

    train = TrainArgs(
        save_interval=None,
        log_interval=1,
        global_batch_size=config.batch.sequences,
        micro_batch_size=job.piece,
        lr_warmup_steps=0,
        max_tokens=10**12,
        max_norm=o.clip_norm,
        min_lr=o.lr,
        tie_embeddings=False,
    )
    numbers = {"lr": o.lr, "betas": (o.beta1, o.beta2), "eps": o.eps, "weight_decay": o.weight_decay, "fused": True}
    precision: Any = "bf16-mixed" if config.precision == "bf16" else "32-true"
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision, loggers=[Ended(turns)], callbacks=[counted])
    fabric.launch()
    with (Path(job.folder) / "stdout.txt").open("w") as said, redirect_stdout(said):
        pretrain.main(
            fabric=fabric,
            devices=1,
            seed=config.seed,
            initial_checkpoint_dir=initial,
            resume=False,
            config=Config(**shape),
            data=Data(),
            out_dir=Path(job.folder) / "out",
            tokenizer_dir=None,
            tokenizer=None,
            train=train,
            eval=EvalArgs(interval=10**9, max_iters=1),
            optimizer={"class_path": f"{__name__}.{Decayed.__name__}", "init_args": numbers},
        )


def shape_of(job: Job) -> dict[str, Any]:
    """Llama's architecture in litgpt's words."""
    shape: Any = job.config.model
    return {
        "name": "llama",
        "block_size": shape.context,
        "vocab_size": job.vocab,
        "padded_vocab_size": job.vocab,
        "n_layer": shape.layers,
        "n_embd": shape.width,
        "n_head": shape.heads,
        "n_query_groups": shape.kv_heads,
        "intermediate_size": shape.ffn,
        "rope_base": int(shape.rope_base),
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "norm_eps": shape.norm_eps,
        "mlp_class_name": "LLaMAMLP",
    }
