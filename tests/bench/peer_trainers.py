"""transformers' Trainer and lightning's among the contestants.

lightning's refuses to clip beside a fused optimizer and autocast: its module clips by torch's own function.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from tests.bench.work import Job, Turns, adamw, count
from train.models import hf
from train.models.build import build
from train.models.hf_config import to_hf_config


class Rows(Dataset[dict[str, Tensor]]):
    """For trainers that shard and batch by themselves: consecutive rows."""

    def __init__(self, job: Job) -> None:
        self.rows = job.read()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]}  # targets as they are, not shifted


def hf_trainer(job: Job, turns: Turns) -> None:
    """transformers.Trainer with transformers' own model of the family, both as they are."""
    import accelerate  # type: ignore  # noqa: F401
    import transformers

    config, o = job.config, job.config.optimizer
    about = to_hf_config(config.model, job.vocab)
    model: Any = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        transformers.AutoConfig.for_model(**about, use_cache=False), dtype=torch.float32
    )
    odd = model.load_state_dict(hf.to_hf(config.model, job.vocab, job.weights()), strict=False)
    tied = ["lm_head.weight"] if about["tie_word_embeddings"] else []
    assert (odd.missing_keys, odd.unexpected_keys) == (tied, []), odd
    model.tie_weights()

    class Ordered(transformers.Trainer):  # type: ignore[misc]
        step_loss = torch.zeros(())

        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(Rows(job))

        def training_step(self, *arguments: Any, **more: Any) -> Tensor:
            loss: Tensor = super().training_step(*arguments, **more)
            self.step_loss = self.step_loss + loss
            return loss

    class Ended(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.begin(count(model))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.ended(trainer.step_loss)
            trainer.step_loss = torch.zeros(())

    arguments = transformers.TrainingArguments(
        output_dir=job.folder,
        use_cpu=True,
        bf16=config.precision == "bf16",
        max_steps=10**6,
        per_device_train_batch_size=job.piece,
        gradient_accumulation_steps=job.pieces,
        learning_rate=o.lr,
        lr_scheduler_type="constant",
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_epsilon=o.eps,
        max_grad_norm=o.clip_norm,
        optim="adamw_torch_fused",
        torch_compile=job.compiled,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ddp_backend="gloo" if job.world > 1 else None,
    )
    trainer = Ordered(model=model, args=arguments, train_dataset=Rows(job), callbacks=[Ended()])
    trainer.train()


class Module(LightningModule):
    """Our model for lightning's Trainer."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.config = job.config
        self.model = build(self.config.model, job.vocab, seed=self.config.seed, device=torch.device("cpu"))
        self.loss = torch.zeros(())

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(batch["input_ids"], batch["labels"]) / batch["labels"].numel()
        self.loss = self.loss + loss.detach()
        return loss

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), self.config.optimizer.clip_norm)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.config, self.parameters())


def lightning_trainer(job: Job, turns: Turns) -> None:
    """lightning.Trainer, with everything off that is not training."""
    module = Module(job)

    class Ended(Callback):
        def on_train_start(self, *_: Any) -> None:
            turns.begin(count(module))

        def on_train_batch_end(self, trainer: Trainer, pl: LightningModule, out: Any, batch: Any, index: int) -> None:
            if (index + 1) % job.pieces == 0:
                turns.ended(module.loss / job.pieces)
                module.loss = torch.zeros(())

    trainer = Trainer(
        accelerator="cpu",
        devices=job.world,
        strategy="ddp" if job.world > 1 else "auto",
        precision="bf16-mixed" if job.config.precision == "bf16" else "32-true",
        max_steps=10**6,
        accumulate_grad_batches=job.pieces,
        callbacks=[Ended()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=job.folder,
        use_distributed_sampler=False,
    )
    rows, step = Rows(job), job.config.batch.sequences
    own = [index for index in range(len(rows)) if index % step * job.world // step == job.rank]
    trainer.fit(module, DataLoader(rows, batch_size=job.piece, sampler=own))
