"""This machine as hardware: GPUs by their name's figures, a CPU by what `colossus probe` measured and kept.

A core is a device; more ranks than cores share them. What is not measured is not known, and named.
"""

from __future__ import annotations

from dataclasses import replace

import yaml

from train import hardware
from train.checks import Refused, needed, require
from train.scale.hardware import Cluster, Gpu, gpu_of, gpus
from train.scale.step_time import calibration, step_time
from train.scale.workload import Jobs, Shape, Sharding, Stack, job


def measured() -> Gpu | None:
    """A core of this machine's processor, as the probe left it; None where it never ran."""
    path = hardware.kept()
    if not path.exists():
        return None
    try:
        return gpu_of(path, yaml.safe_load(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError, Refused) as error:
        raise Refused("cluster", f"{path} cannot be read: run `colossus probe` again") from error


def cluster(name: str) -> Cluster:
    """nvidia-smi's GPUs, else this machine's cores."""
    there = [gpu.name for gpu in hardware.gpus()]
    if not there:
        why = "nvidia-smi shows no GPU: `colossus probe` measures the CPU, or name a cluster"
        found = needed(measured(), "cluster", why)
        return Cluster(name=name, gpus=((found, found.domain),), figures={})
    return Cluster(name=name, gpus=tuple((of(one), there.count(one)) for one in dict.fromkeys(there)), figures={})


def of(device: str) -> Gpu:
    """What a run says that it ran on: a GPU by its name; of a CPU it knows no name, so this machine's is taken."""
    known, table = {gpu.name: gpu for gpu in gpus().values()}, hardware.devices()
    if device in table and table[device].name in known:
        return known[table[device].name]
    require(device.startswith("cpu"), "cluster", f"'{device}' has no figures: add it to configs/hardware")
    return needed(measured(), "run", "nothing is known of this machine's CPU yet: `colossus probe` measures it")


def seconds(
    gpu: Gpu, shape: Shape, *, ranks: int, batch: int, micro_batch: int, precision: str, sharding: str, compiled: bool
) -> float:
    """A step of `colossus train` on so many ranks. `batch`: sequences, those of the fullest rank times the ranks."""
    cpu = gpu.architecture == "cpu"
    known = precision == "bf16" or "fp32_matmul_tflops" in gpu.figures
    require(known, "precision", f"how fast {gpu.name} multiplies in {precision} is not known")
    rate = gpu.matmul if precision == "bf16" else gpu.figures["fp32_matmul_tflops"].value * 1e12
    crowd = max(1.0, ranks / gpu.domain) if cpu else 1.0
    shared = {key: getattr(gpu, key) / crowd for key in ("bandwidth", "bus", "nic")}
    device = replace(gpu, matmul=rate / crowd, domain=ranks if cpu else gpu.domain, **shared)
    cut = {"none": Sharding.NOTHING, "optimizer": Sharding.OPTIMIZER, "full": Sharding.WEIGHTS}[sharding]
    plan = {"sharding": cut, "micro_batch": micro_batch, "stack": Stack.COMPILED if compiled else Stack.EAGER}
    jobs = Jobs([job(shape, device, gpus=ranks, batch=batch, **plan)])  # type: ignore[arg-type]
    hop = gpu.figures["hop_us"].value / 1e6 if "hop_us" in gpu.figures else 0.0  # of a GPU it is in the model
    return float(step_time(jobs, calibration())[0]) + 2 * (ranks - 1) * hop * crowd
