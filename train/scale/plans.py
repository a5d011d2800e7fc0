"""Ways of cutting a job for a cluster, and the best of them: what fits, and then what is fastest.

Plans are cut for Transformer Engine's kernels, experts spread over replicas, pipelines in pieces of one layer.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from train.checks import require
from train.commands import Scale
from train.scale import memory
from train.scale.hardware import Cluster, Gpu
from train.scale.step_time import breakdown, calibration, step_time
from train.scale.workload import Array, Jobs, Recompute, Shape, Sharding, Stack, job

KEYS = ("tp", "pp", "cp", "ep", "micro_batch")
FULL = 0.95  # of a GPU's memory that a plan may take


@dataclass(frozen=True, slots=True)
class Best:
    """Of all plans, by index: their jobs on each kind of GPU, seconds a step of the slowest kind, memory as a share."""

    kinds: list[Jobs]
    seconds: Array
    need: Array
    order: list[int]  # what fits first, the fastest of it first

    @property
    def jobs(self) -> list[Jobs]:
        """The best plan's, on each kind of GPU."""
        return [kind.take([self.order[0]]) for kind in self.kinds]

    @property
    def step(self) -> float:
        return float(self.seconds[self.order[0]])

    @property
    def fits(self) -> bool:
        return bool(self.need[self.order[0]] <= FULL)

    def described(self, i: int) -> dict[str, Any]:
        plan = {k: int(getattr(self.kinds[0], k)[i]) for k in (*KEYS, "chunks", "dp", "gpus")}
        return plan | {"recompute": Recompute(int(self.kinds[0].recompute[i])).name.lower()}

    def parts(self) -> dict[str, float]:
        """Where the time goes on the slowest kind; the parts add up to the step."""
        slow = max(self.jobs, key=lambda j: float(step_time(j, calibration())[0]))
        return {k: float(v[0]) for k, v in breakdown(slow, calibration()).items()}

    def mfu(self, there: Cluster) -> float:
        """A proportion, of the peaks of the kinds as the cluster has them."""
        peak = sum(gpu.peak * count for gpu, count in there.gpus) / there.size
        return float(self.jobs[0].flops[0] / (self.jobs[0].gpus[0] * peak) / self.step)


def best(config: Scale, there: Cluster, shape: Shape, limit: int) -> Best:
    """Raises Refused where no plan cuts the batch and the layers on so many GPUs."""
    plans = _plans(config, shape, limit)
    why = f"no such plan cuts {config.batch} sequences and {shape.layers} layers on {limit:,} GPUs"
    require(bool(plans), "batch", why)
    kinds = [_jobs(config, shape, there, gpu, plans) for gpu, _ in there.gpus]
    seconds = np.max([step_time(jobs, calibration()) for jobs in kinds], axis=0)
    need = np.max([memory.total(jobs) / gpu.memory for jobs, (gpu, _) in zip(kinds, there.gpus, strict=True)], axis=0)
    return Best(kinds, seconds, need, np.lexsort((seconds, need > FULL)).tolist())


def _plans(config: Scale, shape: Shape, limit: int) -> list[dict[str, float]]:
    """All that divide batch, layers and experts; replicas are as many as the batch can be cut for."""
    powers = [2**k for k in range(8)]
    ranges = {
        "tp": [n for n in powers[:4] if shape.kv_heads % n == 0 or shape.heads % n == 0],
        "pp": [n for n in range(1, 65) if shape.layers % n == 0 or (shape.layers + 2) % n == 0],
        "cp": [n for n in powers[:5] if shape.context // n >= 2048 or n == 1],
        "ep": [n for n in powers if shape.experts % n == 0] if shape.experts > 1 else [1],
        "micro_batch": [1, 2, 4],
    }
    chosen = [[getattr(config, key)] if getattr(config, key) else ranges[key] for key in KEYS]
    names = ("none", "selective", "full")
    kinds = range(3) if config.recompute == "auto" else (names.index(config.recompute),)
    each = {n: config.batch // n if config.batch % n == 0 else 0 for n in chosen[-1]}  # micro-batches, of all replicas
    divide = {size: [n for n in range(1, whole + 1) if whole % n == 0] for size, whole in each.items()}
    found = []
    for tp, pp, cp, ep, size in product(*chosen):
        room = bisect_right(divide[size], limit // (tp * pp * cp))
        replicas = divide[size][room - 1] if room else 0
        if not replicas or replicas % ep or shape.experts % ep:
            continue
        chunks = max(1, round(shape.layers / pp)) if pp > 1 else 1
        plan = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "micro_batch": size, "chunks": chunks}
        found += [plan | {"gpus": tp * pp * cp * replicas, "recompute": kind} for kind in kinds]
    return found


def _jobs(config: Scale, shape: Shape, there: Cluster, gpu: Gpu, plans: list[dict[str, float]]) -> Jobs:
    fp8 = config.precision == "fp8"
    require(not fp8 or gpu.fp8 > 0, "precision", f"{gpu.name} has no fp8: use bf16")
    share = there.figures["throughput"].value if "throughput" in there.figures else 1.0
    fixed: dict[str, Any] = {"stack": Stack.ENGINE, "sharding": Sharding[config.sharding.upper()], "fp8": float(fp8)}
    jobs = Jobs([job(shape, gpu, gpus=1, batch=config.batch, nic=gpu.nic * share, **fixed)]).take([0] * len(plans))
    jobs.columns |= {key: np.array([plan[key] for plan in plans], float) for key in plans[0]}
    return jobs
