"""Who takes part in `colossus bench`, in which settings, and what was asked for of both. Nothing here needs torch.

A contestant is a function `contestant(job, turns)` in a process of its own, one process a rank: `work.py` says what it
is told and what it has to do. Where the loop is not ours to write, turns are taken from a callback, or a logger, that
the trainer offers. To add one: write the function, and give it a row in CONTESTANTS. What it needs beyond the
development environment is imported in that process alone: where that fails, the benchmark says so.

Each is given what makes it faster without changing the work: a fused optimizer, no logging, no saving, forward passes
of as many sequences as suits a CPU's cache (README.md here has 2, 4 and 8). Its own file says what differs on purpose.

litgpt and torchtitan have no learned positions, hence no GPT-2: they are in the llama settings, where nanoGPT has no
model. torchtitan has no path for a CPU; what it needs there is little, and its file says it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from train.checks import require
from train.commands import Bench
from train.compose import did_you_mean


class Setting(NamedTuple):
    family: str
    precision: str
    ranks: int
    threads: int  # of a rank

    @property
    def words(self) -> list[str]:
        return [self.family, self.precision, f"{self.ranks}x{self.threads}"]

    @property
    def name(self) -> str:
        return "-".join(self.words)

    def __str__(self) -> str:
        ranks, threads = ("s" * (number > 1) for number in self[2:])
        return f"{self.family}, {self.precision}, {self.ranks} rank{ranks} x {self.threads} thread{threads}"


FAMILIES = ("gpt2", "llama")
SETTINGS = [
    Setting(family, precision, *shape)
    for family in FAMILIES
    for shape in ((1, 1), (1, 2), (2, 1))
    for precision in ("bf16", "fp32")
]


@dataclass(frozen=True, slots=True)
class Contestant:
    title: str
    entry: str  # module:function, imported in the contestant's own process
    ranks: tuple[int, ...] = (1,)  # in the settings of so many
    families: tuple[str, ...] = FAMILIES
    needs: str = ""  # what it needs beside the development environment
    nanogpt: bool = False  # needs a checkout
    compiled: bool = False
    alone: bool = False  # one process with the threads of all ranks
    trains: bool = True

    def takes_part(self, setting: Setting) -> bool:
        return setting.ranks in self.ranks and setting.family in self.families


PEERS = ("ours", "nanogpt", "trainers", "litgpt", "torchtitan")
OURS, NANOGPT, TRAINERS, LITGPT, TORCHTITAN = (f"tests.bench.peer_{name}" for name in PEERS)
CHECKOUT = "a checkout of nanoGPT: git clone https://github.com/karpathy/nanoGPT, then nanogpt=PATH or NANOGPT=PATH"
ALONE = "(with its own dependencies it would replace others here)"
LITGPT_WHEELS = f"pip install --no-deps litgpt psutil {ALONE}"
TITAN_WHEELS = "pip install --no-deps torchtitan torch_checkpointing spmd_types==0.2.3 torchdata tyro docstring_parser"
TITAN_WHEELS += f" typeguard einops datasets dill xxhash multiprocess pandas {ALONE}"
GPT2: dict[str, Any] = {"families": ("gpt2",), "needs": CHECKOUT, "nanogpt": True}
LLAMA: dict[str, Any] = {"families": ("llama",), "needs": LITGPT_WHEELS}
ANY: dict[str, Any] = {"ranks": (1, 2)}
TITAN: dict[str, Any] = {"families": ("llama",), "needs": TITAN_WHEELS, **ANY}
TWO_THREADS: dict[str, Any] = {"ranks": (2,), "alone": True, **GPT2}  # one process, beside two ranks
CONTESTANTS = {
    "ours": Contestant("colossus train", f"{OURS}:ours", **ANY),
    "ours-compiled": Contestant("colossus train compile=true", f"{OURS}:ours", compiled=True, **ANY),
    "ours-threads": Contestant("colossus train, one process of two threads", f"{OURS}:ours", ranks=(2,), alone=True),
    "bare": Contestant("bare loop, nanoGPT's model", f"{NANOGPT}:bare", **ANY, **GPT2),
    "bare-compiled": Contestant(
        "bare loop, nanoGPT's model, compiled", f"{NANOGPT}:bare", compiled=True, **ANY, **GPT2
    ),
    "nanogpt": Contestant("nanoGPT's train.py, fp32", f"{NANOGPT}:train_py", **GPT2),
    "nanogpt-compiled": Contestant("nanoGPT's train.py, fp32, compiled", f"{NANOGPT}:train_py", compiled=True, **GPT2),
    "bare-threads": Contestant("bare loop in two threads", f"{NANOGPT}:bare", **TWO_THREADS),
    "bare-threads-compiled": Contestant(
        "bare loop, compiled, in two threads", f"{NANOGPT}:bare", compiled=True, **TWO_THREADS
    ),
    "nanogpt-threads": Contestant("train.py in two threads", f"{NANOGPT}:train_py", **TWO_THREADS),
    "nanogpt-threads-compiled": Contestant(
        "train.py, compiled, in two threads", f"{NANOGPT}:train_py", compiled=True, **TWO_THREADS
    ),
    "litgpt": Contestant("litgpt pretrain, compiled", f"{LITGPT}:litgpt", compiled=True, **LLAMA),
    "litgpt-eager": Contestant("litgpt pretrain, not compiled", f"{LITGPT}:litgpt", **LLAMA),
    "torchtitan": Contestant("torchtitan, compiled", f"{TORCHTITAN}:torchtitan", compiled=True, **TITAN),
    "torchtitan-eager": Contestant("torchtitan, not compiled", f"{TORCHTITAN}:torchtitan", **TITAN),
    "hf": Contestant("transformers.Trainer", f"{TRAINERS}:hf_trainer", needs="pip install accelerate", **ANY),
    "lightning": Contestant("lightning.Trainer, our model", f"{TRAINERS}:lightning_trainer", **ANY),
    "ceiling": Contestant("its FLOPs as large products alone", f"{OURS}:ceiling", trains=False, **ANY),
}


def chosen(config: Bench) -> tuple[list[str], list[Setting]]:
    """The contestants and settings that are asked for; raises Refused where there are none such."""
    asked = _listed(config.contestants) or list(CONTESTANTS)
    for name in asked:
        near = did_you_mean(name, list(CONTESTANTS)) or f": there are {', '.join(CONTESTANTS)}"
        require(name in CONTESTANTS, "contestants", f"none is called '{name}'{near}")
    wrong = checkout(config) and not (Path(checkout(config)) / "train.py").exists()
    require(not wrong, "nanogpt", f"'{checkout(config)}' holds no train.py: it is no checkout of nanoGPT")
    settings = _settings(_listed(config.settings))
    for name in asked:
        there = any(CONTESTANTS[name].takes_part(setting) for setting in settings)
        where = next(setting.name for setting in SETTINGS if CONTESTANTS[name].takes_part(setting))
        known = not config.contestants or there
        require(known, "contestants", f"{name} takes part in none of these settings, but in {where}, say")
    return [name for name in CONTESTANTS if name in asked or name == "ours"], settings


def checkout(config: Bench) -> str:
    """Of nanoGPT; empty: none."""
    named = config.nanogpt or os.environ.get("NANOGPT", "")
    return str(Path(named).expanduser().resolve()) if named else ""


def _settings(asked: list[str]) -> list[Setting]:
    """Those that have all words of one that is asked for: bf16, llama-1x1, gpt2-fp32-2x1. Nothing asked: all."""
    words = list(dict.fromkeys(word for setting in SETTINGS for word in setting.words))
    for one in asked:
        for word in one.split("-"):
            near = did_you_mean(word, words) or f": there are {', '.join(words)}"
            require(word in words, "settings", f"'{word}' is none{near}")
        found = any(set(one.split("-")) <= set(setting.words) for setting in SETTINGS)
        require(found, "settings", f"there is none with all of '{one}'")
    return [s for s in SETTINGS if not asked or any(set(one.split("-")) <= set(s.words) for one in asked)]


def _listed(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)] if value else []
