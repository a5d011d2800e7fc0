"""A job on a cluster: the best plan that fits, or the given one, and its time, memory, failures, energy and money.

Plans are cut for Transformer Engine's kernels with a sharded optimizer, experts spread over replicas, pipelines in
pieces of one layer. Each number has its tag; predicted ones the mean error on published runs that were never fitted.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import numpy as np

from train.checks import choice, require
from train.commands import Scale
from train.scale import failures, memory, validation
from train.scale.calibrate import SOURCES
from train.scale.hardware import Cluster, Figure, Gpu, cluster
from train.scale.network import exact_sum
from train.scale.step_time import breakdown, calibration, step_time
from train.scale.tables import published as runs_published
from train.scale.workload import Jobs, Recompute, Shape, Sharding, Stack, job, of_model, published

KEYS = ("tp", "pp", "cp", "ep", "micro_batch")
FULL = 0.95  # of a GPU's memory that a plan may take
IDLE = 0.4  # of a node's power while it waits, assumed


def project(config: Scale) -> dict[str, Any]:
    there, (shape, unknown) = cluster(config.cluster), _workload(config)
    limit = min(config.gpus or there.size, there.size)
    require(config.gpus <= there.size, "gpus", f"{config.gpus:,} are more than the {there.size:,} of {there.name}")
    plans = _plans(config, shape, limit)
    require(
        bool(plans), "batch", f"no such plan cuts {config.batch} sequences and {shape.layers} layers on {limit:,} GPUs"
    )
    kinds = [_jobs(config, shape, there, gpu, plans) for gpu, _ in there.gpus]
    seconds = np.max([step_time(jobs, calibration()) for jobs in kinds], axis=0)
    need = np.max([memory.total(jobs) / gpu.memory for jobs, (gpu, _) in zip(kinds, there.gpus, strict=True)], axis=0)
    order = np.lexsort((seconds, need > FULL))
    one = int(order[0])
    jobs = [kind.take([one]) for kind in kinds]
    step, used = float(seconds[one]), int(jobs[0].gpus[0])
    wrong, bias = held_out()
    about = f"±{100 * wrong:.0f} %, {100 * bias:+.0f} % on the mean"
    slow = max(jobs, key=lambda j: float(step_time(j, calibration())[0]))
    parts = {k: float(v[0]) for k, v in breakdown(slow, calibration()).items()}
    shares = np.array([n for _, n in there.gpus]) / there.size
    paces = np.array([float(step_time(j, calibration())[0]) for j in jobs])
    peak = used * float(shares @ [g.peak for g, _ in there.gpus])
    flops = float(slow.flops[0])
    tokens = config.tokens or 20.0 * shape.active
    steps = tokens / (config.batch * shape.context)
    nic = float(jobs[0].nic[0])
    gradient = exact_sum(
        shape.parameters / float(jobs[0].tp[0] * jobs[0].pp[0] * jobs[0].ep[0]), int(jobs[0].dp[0]), 4, nic
    )
    answer: dict[str, Any] = {
        "job": {
            "parameters": said(shape.parameters, "", "published" if config.workload else "configured"),
            "active_parameters": said(shape.active, "", "published" if config.workload else "configured"),
            "unknown": unknown or "–",
            "tokens": said(tokens, "", *(("configured",) if config.tokens else ("assumed", "20 an active parameter"))),
            "cluster": there.name + ": " + ", ".join(f"{n:,} {g.name}" for g, n in there.gpus),
            "gpus_used": used,
            "gpus_idle": there.size - used,
        },
        "plan": _described(jobs[0], 0) | {"fits": bool(need[one] <= FULL)},
        "step": {
            "seconds": said(step, "s", "predicted", about),
            "mfu": said(100 * flops / peak / step, "%", "predicted", about),
            "constant_mfu": said(flops / peak / config.utilization, "s", "assumed", f"at {config.utilization:.0%}"),
            "shares_by_speed": said(1 / (shares @ (1 / paces)), "s", "predicted", about),
            "memory_a_gpu": said(memory.total(jobs[0])[0] / memory.GIB, "GiB", "predicted", "see show=validation"),
            "sum_of_gradients": said(gradient[0], "s", "predicted", "if nothing hid it"),
            "exact_sum": said(gradient[1], "s", "predicted", "the same along the tree; unmeasured at this size"),
        },
        "where_it_goes": {k: said(v, f"s, {100 * v / step:.1f} %", "predicted") for k, v in parts.items() if v > 0},
        "other_plans": [
            _described(kinds[0], i) | {"seconds": float(seconds[i]), "fits": bool(need[i] <= FULL)} for i in order[1:6]
        ],
    }
    if there.figures:
        answer |= _toll(there, shape, used, step, steps, nic, about)
    return answer


def _workload(config: Scale) -> tuple[Shape, str]:
    if not config.workload:
        return of_model(config.model, config.vocab, config.context or None), ""
    choice(config.workload, "workload", tuple(published()))
    shape, row = published()[config.workload]
    if config.context:
        shape = Shape(**{k: getattr(shape, k) for k in Shape.__dataclass_fields__} | {"context": config.context})
    return shape, row["unknown"]


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
    found = []
    for tp, pp, cp, ep, size in product(*chosen):
        most = limit // (tp * pp * cp)
        replicas = next((n for n in range(min(most, config.batch // size), 0, -1) if config.batch % (n * size) == 0), 0)
        if not replicas or replicas % ep or shape.experts % ep or config.batch % (replicas * size):
            continue
        chunks = max(1, round(shape.layers / pp)) if pp > 1 else 1
        plan = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "micro_batch": size, "chunks": chunks}
        found += [plan | {"gpus": tp * pp * cp * replicas, "recompute": kind} for kind in kinds]
    return found


def _jobs(config: Scale, shape: Shape, there: Cluster, gpu: Gpu, plans: list[dict[str, float]]) -> Jobs:
    fp8 = config.precision == "fp8"
    require(not fp8 or gpu.fp8 > 0, "precision", f"{gpu.name} has no fp8: use bf16")
    share = there.figures["throughput"].value if "throughput" in there.figures else 1.0
    fixed = {"stack": Stack.ENGINE, "sharding": Sharding.OPTIMIZER, "fp8": float(fp8), "nic": gpu.nic * share}
    return Jobs([job(shape, gpu, batch=config.batch, **fixed, **plan) for plan in plans])  # type: ignore[arg-type]


@cache
def held_out() -> tuple[float, float]:
    """Mean absolute error and mean bias of step time, over the sources that were never fitted."""
    runs = [run for run in runs_published() if run.usable and run.source not in SOURCES]
    ratios = [validation.ratios(some, calibration()) for some in validation.by_source(runs).values()]
    return float(np.mean([validation.error(r) for r in ratios])), float(np.mean([r.mean() - 1 for r in ratios]))


def said(value: Any, unit: str, tag: str, about: str = "") -> dict[str, Any]:
    """A figure of the answer."""
    value = value if isinstance(value, int) else float(value)
    return {"value": value, "unit": unit, "tag": tag} | ({"about": about} if about else {})


def _described(jobs: Jobs, i: int) -> dict[str, Any]:
    plan = {k: int(getattr(jobs, k)[i]) for k in (*KEYS, "chunks", "dp", "gpus")}
    return plan | {"recompute": Recompute(int(jobs.recompute[i])).name.lower()}


def _toll(there: Cluster, shape: Shape, used: int, step: float, steps: float, nic: float, about: str) -> dict[str, Any]:
    """Failures, energy and money of the whole training."""
    rate, power, node, pue, price = map(there.figure, ("interruptions", "node_w", "node_gpus", "pue", "price_usd_h"))
    between, state = failures.mean_time(used, rate.value), 13.0 * shape.parameters
    back = {k: sum(v.values()) for k, v in failures.recovery(used, state, nic, step).items()}
    save = 2 + 13.0 * shape.parameters / used / 5e9  # a copy into the host's memory at 5 GB/s a GPU, and a barrier
    tau = failures.daly(save, between)
    share = failures.goodput(tau, save, back["restart"], between)
    stays = failures.in_place(step, back["in_place"], between)
    simulated = failures.simulate(tau, save, back["restart"], between, days=54, runs=200)
    ettr = failures.ettr(1 / between, back["restart"], tau, save)
    days = steps * step / share / 86400
    watts = used * power.value / node.value
    return {
        "failures": {
            "between": said(between / 3600, "h", rate.tag, rate.source),
            "save": said(save, "s", "assumed"),
            "interval_young": said(failures.young(save, between), "s", "predicted"),
            "interval_daly": said(tau, "s", "predicted"),
            "interval_simulated": said(
                failures.best_by_simulation(save, back["restart"], between), "s", "predicted", "a grid of tenths"
            ),
            "restart": said(back["restart"], "s", "assumed"),
            "goodput_restart": said(100 * share, "%", "predicted"),
            "goodput_meta": said(100 * ettr, "%", "predicted", "first order, arXiv 2410.21680"),
            "goodput_simulated": said(100 * float(simulated.mean()), "%", "predicted", "200 runs of 54 days"),
            "in_place": said(back["in_place"], "s", "assumed"),
            "goodput_in_place": said(100 * stays, "%", "predicted"),
        },
        "interruptions_a_day": {
            c["cause"]: said(c["rate"] * used * 24, "", "published", "Llama 3's rate") for c in failures.causes()
        },
        "whole": {
            "steps": said(steps, "", "predicted"),
            "days": said(days, "d", "predicted", about),
            "power": said(watts * pue.value / 1e6, "MW", _weakest(power, pue), "the GPUs' nodes and cooling"),
            "swing": said(watts * (1 - IDLE) / 1e6, "MW", "assumed", f"waiting nodes draw {100 * IDLE:.0f} %"),
            "energy": said(watts * pue.value * days * 24 / 1e9, "GWh", _weakest(power, pue), about),
            "money": said(used * days * 24 * price.value / 1e6, "M USD", price.tag, about),
        },
    }


def _weakest(*figures: Figure) -> str:
    return "assumed" if any(f.tag == "assumed" for f in figures) else figures[0].tag
