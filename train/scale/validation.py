"""What the projector is worth: its error on published runs that it was not fitted to, computed anew each time.

Zero-shot: a source's runs, by a fit that has not seen that source. Anchored: the same predictions, all scaled so that
one of the source's rows is met; the mean over every choice of that row, over all the other rows. Constant MFU is the
baseline: the share of the peak that one row has, for the others. Sources count alike in means.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from train.scale.calibrate import SOURCES, calibration_set, fit, jobs_of
from train.scale.memory import points
from train.scale.step_time import CALIBRATION, Calibration, calibration, step_time
from train.scale.tables import Run, number, published
from train.scale.workload import Array, read

MEGATRON = ("Megatron-LM SC21 Table 1", "Reducing Activation Recomputation Table 5", "Llama 3 Table 4", "MT-NLG 530B")


def ratios(runs: list[Run], c: Calibration) -> Array:
    """Predicted over measured."""
    return np.asarray(step_time(jobs_of(runs), c) / np.array([run.measured for run in runs]))


def error(ratio: Array) -> float:
    """Mean absolute error, a proportion."""
    return float(np.abs(ratio - 1).mean())


def anchored(ratio: Array) -> float | None:
    """The same once one row is met, over every choice of that row; None for a single row."""
    n = len(ratio)
    if n < 2:
        return None
    return float(np.abs(ratio[None, :] / ratio[:, None] - 1).sum() / (n * (n - 1)))


def by_source(runs: list[Run]) -> dict[str, list[Run]]:
    return {name: [r for r in runs if r.source == name] for name in dict.fromkeys(run.source for run in runs)}


def unseen(runs: list[Run]) -> dict[str, Array]:
    """Each source's ratios, by a fit without it: the frozen one where it is no part of the calibration set."""
    usable = [run for run in runs if run.usable]
    found = {}
    for name, some in by_source(usable).items():
        seen = name in SOURCES
        c = fit(calibration_set([r for r in usable if r.source != name])) if seen else calibration()
        found[name] = ratios(some, c)
    return found


def constant_mfu(runs: list[Run]) -> float | None:
    """The baseline's anchored error: the time that one row's MFU gives the others, over theirs."""
    jobs = jobs_of(runs)
    return anchored(jobs.flops / (jobs.gpus * jobs.peak) / np.array([run.measured for run in runs]))


def errors_per_source(runs: list[Run], c: Calibration) -> list[dict[str, Any]]:
    """Of any table: rows, how many are predicted, how many of these were measured, and the frozen fit's error."""
    result = []
    for name, some in by_source(runs).items():
        measured = [run for run in some if run.usable]
        ratio = ratios(measured, c)
        result.append(
            {
                "source": name,
                "rows": len(some),
                "predicted": sum(run.job is not None for run in some),
                "measured": len(measured),
                "error": error(ratio) if measured else None,
                "bias": float(ratio.mean() - 1) if measured else None,
                "anchored": anchored(ratio),
                "constant_mfu_anchored": constant_mfu(measured),
                "left_out": dict(Counter(run.why_not for run in some if run.why_not)),
            }
        )
    return result


def validate() -> dict[str, Any]:
    """Everything that `show=validation` prints."""
    runs = published()
    usable = [run for run in runs if run.usable]
    zero = unseen(runs)
    sources = errors_per_source(runs, calibration())
    for entry in sources:
        name = entry["source"]
        entry["calibrated"] = name in SOURCES
        entry["zero_shot"] = error(zero[name]) if name in zero else None
        entry["zero_shot_anchored"] = anchored(zero[name]) if name in zero else None
    family = {name: error(zero[name]) for name in MEGATRON}
    return {
        "sources": sources,
        "means": {
            "zero_shot": _mean(entry["zero_shot"] for entry in sources),
            "zero_shot_anchored": _mean(entry["zero_shot_anchored"] for entry in sources),
            "frozen": _mean(entry["error"] for entry in sources),
            "frozen_anchored": _mean(entry["anchored"] for entry in sources),
            "constant_mfu_anchored": _mean(entry["constant_mfu_anchored"] for entry in sources),
            "megatron_family": _mean(family.values()),
            "megatron_family_without_mt_nlg": _mean(v for k, v in family.items() if k != "MT-NLG 530B"),
        },
        "small_to_large": _small_to_large(usable),
        "plans": _plans(usable),
        "ablation": _ablation(usable),
        "memory": points(),
    }


def _mean(values: Any) -> float:
    return float(np.mean([value for value in values if value is not None]))


def _small_to_large(usable: list[Run]) -> dict[str, Any]:
    """Fitted to all runs on at most 128 GPUs, whoever's; tried on those on 1,024 and more."""
    size = {id(run): number(run.row, "gpus") or 0 for run in usable}
    c = fit([run for run in usable if size[id(run)] <= 128])
    large = by_source([run for run in usable if size[id(run)] >= 1024])
    found = {name: ratios(some, c) for name, some in large.items()}
    return {
        "sources": {name: error(r) for name, r in found.items()},
        "anchored": {name: anchored(r) for name, r in found.items()},
        "mean": _mean(error(r) for r in found.values()),
        "mean_anchored": _mean(anchored(r) for r in found.values()),
    }


def _plans(usable: list[Run]) -> dict[str, Any]:
    """Of several plans for one job: is the order right? Spearman's correlation, and what the chosen one costs."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in usable:
        key = tuple(run.row.get(k, "") for k in ("source", "model", "gpus", "global_batch_seqs", "seq", "precision"))
        groups.setdefault(key, []).append(run)
    rank, regret, best = [], [], 0
    vtrain = fit(calibration_set([run for run in usable if run.source != "vTrain ground truth"]))
    for some in groups.values():
        plans = {tuple(run.row.get(k, "") for k in ("TP", "PP", "CP", "microbatch", "VP")) for run in some}
        if len(plans) == len(some) >= 4:
            c = vtrain if some[0].source == "vTrain ground truth" else calibration()
            measured = np.array([run.measured for run in some])
            predicted = step_time(jobs_of(some), c)
            one, other = (np.argsort(np.argsort(values)) for values in (measured, predicted))
            rank.append(float(np.corrcoef(one, other)[0, 1]))
            regret.append(float(measured[predicted.argmin()] / measured.min() - 1))
            best += regret[-1] == 0
    return {"jobs": len(rank), "spearman": _mean(rank), "best_chosen": best, "regret": _mean(regret)}


def _ablation(usable: list[Run]) -> list[dict[str, Any]]:
    """Each term taken away, all else fitted again: mean error on the sources never fitted, and on those fitted."""
    fitted = calibration_set(usable)

    def errors(fixed: dict[str, float]) -> tuple[float, float]:
        c = fit(fitted, fixed)
        per = {name: error(ratios(some, c)) for name, some in by_source(usable).items()}
        return _mean(per[n] for n in per if n not in SOURCES), _mean(per[n] for n in per if n in SOURCES)

    whole = errors({})
    table: list[dict[str, Any]] = [{"term": "none", "held_out": whole[0], "calibrated": whole[1]}]
    for row in read(CALIBRATION):
        if row["off"]:
            held, seen = errors({row["name"]: float(row["off"])})
            table.append({"term": row["what"], "held_out": held, "calibrated": seen})
    return table
