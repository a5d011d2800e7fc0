"""What breaks, how often, what a failure costs, and how often to save: closed forms, and a simulation that agrees.

Failures come as a Poisson process, and all ranks wait until the run is back. It restarts from its last checkpoint, and
what was lost is computed again; or it goes on in place with what the survivors have.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import yaml

from train.config import CONFIGS
from train.scale.workload import Array


def mean_time(gpus: int, per_million: float) -> float:
    """Seconds between interruptions of a job; `per_million` GPU hours."""
    return 3600e6 / (gpus * per_million)


@cache
def causes() -> list[dict[str, Any]]:
    """Llama 3's interruptions by cause (configs/faults/llama3.yaml): count, rate a GPU hour, and what goes:

    a GPU, a node, what is behind a switch, or a power domain.
    """
    table = yaml.safe_load((CONFIGS / "faults" / "llama3.yaml").read_text())["table"]
    hours = table["gpus"] * table["days"] * 24
    rows = table["causes"].items()
    known = {"switch_or_cable": "switch", "power_supply": "power"}
    takes = {c: known.get(c, "node" if "node" in r else "gpu") for c, r in rows}
    return [{"cause": c, "count": r["count"], "rate": r["count"] / hours, "takes": takes[c]} for c, r in rows]


def wide_share() -> float:
    """Of Llama 3's interruptions those of a switch, a cable or a power domain, which can take several nodes at once."""
    found = causes()
    return float(sum(c["count"] for c in found if c["takes"] in ("switch", "power")) / sum(c["count"] for c in found))


def young(save: float, between: float) -> float:
    """Seconds of work between checkpoints, first order (J. W. Young, 1974)."""
    return math.sqrt(2 * save * between)


def daly(save: float, between: float) -> float:
    """The same to a higher order (J. T. Daly, 2006); a checkpoint stalls the run for `save` seconds."""
    if save >= 2 * between:
        return between
    root = math.sqrt(save / (2 * between))
    return young(save, between) * (1 + root / 3 + save / (18 * between)) - save


def goodput(interval: float, save: float, recover: float, between: float) -> float:
    """Share of the time that ends up in the result, exactly, for restarts from checkpoints `interval` of work apart."""
    lost, work = math.exp(min(recover / between, 300.0)), math.expm1(min((interval + save) / between, 300.0))
    return interval / (between * lost * work)


def in_place(step: float, recover: float, between: float) -> float:
    """The same where survivors go on: a failure costs `recover` seconds and half a step."""
    return 1 / (1 + (recover + step / 2) / between)


def correlated(stay: float, restart: float, interval: float, save: float, between: float, wide: float) -> float:
    """In place, except for the share `wide` of failures that take more than one node: those restart from a checkpoint.

    To first order in the rates; a restart loses half an interval besides.
    """
    lost = (1 - wide) * stay + wide * (restart + (interval + save) / 2)
    return 1 / (1 + lost / between) / (1 + save / interval)


def ettr(rate: float, init: float, interval: float, save: float) -> float:
    """Meta's estimate of effective training time (arXiv 2410.21680): rate in failures a second of the whole job."""
    return (1 - rate * (init + interval / 2)) / (1 + save / interval)


def simulate(
    interval: float | Array, save: float, recover: float, between: float, *, days: float, runs: int, seed: int = 0
) -> Array:
    """Goodput of `runs` simulated trainings, all from failure to failure at once; a row for each of many intervals."""
    random, horizon = np.random.default_rng(seed), days * 86400
    clock, done = np.zeros(runs), np.zeros(np.broadcast_shapes(np.shape(interval), (runs,)))
    while (clock < horizon).any():
        span = np.minimum(random.exponential(between, runs), np.maximum(horizon - clock, 0))
        started = np.where(clock == 0, 0, recover)  # nothing to recover from before the first failure
        segments = np.floor(np.maximum(span - started, 0) / (interval + save))
        done += segments * interval
        clock += span
    return done / horizon


def best_by_simulation(save: float, recover: float, between: float) -> float:
    """The interval with the best mean of 200 simulated runs, on a grid of tenths around Young's."""
    grid: Array = young(save, between) * 1.1 ** np.arange(-8.0, 9.0)
    means = simulate(grid[:, None], save, recover, between, days=200 * between / 86400, runs=200).mean(1)
    return float(grid[means.argmax()])


def recovery(gpus: int, state: float, nic: float, step: float) -> dict[str, dict[str, float]]:
    """Seconds by part, for a restart and in place. `state` in bytes: all of it, 13 a parameter (DGXC's checkpoints).

    Groups: 30 s at 10,000 GPUs (arXiv 2402.15627, section 3.5), linear. Storage: 2 TB/s (arXiv 2407.21783). Finding the
    failure, replacing the node and the first steps are assumed: 60, 120 and 60 s; in place 5, 0 and 0, from spares.
    """
    groups = 30 * gpus / 10_000
    parts = ("find", "replace", "groups", "read", "first_steps")
    restart, stay = (60.0, 120.0, groups, state / 2e12, 60 + 2 * step), (5.0, 0.0, groups, state / gpus / nic, 0.0)
    return {"restart": dict(zip(parts, restart, strict=True)), "in_place": dict(zip(parts, stay, strict=True))}
