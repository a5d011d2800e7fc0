"""nanoGPT among the contestants: its model in a loop as one writes it by hand, and its own train.py.

Its model has the exact GELU, GPT-2 and the others the tanh form: its module is replaced by torch's other one. Its
train.py computes in fp32 on a CPU, whatever its `dtype` says.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests import nanogpt
from tests.bench.work import Job, Turns, adamw, count
from train.models import hf


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
        yield [(piece[:, :-1], piece[:, 1:]) for piece in torch.split(tokens, job.piece)]
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
    nanogpt.Edit(r"^import os$", "import itertools\nimport os\nimport sys", "for both"),
    nanogpt.Edit(r"ix = torch\.randint\(.*$", "ix = [next(places) for _ in range(batch_size)]", "rows in order"),
    nanogpt.Edit(r"^while True:$", "while sys.stdin.readline():", "takes turns"),
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
