"""Energy and money: measured where the machine has a meter, else estimated; every figure says which.

The kernel counts what CPU packages take, whoever uses them (RAPL; on most machines for root only), the driver what a
GPU takes (NVML). Without either, power is a device's by its data sheet or assumed, as prices are: configs/economy.yaml.
"""

from __future__ import annotations

import ctypes
import time
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from train.config import CONFIGS

Figure = dict[str, Any]  # value, source, tag
METERS = {True: "RAPL: the machine's CPU packages, whoever used them", False: "NVML: rank 0's GPU, times the ranks"}


class Meter:
    def __init__(self, gpu: str | None, root: Path = Path("/sys/class/powercap")) -> None:
        """`gpu`: the UUID of the one that is asked; None: the CPU's packages are."""
        self._gpu, self._zones = gpu, [zone for zone in root.glob("intel-rapl:*") if zone.name.count(":") == 1]
        self._last = self._read()

    def watts(self) -> float | None:
        """The mean since the last call; None without a meter, or where its counter has begun anew."""
        (began, before), (now, after) = self._last, self._read()
        self._last = now, after
        return (after - before) / (now - began) if after > before > 0 else None

    def _read(self) -> tuple[float, float]:
        now = time.monotonic()
        try:
            if self._gpu:
                return now, _nvml(self._gpu)
            return now, sum(int((zone / "energy_uj").read_text()) for zone in self._zones) / 1e6
        except (OSError, ValueError, AttributeError):  # not there, not for us, not known to this driver
            return now, 0.0


def _nvml(uuid: str) -> float:
    """Joules that this GPU has taken since its driver was loaded. **Unmeasured.**"""
    nvml, device, count = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p(), ctypes.c_ulonglong()
    unknown = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device))
    if unknown or nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(count)):
        raise ValueError("the driver does not tell")
    return count.value / 1000


def economy(records: list[dict[str, Any]]) -> dict[str, Figure | None]:
    """Of all ranks: `watts`, `joules_per_token`, `usd_per_million_tokens`; None where no figure is known."""
    start: dict[str, Any] = next((one for one in reversed(records) if one["kind"] == "start"), {})
    about, ranks = start.get("fingerprint", {}), 0
    on_cpu = str(about.get("device", "cpu")).startswith("cpu")
    power, price = _figures("core" if on_cpu else about["device"])
    paces: list[tuple[int, float | None, float]] = []  # devices, watts measured, tokens/s
    for record in records:
        if record["kind"] == "step":
            ranks = record.get("world", 0) * int(about.get("threads_per_rank") or 1)
        elif record["kind"] == "throughput" and ranks:
            paces.append((ranks, record.get("watts"), record["tokens_per_s"]))
    found = dict.fromkeys(("watts", "joules_per_token", "usd_per_million_tokens"))
    told = [(watts * (1 if on_cpu else n), speed) for n, watts, speed in paces if watts is not None]
    if paces and len(told) == len(paces):
        power = {"source": METERS[on_cpu], "tag": "measured"}
    elif power:
        told = [(n * power["value"], speed) for n, _, speed in paces]
    if power and told:
        found["watts"] = power | {"value": median(watts for watts, _ in told)}
        found["joules_per_token"] = power | {"value": median(watts / speed for watts, speed in told)}
    if price and paces:
        value = median(price["value"] * n / 3600 / speed * 1e6 for n, _, speed in paces)
        found["usd_per_million_tokens"] = price | {"value": value}
    return found


@cache
def prices() -> dict[str, list[Figure]]:
    """What clouds ask for an hour of a GPU of configs/hardware, or of a "core"; the first is what is counted with."""
    return dict(yaml.safe_load((CONFIGS / "economy.yaml").read_text())["usd_per_hour"])


@cache
def _figures(device: str) -> tuple[Figure | None, Figure | None]:
    """Watts and USD an hour of a device, as the driver calls it, or of a "core"; None: the tables have it not."""
    watts = yaml.safe_load((CONFIGS / "economy.yaml").read_text())["watts"]
    entries = {path.stem: yaml.safe_load(path.read_text()) for path in (CONFIGS / "hardware").glob("*.yaml")}
    key = next((key for key, entry in entries.items() if device in entry["aliases"]), device)
    return watts.get(key, entries.get(key, {}).get("tdp_w")), next(iter(prices().get(key, [])), None)
