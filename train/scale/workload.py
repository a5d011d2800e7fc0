"""Models and the plans that they are trained by, as arrays: one entry a job, so that a table is predicted at once.

A job is a model's shape, a batch, a number of GPUs of one kind and how the work is cut: tensor parallel (tp), pipeline
(pp, in `chunks` interleaved pieces a stage), context parallel (cp), experts (ep, within data parallelism), and data
parallel over the rest. All figures of a job are numbers; `Jobs` holds a table of them by column.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train import flops
from train.config import Model
from train.scale.hardware import Gpu

Array = NDArray[np.float64]
TABLES = Path(__file__).parent / "tables"

ARCHITECTURES = ("cpu", "ampere", "ada", "hopper", "blackwell")
HOPPER = ARCHITECTURES.index("hopper")


class Stack(IntEnum):
    """Whose kernels. Megatron's of 2021 to 2023 write attention scores to memory, the others use flash attention."""

    EAGER, COMPILED, MEGATRON, ENGINE = range(4)  # PyTorch op by op, or compiled; Transformer Engine


class Sharding(IntEnum):
    """What data parallelism cuts (ZeRO 0 … 3)."""

    NOTHING, OPTIMIZER, GRADIENTS, WEIGHTS = range(4)


class Recompute(IntEnum):
    """In the backward pass: nothing, attention's core (by PyTorch half the layer), the whole layer."""

    NOTHING, SELECTIVE, FULL = range(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder-only transformer; with `experts` > 1 of its feed-forward layers a token takes `chosen`."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    gated: bool
    vocab: int
    context: int
    experts: int = 1
    chosen: int = 1
    head: int = 0  # a head's width; 0: all heads are as wide as the model
    biased: bool = False  # experts have biases

    def __post_init__(self) -> None:
        object.__setattr__(self, "head", self.head or self.width // self.heads)

    @property
    def layer(self) -> int:
        """Parameters of a layer's matrices."""
        attention = 2 * self.width * self.head * (self.heads + self.kv_heads)
        return attention + (2 + self.gated) * self.width * self.ffn * self.experts

    @property
    def parameters(self) -> int:
        """Matrices and both embeddings; norms (less than 1 in 10,000) are left out."""
        return self.layers * self.layer + 2 * self.vocab * self.width

    @property
    def active(self) -> int:
        """Those that one token is multiplied with: the chosen experts, the output matrix."""
        idle = (2 + self.gated) * self.width * self.ffn * (self.experts - self.chosen)
        return self.layers * (self.layer - idle) + self.vocab * self.width


def of_model(model: Model, vocab: int, context: int | None = None) -> Shape:
    """The shape of one of our own models."""
    m: Any = model
    sizes = {name: getattr(m, name) for name in ("layers", "width", "heads", "ffn")}
    sizes["head"] = getattr(m, "head_size", 0)
    sizes |= {name: getattr(m, name, usual) for name, usual in (("kv_heads", m.heads), ("experts", 1), ("chosen", 1))}
    rows = flops.padded_vocab(m.vocab or vocab)
    return Shape(**sizes, gated=m.family != "gpt2", vocab=rows, context=context or m.context)


@cache
def published() -> dict[str, tuple[Shape, dict[str, str]]]:
    """Published models by name: shape, and the row of tables/workloads.csv (source, tag, what is assumed)."""
    found = {}
    for row in read(TABLES / "workloads.csv"):
        found[row["name"]] = (Shape(**{k: int(row[k]) for k in FIELDS}), row)  # type: ignore[arg-type]
    return found


def known(name: str) -> tuple[Shape, dict[str, str]] | None:
    """The published model that a table's row calls `name`: the longest name that it begins with, in letters and digits.

    Beside a name with more behind it, a size perhaps, stands the row's own figure, which goes before this one.
    """
    plain = re.sub("[^a-z0-9]", "", name.lower()).removeprefix("meta")
    names = {
        also.replace("_", ""): key for key, (_, row) in published().items() for also in (key, *row["also"].split())
    }
    fitting = [key for key in names if plain.startswith(key)]
    return published()[names[max(fitting, key=len)]] if fitting else None


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


FIELDS = tuple(Shape.__dataclass_fields__)
COUNTS = ("layer_parameters", "active")
PLAN = ("batch", "gpus", "tp", "pp", "cp", "ep", "chunks", "micro_batch", "recompute", "sharding", "stack", "fp8")
KIND = ("rowwise", "async_tp", "deepspeed", "bf16", "parallel_norms", "first_flash", "fused_loss")
DEVICE = ("peak", "matmul", "fp8_matmul", "bandwidth", "bus", "nic", "domain", "architecture")


class Jobs:
    """A table of jobs: `jobs.width` is an array with one entry a job. See job() for how one is made."""

    def __init__(self, jobs: Iterable[Mapping[str, float]]) -> None:
        rows = list(jobs)
        self.columns = {k: np.array([row[k] for row in rows], float) for k in (*FIELDS, *COUNTS, *PLAN, *KIND, *DEVICE)}

    def __getattr__(self, name: str) -> Array:
        return self.__dict__["columns"][name]  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.columns["layers"])

    def take(self, which: Any) -> Jobs:
        """Those at the given indices, or where a mask is true."""
        some = Jobs([])
        some.columns = {k: v[which] for k, v in self.columns.items()}
        return some

    @property
    def dp(self) -> Array:
        """Replicas: GPUs over tp · pp · cp. Experts are spread over replicas."""
        return self.gpus / (self.tp * self.pp * self.cp)

    @property
    def flops(self) -> Array:
        """Of a step, PaLM's convention."""
        token = 6 * self.active + 12 * self.layers * self.heads * self.head * self.context
        return token * self.context * self.batch


def job(shape: Shape, gpu: Gpu, *, gpus: int, batch: int, stack: int, **plan: float) -> dict[str, float]:
    """One job; what `plan` leaves out is 1, or off. `nic` overrides the GPU's own."""
    filled: dict[str, float] = {k: float(getattr(shape, k)) for k in FIELDS}
    filled |= dict.fromkeys(("tp", "pp", "cp", "ep", "chunks", "micro_batch"), 1.0) | dict.fromkeys(KIND, 0.0)
    filled |= {"recompute": 0.0, "sharding": 0.0, "fp8": 0.0, "bf16": 1.0}
    filled |= {"gpus": gpus, "batch": batch, "stack": stack}
    filled |= {"layer_parameters": shape.layer, "active": shape.active}
    filled |= {k: getattr(gpu, k) for k in ("peak", "matmul", "bandwidth", "bus", "nic", "domain")}
    filled |= {"fp8_matmul": gpu.fp8, "architecture": ARCHITECTURES.index(gpu.architecture)}
    filled["parallel_norms"] = float(stack != Stack.MEGATRON)
    return filled | plan
