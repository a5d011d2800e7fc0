"""A job on a cluster: the best plan that fits, or the given one, and its time, memory, failures, energy and money.

Each number has its tag; predicted ones the mean error on published runs that were never fitted. Where a run of ours is
the job (`Anchor`), what it measured over what is predicted of its own machine scales all times, as far as published
runs of one source would be believed of each other (validation.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from train.checks import Refused, choice, require
from train.commands import MOST_SEQUENCES, Scale
from train.scale import failures, here, law, memory, validation
from train.scale.calibrate import SOURCES
from train.scale.hardware import Cluster, Gpu, cluster
from train.scale.network import exact_sum
from train.scale.plans import FULL, Best, best
from train.scale.step_time import calibration, step_time
from train.scale.tables import published as runs_published
from train.scale.workload import Shape, of_model, published

BATCH = 2048  # sequences, unless somebody says
SIZES = (8, 64, 512, 1000, 4096, 16_384, 32_768, 100_000, 200_000)
# Of a node's power: products at its most; memory and casts; waiting for others, the network or the host. Assumed.
POWER = {"products": 1.0, "attention": 1.0, "head": 1.0, "memory": 0.8, "accumulation": 0.8, "optimizer": 0.8}
IDLE = 0.4
FABRIC = ("tensor", "experts", "context", "gathers", "pipeline", "gradients")  # parts that wait for it


@dataclass(frozen=True, slots=True)
class Anchor:
    """A finished run of ours: seconds a step, as measured and as predicted of the machine it ran on."""

    run: str
    ranks: int
    device: str
    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted

    def share(self, there: Iterable[Gpu], alone: bool) -> float:
        """The power of the ratio that scales times there: on its own kind of device, by data parallelism alone?"""
        same = here.of(self.device).name in {gpu.name for gpu in there}
        return validation.NEAR if same and alone else validation.FAR


def project(config: Scale, anchor: Anchor | None = None) -> dict[str, Any]:
    config = replace(config, batch=config.batch or BATCH)
    own = config.cluster["gpus"] == "here"
    there = here.cluster(config.cluster["name"]) if own else cluster(config.cluster)
    shape, unknown, origin = _workload(config)
    limit = min(config.gpus or there.size, there.size)
    require(config.gpus <= there.size, "gpus", f"{config.gpus:,} are more than the {there.size:,} of {there.name}")
    found = best(config, there, shape, limit)
    jobs = found.jobs
    alone = bool(jobs[0].tp[0] == jobs[0].cp[0] == 1)
    share = anchor.share((gpu for gpu, _ in there.gpus), alone) if anchor else 0.0
    ratio = anchor.ratio**share if anchor else 1.0
    step, used = found.step * ratio, int(jobs[0].gpus[0])
    wrong, bias = held_out()
    about = f"±{100 * wrong:.0f} %, {100 * bias:+.0f} % on the mean"
    if anchor or there.gpus[0][0].architecture == "cpu":
        about = "scaled by the run; how far off is not known" if anchor else "not validated on CPUs"
    shares = np.array([n for _, n in there.gpus]) / there.size
    paces = np.array([float(step_time(j, calibration())[0]) for j in jobs]) * ratio
    mfu, tokens = found.mfu(there), config.tokens or 20.0 * shape.active
    steps = tokens / (config.batch * shape.context)
    sizes = sorted({n for n in SIZES if n < limit} | {limit})
    batches = [n for n in (int(config.batch * times) for times in (0.25, 0.5, 1, 2, 4, 8)) if 0 < n <= MOST_SEQUENCES]
    parts = {k: v for k, v in found.parts().items() if v > 0}
    kinds = ", ".join(f"{n:,} {g.name}" for g, n in there.gpus)
    spent = {k: (v * ratio, f"s, {100 * v / found.step:.1f} %", "predicted") for k, v in parts.items()}
    return {
        "job": figures(
            parameters=(shape.parameters, "", origin),
            active_parameters=(shape.active, "", origin),
            tokens=(tokens, "", *(("configured",) if config.tokens else ("assumed", "20 an active parameter"))),
        )
        | {"unknown": unknown or "–", "cluster": f"{there.name}: {kinds}"}
        | {"gpus_used": used, "gpus_idle": there.size - used},
        "anchor": _anchored(anchor, share, found.step),
        "plan": found.described(found.order[0]) | {"fits": found.fits},
        "step": figures(
            seconds=(step, "s", "predicted", about),
            mfu=(100 * mfu / ratio, "%", "predicted", about),
            constant_mfu=(found.step * mfu / config.utilization, "s", "assumed", f"at {config.utilization:.0%}"),
            shares_by_speed=(1 / (shares @ (1 / paces)), "s", "predicted", about),
            memory_a_gpu=(memory.total(jobs[0])[0] / memory.GIB, "GiB", "predicted", "see show=validation"),
        ),
        "where_it_goes": figures(**spent),
        "other_plans": [
            found.described(i) | {"seconds": float(found.seconds[i] * ratio), "fits": bool(found.need[i] <= FULL)}
            for i in found.order[1:6]
        ],
        "sum_of_gradients": _sums(found, shape, there),
        "learning": _learning(config, shape, tokens, steps * step, about),
        "by_size": _others(((config, n) for n in sizes), there, shape, tokens, ratio),
        "by_batch": _others(((replace(config, batch=n), limit) for n in batches), there, shape, tokens, ratio),
    } | (_toll(there, shape, found, step, steps, about) if there.figures else {})


def _workload(config: Scale) -> tuple[Shape, str, str]:
    """Its shape, what of it is not known, and what its figures are."""
    if not config.workload:
        return of_model(config.model, config.vocab, config.context or None), "", "configured"
    choice(config.workload, "workload", tuple(published()))
    shape, row = published()[config.workload]
    return (replace(shape, context=config.context) if config.context else shape), row["unknown"], row["tag"]


@cache
def held_out() -> tuple[float, float]:
    """Mean absolute error and mean bias of step time, over the sources that were never fitted."""
    runs = [run for run in runs_published(SOURCES) if run.usable]
    ratios = [validation.ratios(some, calibration()) for some in validation.by_source(runs).values()]
    return float(np.mean([validation.error(r) for r in ratios])), float(np.mean([r.mean() - 1 for r in ratios]))


def figures(**found: tuple[Any, ...]) -> dict[str, Any]:
    """Figures of the answer by name: value, unit, tag and perhaps what is to be known of it."""
    names = ("value", "unit", "tag", "about")
    plain = {k: (v[0] if isinstance(v[0], int) else float(v[0]), *v[1:]) for k, v in found.items()}
    return {k: {n: x for n, x in zip(names, v, strict=False) if x or n != "about"} for k, v in plain.items()}


def _anchored(anchor: Anchor | None, share: float, step: float) -> dict[str, Any]:
    if anchor is None:
        return {}
    return {"run": f"{anchor.run}: {anchor.ranks} x {anchor.device}"} | figures(
        measured=(anchor.measured, "s a step", "measured"),
        predicted_there=(anchor.predicted, "s a step", "predicted"),
        ratio=(anchor.ratio, "", "measured", f"to the power of {share:g} it scales all times below (show=validation)"),
        without_it=(step, "s a step", "predicted"),
    )


def _sums(found: Best, shape: Shape, there: Cluster) -> dict[str, Any]:
    """What adding up the gradient takes if nothing hides it, and what it would exactly, with this plan's replicas."""
    j, (gpu, _) = found.jobs[0], there.gpus[0]
    mine, ranks = shape.parameters / float(j.tp[0] * j.pp[0] * j.ep[0]), int(j.dp[0])
    local = max(1, int(gpu.domain / (j.tp[0] * j.cp[0])))
    one = exact_sum(mine, ranks, float(j.nic[0]), gpu.bus, local)
    alone = exact_sum(shape.parameters / float(j.ep[0]), int(j.gpus[0]), float(j.nic[0]), gpu.bus, gpu.domain)

    def told(part: dict[str, float], where: str, of: str) -> dict[str, tuple[Any, ...]]:
        unit = {k: "messages" if "messages" in k else "s" for k in part}
        return {k + where: (v, unit[k], "predicted", f"{of}; unmeasured") for k, v in part.items()}

    lonely = told(alone, "_without_tp_pp", f"data parallel alone on {int(j.gpus[0]):,} GPUs")
    return figures(**told(one, "", f"{ranks:,} replicas of this plan"), **lonely)


def _learning(config: Scale, shape: Shape, tokens: float, seconds: float, about: str) -> dict[str, Any]:
    batch, nats = config.batch * shape.context, law.loss(shape.active, tokens)
    needed = law.tokens_needed(tokens, batch, nats)
    return figures(
        batch=(batch, "tokens", "configured"),
        loss=(nats, "nats a token", "published", law.SOURCE),
        critical_batch=(law.critical_batch(nats), "tokens", "published", law.SOURCE),
        tokens_to_that_loss=(needed, "", "published", "with this batch, by the same laws"),
        days_to_that_loss=(needed / tokens * seconds / 86400, "d", "predicted", f"nothing fails; {about}"),
    )


def _others(
    cases: Iterable[tuple[Scale, int]], there: Cluster, shape: Shape, tokens: float, ratio: float
) -> list[dict[str, Any]]:
    """The job with other batches or on fewer GPUs, each by its best plan: how busy, how long to the same loss."""
    rows, nats = [], law.loss(shape.active, tokens)
    for config, limit in cases:
        try:
            found = best(config, there, shape, limit)
        except Refused:
            continue
        step, used, parts = found.step * ratio, int(found.jobs[0].gpus[0]), found.parts()
        needed = law.tokens_needed(tokens, config.batch * shape.context, nats)
        row = {"batch": config.batch, "gpus": used, "fits": found.fits, "seconds": step}
        row |= {"mfu": found.mfu(there) / ratio, "fabric": sum(parts[k] for k in FABRIC) / found.step}
        row |= {"tokens_to_loss": needed, "days": needed / (config.batch * shape.context) * step / 86400}
        if "interruptions" in there.figures:
            tau, save, back, between = _cycle(shape, used, step, float(found.jobs[0].nic[0]), there)
            row["goodput_restart"] = failures.goodput(tau, save, back["restart"], between)
            row["goodput_in_place"] = failures.in_place(step, back["in_place"], between)
        rows.append(row)
    return list({(row["batch"], row["gpus"]): row for row in rows}.values())


def _cycle(
    shape: Shape, used: int, step: float, nic: float, there: Cluster
) -> tuple[float, float, dict[str, float], float]:
    """Seconds of work between checkpoints (Daly), of a save, of coming back by either way, between failures."""
    between, state = failures.mean_time(used, there.figure("interruptions").value), 13.0 * shape.parameters
    back = {k: sum(v.values()) for k, v in failures.recovery(used, state, nic, step).items()}
    save = 2 + state / used / 5e9  # a copy into the host's memory at 5 GB/s a GPU, and a barrier
    return failures.daly(save, between), save, back, between


def _toll(there: Cluster, shape: Shape, found: Best, step: float, steps: float, about: str) -> dict[str, Any]:
    """Failures, power, energy and money of the whole training."""
    rate, power, node, pue, price = map(there.figure, ("interruptions", "node_w", "node_gpus", "pue", "price_usd_h"))
    used = int(found.jobs[0].gpus[0])
    tau, save, back, between = _cycle(shape, used, step, float(found.jobs[0].nic[0]), there)
    share = failures.goodput(tau, save, back["restart"], between)
    wide = failures.wide_share()
    simulated = failures.simulate(tau, save, back["restart"], between, days=54, runs=200)
    mixed = failures.correlated(back["in_place"] + step / 2, back["restart"], tau, save, between, wide)
    days, megawatts = steps * step / share / 86400, used * power.value / node.value * pue.value / 1e6
    draw = {"busy": 0.0, "memory": 0.0, "waiting": 0.0}
    for part, seconds in found.parts().items():
        level = POWER.get(part, IDLE)
        draw["busy" if level == 1 else "memory" if level > IDLE else "waiting"] += seconds / found.step
    mean = megawatts * (draw["busy"] + 0.8 * draw["memory"] + IDLE * draw["waiting"])
    weakest = "assumed" if "assumed" in (power.tag, pue.tag) else power.tag
    most = f"waiting nodes draw {100 * IDLE:.0f} % of the most"
    daily = {f"{c['cause']} ({c['takes']})": c["rate"] * used * 24 for c in failures.causes()}
    meta = failures.ettr(1 / between, back["restart"], tau, save)
    best_tau = failures.best_by_simulation(save, back["restart"], between)
    return {
        "failures": figures(
            between=(between / 3600, "h", rate.tag, rate.source),
            save=(save, "s", "assumed"),
            interval_young=(failures.young(save, between), "s", "predicted"),
            interval_daly=(tau, "s", "predicted"),
            interval_simulated=(best_tau, "s", "predicted", "a grid of tenths"),
            restart=(back["restart"], "s", "assumed"),
            goodput_restart=(100 * share, "%", "predicted"),
            goodput_meta=(100 * meta, "%", "predicted", "first order, arXiv 2410.21680"),
            goodput_simulated=(100 * float(simulated.mean()), "%", "predicted", "200 runs of 54 days"),
            in_place=(back["in_place"], "s", "assumed"),
            goodput_in_place=(100 * failures.in_place(step, back["in_place"], between), "%", "predicted"),
            goodput_correlated=(100 * mixed, "%", "predicted", f"{100 * wide:.0f} % take switches or power: restart"),
        ),
        "interruptions_a_day": figures(**{k: (n, "", "published", "Llama 3's rate") for k, n in daily.items()}),
        "power": figures(
            most=(megawatts, "MW", weakest, "the GPUs' nodes and cooling"),
            products=(megawatts, f"MW, {100 * draw['busy']:.0f} % of a step", weakest),
            memory=(0.8 * megawatts, f"MW, {100 * draw['memory']:.0f} % of a step", "assumed"),
            waiting=(IDLE * megawatts, f"MW, {100 * draw['waiting']:.0f} % of a step", "assumed", most),
            mean=(mean, "MW", "assumed"),
            swing=(megawatts / pue.value * (1 - IDLE), "MW", "assumed", "all nodes at once, within a step"),
        ),
        "whole": figures(
            steps=(steps, "", "predicted"),
            days=(days, "d", "predicted", about),
            energy=(mean * days * 24 / 1e3, "GWh", "assumed", about),
            money=(used * days * 24 * price.value / 1e6, "M USD", price.tag, about),
        ),
    }
