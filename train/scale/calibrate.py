"""The fit behind tables/calibration.csv: `python -m train.scale.calibrate` writes it again, to the same numbers.

Least squares on the logarithm of step time, each source counting like at most 12 of its rows, errors beyond 5 % less
than squared. Each number starts at, and is drawn to, what kernels' papers or counting say of it (`prior`, give or take
a factor of e to the `spread`): rows of a table are much alike, and the data alone would leave several open.
"""

from __future__ import annotations

import csv

import numpy as np

from train.scale.step_time import CALIBRATION, Calibration, step_time
from train.scale.tables import Run, published
from train.scale.workload import Array, Jobs, read

# The frozen calibration set. Llama 3, MT-NLG, BLOOM, Nemotron-4, IBM's and Megatron-Bridge's runs are never fitted.
SOURCES = (
    "Megatron-LM SC21 Table 1",
    "Reducing Activation Recomputation Table 5",
    "NVIDIA dgxc-benchmarking",
    "NVIDIA dgxc-benchmarking Grok-1",
    "torchtitan benchmarks",
    "MosaicML llm-foundry benchmarking README",
    "vTrain ground truth",
)
WEIGHT = 12  # rows that a source counts for at most
LINEAR = 0.05  # error beyond which it counts linearly


def calibration_set(runs: list[Run]) -> list[Run]:
    return [run for run in runs if run.usable and run.source in SOURCES]


def weights(runs: list[Run]) -> Array:
    counts = {name: sum(run.source == name for run in runs) for name in {run.source for run in runs}}
    return np.array([min(counts[run.source], WEIGHT) / counts[run.source] for run in runs])


def fit(runs: list[Run], fixed: dict[str, float] | None = None) -> Calibration:
    """Levenberg-Marquardt, deterministic. `fixed` numbers keep a given value (for ablations)."""
    held = fixed or {}
    jobs, measured, weight = jobs_of(runs), np.array([run.measured for run in runs]), weights(runs)
    rows = [row for row in read(CALIBRATION) if row["name"] not in held]
    free, mean = [row["name"] for row in rows], np.log([float(row["prior"]) for row in rows])
    sure = np.array([float(row["spread"]) for row in rows]) ** -2.0

    def errors(x: Array) -> Array:
        ratio: Array = step_time(jobs, _calibration(free, x, held)) / measured
        return np.log(ratio)

    def cost(r: Array, x: Array) -> float:
        size = np.abs(r)
        loss = np.where(size < LINEAR, r * r / 2, LINEAR * size - LINEAR**2 / 2)
        return float((weight * loss).sum() / LINEAR**2 + (sure * (x - mean) ** 2).sum() / 2)

    x, damping, small = mean.copy(), 1e-2, 1e-4
    r = errors(x)
    best = cost(r, x)
    for _ in range(60):
        slopes = np.stack([(errors(x + small * unit) - r) / small for unit in np.eye(len(x))], 1)
        pull = weight / LINEAR**2 * np.where(np.abs(r) < LINEAR, 1, LINEAR / np.maximum(np.abs(r), LINEAR))
        curvature = slopes.T @ (slopes * pull[:, None]) + np.diag(sure)
        downhill = slopes.T @ (pull * r) + sure * (x - mean)
        gain = 0.0
        while damping < 1e6 and not gain:
            step = -np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), downhill)
            tried = x + np.clip(step, -1, 1)
            new = errors(tried)
            if (lower := cost(new, tried)) < best:
                x, r, gain, best, damping = tried, new, best - lower, lower, damping / 5
            else:
                damping *= 5
        if gain < 1e-6 * best:
            break
    return _calibration(free, x, held)


def jobs_of(runs: list[Run]) -> Jobs:
    return Jobs([run.job for run in runs if run.job is not None])


def _calibration(free: list[str], x: Array, held: dict[str, float]) -> Calibration:
    return Calibration(**dict(zip(free, np.exp(x).tolist(), strict=True)), **held)


def main() -> None:
    """Write the values of tables/calibration.csv anew."""
    rows, fitted = read(CALIBRATION), fit(calibration_set(published()))
    with CALIBRATION.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        table.writeheader()
        table.writerows(row | {"value": f"{getattr(fitted, row['name']):.5g}"} for row in rows)


if __name__ == "__main__":
    main()
