"""GPUs and clusters as data: configs/hardware and configs/cluster, each figure with its source and its tag.

A tag says what a number is: `measured`, `datasheet`, `published` (somebody's report) or `assumed`. A figure that is not
there is refused where it is needed, by name; nothing is taken from a similar part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from train.checks import choice, require
from train.config import CONFIGS
from train.economy import prices

TAGS = ("measured", "datasheet", "published", "assumed")
FIGURES = ("oversubscription", "throughput", "node_gpus", "node_w", "pue", "price_usd_h", "interruptions")


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, what it is, and where it is from."""

    value: float
    tag: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What step time and memory need to know of a device; SI units."""

    key: str  # of its file
    name: str
    architecture: str
    memory: float  # bytes
    peak: float  # bf16, dense, FLOP/s
    matmul: float  # the best bf16 matrix product that was measured, FLOP/s
    fp8: float  # the same in fp8; 0: it has none
    bandwidth: float  # of its memory, bytes/s
    bus: float  # bus bandwidth of a collective in one domain, bytes/s
    nic: float  # bytes/s, one direction
    domain: int  # GPUs that one NVLink switch, or one host, joins
    figures: Mapping[str, Figure]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """GPUs by kind, and figures by the names of FIGURES; a figure that is not known is absent."""

    name: str
    gpus: tuple[tuple[Gpu, int], ...]
    figures: Mapping[str, Figure]

    @property
    def size(self) -> int:
        return sum(count for _, count in self.gpus)

    def figure(self, key: str) -> Figure:
        require(key in self.figures, f"cluster.{key}", f"is not known of {self.name}: add it to its file")
        return self.figures[key]


def _figure(key: str, entry: Any) -> Figure:
    whole = isinstance(entry, Mapping) and set(entry) - {"tag"} == {"value", "source"} and bool(entry["source"])
    require(whole, key, "needs a value, a source and a tag")
    tag, value = entry.get("tag", "datasheet"), entry["value"]
    choice(tag, f"{key}.tag", TAGS)
    real = isinstance(value, int | float) and 0 <= value < 1e15
    require(real, f"{key}.value", f"'{value}' is no figure")
    return Figure(float(value), tag, entry["source"])


UNITS = {"memory": ("memory_gb", 1e9), "peak": ("bf16_tflops", 1e12), "matmul": ("matmul_tflops", 1e12)}
UNITS |= {"bandwidth": ("memory_tbs", 1e12), "bus": ("bus_gbs", 1e9), "nic": ("nic_gbs", 1e9)}


def gpu_of(path: Path, entry: dict[str, Any]) -> Gpu:
    figures = {key: _figure(f"{path.name}: {key}", value) for key, value in entry.items() if isinstance(value, dict)}
    for key, _ in UNITS.values():
        require(key in figures, str(path), f"the projector needs {key}: add it, with its source")
    known = {name: figures[key].value * unit for name, (key, unit) in UNITS.items()}
    known["fp8"] = figures["fp8_matmul_tflops"].value * 1e12 if "fp8_matmul_tflops" in figures else 0.0
    own = {key: entry[key] for key in ("name", "architecture", "domain")}
    return Gpu(key=path.stem, figures=figures, **known, **own)  # type: ignore[arg-type]


@cache
def gpus() -> dict[str, Gpu]:
    """The GPUs that can be projected to, by the name of their file and by those in published tables."""
    found: dict[str, Gpu] = {}
    for path in sorted((CONFIGS / "hardware").glob("*.yaml")):
        entry = yaml.safe_load(path.read_text())
        if "published_as" in entry:
            gpu = gpu_of(path, entry)
            found |= dict.fromkeys((gpu.key, *entry["published_as"]), gpu)
    return found


def named(text: str) -> Gpu | None:
    """A GPU as somebody writes it: `NVIDIA H100 SXM`, `h100-80gb-sxm`. A name that is another part's is not taken."""
    plain = {re.sub("[^a-z0-9]", "", name.lower()): gpu for name, gpu in gpus().items()}
    return plain.get(re.sub("[^a-z0-9]|nvidia|gpus?$", "", text.lower()))


def cluster(entry: Mapping[str, Any]) -> Cluster:
    """A composed configs/cluster, except `gpus: here` (here.py). Raises Refused."""
    unknown, keys = set(entry) - {"name", "gpus", *FIGURES}, ", ".join(FIGURES)
    require(not unknown, f"cluster.{min(unknown, default='')}", f"no such key: there are name, gpus, {keys}")
    figures = {key: _figure(f"cluster.{key}", entry[key]) for key in FIGURES if key in entry}
    kinds = []
    require(isinstance(entry["gpus"], Mapping), "cluster.gpus", f"'{entry['gpus']}' is no table of GPUs: use here")
    for key, count in entry["gpus"].items():
        choice(key, "cluster.gpus", tuple(gpus()))
        kinds.append((gpus()[key], int(_figure(f"cluster.gpus.{key}", count).value)))
    size = sum(count for _, count in kinds)
    require(size > 0, "cluster.gpus", "there are none")
    offers = [(found[0], n / size) for gpu, n in kinds if n and (found := prices().get(gpu.key))]
    if "price_usd_h" not in figures and len(offers) == sum(n > 0 for _, n in kinds):
        told = "; ".join(f"{one['cloud']}, {one['date']}, {one['source']}" for one, _ in offers)
        weakest = max((one["tag"] for one, _ in offers), key=TAGS.index)
        figures["price_usd_h"] = Figure(sum(one["value"] * share for one, share in offers), weakest, told)
    return Cluster(name=entry["name"], gpus=tuple((g, n) for g, n in kinds if n), figures=figures)
