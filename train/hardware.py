"""What this machine is, and what its devices could do at best. No torch: `plan` asks too.

Cores and memory are those that this process may use: a container's quota, not the host's plate. GPUs are asked of
`nvidia-smi`, so that the parent process never opens CUDA. Peaks come from `configs/hardware/*.yaml`, each with its
source, under the exact name that the driver prints; a device that is not there has no peak, and MFU is then "n/a".
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from train.checks import Refused
from train.config import CONFIGS

BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # the last one is Arm's; without any bf16 is slower than fp32
PEAKS = ("bf16", "tf32", "fp32")
SCALE = ("fp8_tflops", "matmul_tflops", "fp8_matmul_tflops", "memory_tbs", "bus_gbs", "nic_gbs", "tdp_w")  # train/scale
MIB = 2**20


def cache_folder() -> Path:
    """Where this machine keeps what it need not make again: $XDG_CACHE_HOME/pocket-colossus."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pocket-colossus"


def kept() -> Path:
    """What `colossus probe` measured of this machine, in the format of configs/hardware; it may not be there."""
    return cache_folder() / "here.yaml"


def compiler() -> str:
    """By which torch.compile makes code for a CPU (torch/_inductor/config.py, `cpp.cxx`); it may not be there."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str  # as the driver prints it
    memory: int  # bytes


def processor(root: Path = Path("/")) -> tuple[str, tuple[str, ...]]:
    """The CPU's name ("unknown" where /proc does not say) and those of its flags that mean bf16."""
    text = _read(root / "proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    known = flags[1].split() if flags else []
    return (name[1].strip() if name else "unknown"), tuple(flag for flag in BF16_FLAGS if flag in known)


def cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may use: its affinity, and the quota of its cgroups rounded down; at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [math.inf]
    for folder in _cgroups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")  # version 2: "150000 100000", or "max 100000"
        quota = quota or _read(folder / "cpu.cfs_quota_us")  # version 1: -1 for none
        period = period or _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return max(1, int(min(affinity, *quotas)))


def memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: of the machine and of each cgroup above it, the least. 0: unknown."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    free = [int(found[1]) * 1024] if found else []
    for folder in _cgroups(root, "memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            # A page cache that nobody has open is counted as used, and given back when it is needed.
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", _read(folder / "memory.stat"), re.MULTILINE)
            free.append(int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return max(0, min(free, default=0))


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's cgroup and of those above it, versions 1 and 2. Some may not be visible."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / ("" if number == "0" else controller)
            folder = top / path.lstrip("/")
            yield from (f for f in (folder, *folder.parents) if f.is_relative_to(top) and f.is_dir())


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


# -------------------------------------------------------------------------------------------------- GPUs


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA would show this process; none where nvidia-smi is absent or fails.

    CUDA_VISIBLE_DEVICES is read as CUDA does: indices or UUIDs, in that order, up to the first that is not there.
    Parts of a GPU (MIG) are not listed by this query and count as not there.
    """
    query = ["nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    found = {}
    for line in output.splitlines():
        match [part.strip() for part in line.split(",")]:
            case [uuid, name, mib] if mib.isdigit():
                found[uuid] = Gpu(name, int(mib) * MIB)
    return tuple(found[uuid] for uuid in _visible(list(found), os.environ.get("CUDA_VISIBLE_DEVICES")))


def _visible(uuids: list[str], wanted: str | None) -> list[str]:
    if wanted is None:
        return uuids
    result: list[str] = []
    for word in (w.strip() for w in wanted.split(",")):
        if word.isdigit():
            matches = uuids[int(word) : int(word) + 1]
        else:  # a UUID may be cut short, as long as it names one
            matches = [uuid for uuid in uuids if word and uuid.startswith(word)]
        if len(matches) != 1 or matches[0] in result:
            break
        result += matches
    return result


# ------------------------------------------------------------------------------------------------- peaks


@dataclass(frozen=True, slots=True)
class Device:
    """One entry of configs/hardware: dense peaks in FLOP/s by precision, memory in bytes, both as published."""

    name: str
    memory: int
    peaks: dict[str, float]


@cache
def devices(folder: Path = CONFIGS / "hardware") -> dict[str, Device]:
    """Alias -> device. Raises Refused for an entry without a source, an unknown key, or a name used twice."""
    result: dict[str, Device] = {}
    for path in sorted(folder.glob("*.yaml")):
        entry = yaml.safe_load(path.read_text())
        device = _device(path, entry)
        for alias in entry["aliases"]:
            if alias in result:
                raise Refused(str(path), f"'{alias}' is {result[alias].name} already: one name, one entry")
            result[alias] = device
    return result


def _device(path: Path, entry: dict[str, Any]) -> Device:
    figures = {"memory_gb", *(f"{precision}_tflops" for precision in PEAKS), *SCALE}
    unknown = set(entry) - figures - {"name", "aliases", "published_as", "architecture", "domain"}
    if unknown:
        raise Refused(str(path), f"unknown key {min(unknown)}: use name, aliases, {', '.join(sorted(figures))}")
    for key in figures & set(entry):
        figure = entry[key]
        if not isinstance(figure, dict) or set(figure) - {"tag"} != {"value", "source"} or not figure["source"]:
            raise Refused(str(path), f"{key} needs a value and a source")
    return Device(
        name=entry["name"],
        memory=int(entry["memory_gb"]["value"] * 1e9),
        peaks={p: entry[f"{p}_tflops"]["value"] * 1e12 for p in PEAKS if f"{p}_tflops" in entry},
    )


def peak_flops(name: str, precision: str) -> float | None:
    """Dense peak of the device that the driver calls `name`, FLOP/s; `precision` is bf16, tf32 or fp32.

    None for a device or a figure that the table has not: never a guess, never a near name.
    """
    device = devices().get(name)
    return device.peaks.get(precision) if device else None
