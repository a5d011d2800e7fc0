"""Who takes part in `tests.bench.peers`, and how each is made to do the same work.

A contestant is a function `contestant(job, turns)` in a process of its own (one process a rank). It builds its trainer
as its own documentation says, from `job`'s weights, rows and settings; calls `turns.begin` with its number of
parameters; and trains for ever, calling `turns.ended(loss)` after each step with the mean loss of the tokens that this
rank saw. Both calls wait for the contestant's next turn. Where the loop is not ours to write, this is done from a
callback, or a logger, that the trainer offers. To add one: write the function, and give it a row in CONTESTANTS. What
it needs beyond the development environment is imported inside of the function: where that fails, the benchmark says so.

The same work is: the same initial weights (the names of `train.models.hf`), rows of 257 tokens in the same order,
AdamW with the same numbers and decay on matrices alone, clipping at 1, a constant rate. Each contestant is given what
makes it faster without changing that: a fused optimizer, no logging, no saving, forward passes of PIECE sequences.

What differs on purpose:
- nanoGPT has the exact GELU, GPT-2 and the others its tanh form: nanoGPT's module is replaced by torch's other one.
- nanoGPT's own train.py computes in fp32 on a CPU, whatever its `dtype` says; it is timed as it is, beside bf16 too.
- lightning's Trainer refuses to clip beside a fused optimizer and autocast: the module clips by torch's own function.
- litgpt has no learned positions, hence no GPT-2: it is left out.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socket
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from tests import nanogpt
from tests.bench.loop_overhead import Memory
from train import compose, plan
from train.config import Train
from train.flops import flops_per_token
from train.group import Place
from train.loop import Due, fit
from train.models import hf
from train.models.build import build
from train.models.hf_config import to_hf_config
from train.run import Order, assemble

# Sequences of a forward pass, of those contestants that may choose.
PIECE = 2


@functools.cache  # composing takes half a second, which no contestant may pay in a step
def composed(overrides: tuple[str, ...]) -> Train:
    return plan.resolve(compose.config("train", list(overrides)))


@dataclass(frozen=True, slots=True)
class Job:
    """What a contestant is told."""

    overrides: tuple[str, ...]  # of our configuration, from which all the numbers come
    folder: str  # of this contestant alone
    rows: str  # uint16, (sequences, context + 1) without end
    nanogpt: str  # a checkout, or nothing
    vocab: int
    threads: int
    rank: int
    world: int
    port: int
    compiled: bool = False

    @property
    def config(self) -> Train:
        return composed(self.overrides)

    @property
    def pieces(self) -> int:
        """Micro-batches a step, of a rank."""
        return self.config.batch.sequences // self.world // PIECE

    def read(self) -> np.ndarray[Any, np.dtype[np.uint16]]:
        return np.memmap(self.rows, np.uint16, "r").reshape(-1, self.config.model.context + 1)

    def weights(self) -> dict[str, Tensor]:
        """The initial weights under our names."""
        config = self.config
        return dict(build(config.model, self.vocab, seed=config.seed, device=torch.device("cpu")).named_parameters())


class Turns:
    """A contestant's end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._left, self._losses = pipe, 0, list[Tensor | float]()

    def begin(self, parameters: int) -> None:
        self._pipe.send({"parameters": parameters})
        self._wait()

    def ended(self, loss: Tensor | float) -> None:
        self._losses.append(loss)
        self._left -= 1
        if not self._left:
            losses = [float(loss) for loss in self._losses]
            self._pipe.send({"seconds": time.perf_counter() - self._began, "losses": losses})
            self._losses.clear()
            self._wait()

    def _wait(self) -> None:
        try:
            self._left = self._pipe.recv()
        except EOFError:
            os._exit(0)  # out of a loop that knows no other way to end
        self._began = time.perf_counter()


def groups(config: Train, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Decay on matrices alone, as we have it, nanoGPT, and Trainer."""
    listed = list(parameters)
    return [
        {"params": [p for p in listed if p.dim() >= 2], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in listed if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(config: Train, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    o = config.optimizer
    return torch.optim.AdamW(groups(config, parameters), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------------------- ours


class Member(Memory):
    """The channel of one rank of several."""

    def __init__(self, path: Path, world: int, port: int) -> None:
        super().__init__(path)
        self._members = {"epoch": 1, "members": list(range(world)), "host": "127.0.0.1", "port": port}

    def membership(self) -> dict[str, Any]:
        return self._members


def ours(job: Job, turns: Turns, listener: socket | None = None) -> None:
    """A rank as `colossus train` assembles it; only the pipe to the supervisor is a list."""
    heals = job.config.heals
    place = Place(member=job.rank, local_rank=job.rank, device="cpu", loopback=True, backend="gloo", heals=heals)
    where = {"folder": job.folder, "record": f"{job.folder}/events.jsonl"}
    order = Order(**where, place=place, threads=job.threads, writer_epoch=1, resume=False, joins=False)
    recovery = assemble(order, Member(Path(job.folder) / f"pulse-{job.rank}", job.world, job.port), listener)
    recovery.regroup()
    state, parts = recovery.state, recovery.parts

    def after(step: int) -> None:
        if step and parts.recorder.last is not None:
            turns.ended(float(parts.recorder.last.numbers[:1].view(torch.float64)))
            parts.recorder.resume_clock()

    turns.begin(count(parts.model) if isinstance(parts.model, nn.Module) else 0)
    fit(state, replace(parts, due=(Due(1, after),)))


# ------------------------------------------------------------------------------------------------------------- nanoGPT


def nanogpt_model(job: Job, folder: str) -> Any:
    """nanoGPT's model with the job's weights."""
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    shape: Any = job.config.model
    sizes = {"block_size": shape.context, "vocab_size": job.vocab, "n_layer": shape.layers, "n_head": shape.heads}
    model = GPT(GPTConfig(**sizes, n_embd=shape.width, dropout=0.0, bias=True))
    for block in model.transformer.h:
        block.mlp.gelu = nn.GELU(approximate="tanh")
    ours, theirs = job.weights(), dict(model.named_parameters())
    with torch.no_grad():
        for entry in hf.entries(shape):
            theirs.pop(entry.theirs[0]).copy_(ours[entry.ours])
    assert not theirs, f"without a value: {sorted(theirs)}"
    return model


def batches(job: Job) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The micro-batches of this rank, step by step."""
    config, rows = job.config, job.read()
    per_rank = config.batch.sequences // job.world
    first = job.rank * per_rank
    while True:
        tokens = torch.from_numpy(rows[first : first + per_rank].astype(np.int64))
        yield [(piece[:, :-1], piece[:, 1:]) for piece in torch.split(tokens, PIECE)]
        first += config.batch.sequences


def bare(job: Job, turns: Turns) -> None:
    """The loop that one writes by hand, on nanoGPT's model; with DDP on several ranks."""
    config = job.config
    model: Any = nanogpt_model(job, job.nanogpt)
    parameters = list(model.parameters())
    optimizer = adamw(config, parameters)
    number = count(model)
    if job.compiled:
        model.compile()
    if job.world > 1:
        torch.distributed.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(model)
    turns.begin(number)
    for step in batches(job):
        total = torch.zeros(())
        for index, (x, y) in enumerate(step):
            last = index == len(step) - 1
            with nullcontext() if job.world == 1 or last else model.no_sync():
                with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                    loss = model(x, y.contiguous())[1] / len(step)
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.ended(total)


TRAIN_PY = [
    *nanogpt.UNPATCHED,
    nanogpt.Edit(r"^def get_batch", "places = itertools.count(0, block_size + 1)\ndef get_batch", "rows in order"),
    nanogpt.Edit(r"^import os$", "import itertools\nimport os", "for that"),
    nanogpt.Edit(r"ix = torch\.randint\(.*$", "ix = [next(places) for _ in range(batch_size)]", "rows in order"),
    nanogpt.Edit(r"^while True:$", "while True:\n    input()", "takes turns"),
]


def train_py(job: Job, turns: Turns) -> None:
    """nanoGPT's own train.py, a process of its own that prints its losses; a step begins with a line from us.

    Initial weights come by its own way, a checkpoint at step 0. The whole batch is one forward pass, because the loss
    that it prints is the last pass's.
    """
    config, folder = job.config, Path(job.folder)
    for name in ("model.py", "configurator.py"):
        shutil.copy(Path(job.nanogpt) / name, folder)
    tanh = [nanogpt.Edit(r"nn\.GELU\(\)", "nn.GELU(approximate='tanh')", "GPT-2's own form")]
    (folder / "model.py").write_text(nanogpt.edited((folder / "model.py").read_text(), tanh))
    (folder / "train.py").write_text(nanogpt.edited((Path(job.nanogpt) / "train.py").read_text(), TRAIN_PY))
    (data := folder / "data" / "rows").mkdir(parents=True)
    for split in ("train", "val"):
        (data / f"{split}.bin").symlink_to(job.rows)
    model, o = nanogpt_model(job, str(folder)), config.optimizer
    optimizer = model.configure_optimizers(o.weight_decay, o.lr, (o.beta1, o.beta2), "cpu")
    arguments = {key: getattr(model.config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "bias")}
    arguments |= {"vocab_size": job.vocab, "dropout": 0.0}
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": arguments}
    (folder / "out").mkdir()
    torch.save(state | {"iter_num": 0, "best_val_loss": 1e9}, folder / "out" / "ckpt.pt")
    settings = {
        **{"init_from": "resume", "out_dir": "out", "dataset": "rows", "device": "cpu", "dtype": "float32"},
        **{"eval_iters": 0, "always_save_checkpoint": False, "max_iters": 10**6, "eval_interval": 10**6},
        **{"batch_size": config.batch.sequences, "block_size": config.model.context, "gradient_accumulation_steps": 1},
        **{"learning_rate": o.lr, "decay_lr": False, "weight_decay": o.weight_decay, "beta1": o.beta1},
        **{"beta2": o.beta2, "grad_clip": o.clip_norm, "bias": True, "compile": job.compiled},
    }
    command = [sys.executable, "-u", "train.py", *(f"--{key}={value}" for key, value in settings.items())]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": folder}
    threads = {"OMP_NUM_THREADS": str(job.threads)}
    script = subprocess.Popen(command, **pipes, env={**os.environ, **threads})
    turns.begin(count(model))
    del model, optimizer, state
    while True:
        script.stdin.write("\n")  # type: ignore[union-attr]
        script.stdin.flush()  # type: ignore[union-attr]
        for line in script.stdout or ():
            if found := re.match(r"iter \d+: loss ([\d.]+)", line):
                turns.ended(float(found[1]))
                break
        else:
            raise RuntimeError(f"train.py ended with {script.wait()}")


# ---------------------------------------------------------------------------------------------- trainers of others


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
    """transformers.Trainer with GPT2LMHeadModel, both as they are."""
    import accelerate  # type: ignore  # noqa: F401
    import transformers

    config, o = job.config, job.config.optimizer
    about = to_hf_config(config.model, job.vocab)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**about, use_cache=False))
    odd = model.load_state_dict(hf.to_hf(config.model, job.vocab, job.weights()), strict=False)
    assert (odd.missing_keys, odd.unexpected_keys) == (["lm_head.weight"], []), odd
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
        per_device_train_batch_size=PIECE,
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
    trainer.fit(module, DataLoader(rows, batch_size=PIECE, sampler=own))


def ceiling(job: Job, turns: Turns) -> None:
    """No training: a step's FLOPs, as MFU counts them, as products of 1024 x 1024 matrices. Its ratio is ours' MFU."""
    config = job.config
    a = torch.randn(1024, 1024).to(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    needed = config.tokens_per_step * flops_per_token(config.model, job.vocab) / job.world
    turns.begin(0)
    while True:
        for _ in range(round(needed / (2 * 1024**3))):
            torch.mm(a, a)
        turns.ended(0.0)


# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contestant:
    title: str
    main: Callable[..., None]
    several: bool = False  # takes part on several ranks too
    needs: str = ""  # what it needs beside the development environment
    nanogpt: bool = False  # needs a checkout
    compiled: bool = False
    fp32: bool = False  # whatever the others compute in
    trains: bool = True


CHECKOUT = "a checkout of nanoGPT: git clone https://github.com/karpathy/nanoGPT, then --nanogpt PATH or NANOGPT=PATH"
CONTESTANTS = {
    "ours": Contestant("colossus train", ours, several=True),
    "ours-compiled": Contestant("colossus train compile=true", ours, several=True, compiled=True),
    "bare": Contestant("bare loop, nanoGPT's model", bare, several=True, needs=CHECKOUT, nanogpt=True),
    "bare-compiled": Contestant(
        "bare loop, nanoGPT's model, compiled", bare, several=True, needs=CHECKOUT, nanogpt=True, compiled=True
    ),
    "nanogpt": Contestant("nanoGPT's train.py, fp32", train_py, needs=CHECKOUT, nanogpt=True, fp32=True),
    "nanogpt-compiled": Contestant(
        "nanoGPT's train.py, fp32, compiled", train_py, needs=CHECKOUT, nanogpt=True, compiled=True, fp32=True
    ),
    "hf": Contestant("transformers.Trainer", hf_trainer, several=True, needs="pip install accelerate"),
    "lightning": Contestant("lightning.Trainer, our model", lightning_trainer, several=True),
    "ceiling": Contestant("its FLOPs as large products alone", ceiling, several=True, trains=False),
}


def quiet() -> None:
    """Peers' advice on worker counts, and on GPUs that are not there."""
    warnings.simplefilter("ignore")
