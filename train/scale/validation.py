"""What the projector is worth: its error on published runs that it was not fitted to, computed anew each time.

Zero-shot: a source's runs, by a fit that has not seen that source. Anchored: the same once one of its rows is known;
the mean over every choice of that row, over all the other rows. Part of a row's error is that row's alone: the others
are divided by it to the power of a share, one for rows like it (ALIKE) and one for the rest. Which shares are best is
asked of the calibrated sources without the one that is scored. Constant MFU is the baseline: one row's share of the
peak, for the others. Sources count alike in means.
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
ALIKE = ("fp8", "rowwise", "context", "tp", "cp", "peak")  # and the model: one job, perhaps on more GPUs
SHARES = np.linspace(0, 1, 11)
FAR, NEAR = 0.1, 0.9  # the best of SHARES on the calibrated sources, each by a fit without it


def ratios(runs: list[Run], c: Calibration) -> Array:
    """Predicted over measured."""
    return np.asarray(step_time(jobs_of(runs), c) / np.array([run.measured for run in runs]))


def error(ratio: Array) -> float:
    """Mean absolute error, a proportion."""
    return float(np.abs(ratio - 1).mean())


def once_met(runs: list[Run], ratio: Array, share: float) -> Array:
    """Mean absolute error of rows unlike a known one and of those like it; `share` of its error is met. They add up."""
    jobs, wrong, n = jobs_of(runs), np.log(ratio), len(runs)
    rows = zip((run.row.get("model", "").lower() for run in runs), *(getattr(jobs, k) for k in ALIKE), strict=True)
    kind = np.unique([str(row) for row in rows], return_inverse=True)[1]
    near = kind[:, None] == kind
    off = np.abs(np.exp(wrong - share * wrong[:, None]) - 1) * ~np.eye(n, dtype=bool)
    return np.array([off[~near].sum(), off[near].sum()]) / (n * (n - 1))


def anchored(runs: list[Run], ratio: Array, far: float = FAR, near: float = NEAR) -> float | None:
    """The whole of it by two shares; None for a single row."""
    return float(once_met(runs, ratio, far)[0] + once_met(runs, ratio, near)[1]) if len(runs) > 1 else None


def best_shares(met: dict[str, list[Array]], without: str = "") -> tuple[float, ...]:
    """For far and near rows, of once_met() by SHARES: those with the least error over all sources but one."""
    return tuple(SHARES[np.sum([met[name] for name in met if name != without], 0).argmin(0)].tolist())


def by_source(runs: list[Run]) -> dict[str, list[Run]]:
    return {name: [r for r in runs if r.source == name] for name in dict.fromkeys(run.source for run in runs)}


def unseen(runs: list[Run]) -> dict[str, Array]:
    """Each source's ratios, by a fit without it: the frozen one where it is no part of the calibration set."""
    usable = [run for run in runs if run.usable]
    found = {}
    for name, some in by_source(usable).items():
        c = fit(calibration_set([r for r in usable if r.source != name])) if name in SOURCES else calibration()
        found[name] = ratios(some, c)
    return found


def constant_mfu(runs: list[Run]) -> float | None:
    """The baseline's anchored error: the time that one row's MFU gives the others, over theirs."""
    jobs = jobs_of(runs)
    return anchored(runs, jobs.flops / (jobs.gpus * jobs.peak) / np.array([run.measured for run in runs]), 1, 1)


def errors_per_source(runs: list[Run], c: Calibration) -> list[dict[str, Any]]:
    """Of any table: rows, how many are predicted, how many of these were measured, and the frozen fit's error."""
    result = []
    for name, some in by_source(runs).items():
        measured = [run for run in some if run.usable]
        ratio = ratios(measured, c)
        entry: dict[str, Any] = {"source": name, "rows": len(some), "measured": len(measured)}
        entry["predicted"] = sum(run.job is not None for run in some)
        entry |= {"error": error(ratio), "bias": float(ratio.mean() - 1)} if measured else {"error": None, "bias": None}
        entry |= {"anchored": anchored(measured, ratio), "constant_mfu_anchored": constant_mfu(measured)}
        entry["left_out"] = dict(Counter(run.why_not for run in some if run.why_not))
        result.append(entry)
    return result


def validate() -> dict[str, Any]:
    """Everything that `show=validation` prints."""
    runs = published()
    usable = [run for run in runs if run.usable]
    zero, by, sources = unseen(runs), by_source(usable), errors_per_source(runs, calibration())
    met = {name: [once_met(by[name], zero[name], share) for share in SHARES] for name in SOURCES}
    for entry in sources:
        some, ratio = by.get(entry["source"], []), zero.get(entry["source"], np.zeros(0))
        entry["calibrated"] = entry["source"] in SOURCES
        entry["zero_shot"] = error(ratio) if some else None
        entry["zero_shot_anchored"] = anchored(some, ratio, *best_shares(met, entry["source"]))
        entry["zero_shot_met_wholly"] = anchored(some, ratio, 1, 1)
    family = [error(zero[name]) for name in MEGATRON]
    means = {key: key for key in ("zero_shot", "zero_shot_anchored", "zero_shot_met_wholly", "constant_mfu_anchored")}
    means |= {"frozen": "error", "frozen_anchored": "anchored"}
    found = {name: _mean(entry[key] for entry in sources) for name, key in means.items()}
    return {
        "sources": sources,
        "means": found | {"megatron_family": _mean(family), "megatron_family_without_mt_nlg": _mean(family[:-1])},
        "anchor": dict(zip(("far", "near"), best_shares(met), strict=True)),
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
    met = {name: anchored(some, found[name]) for name, some in large.items()}
    wrong = {name: error(r) for name, r in found.items()}
    return {"sources": wrong, "anchored": met, "mean": _mean(wrong.values()), "mean_anchored": _mean(met.values())}


def _plans(usable: list[Run]) -> dict[str, Any]:
    """Of several plans for one job: is the order right? Spearman's correlation, and what the chosen one costs."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in usable:
        key = tuple(run.row.get(k, "") for k in ("source", "model", "gpus", "global_batch_seqs", "seq", "precision"))
        groups.setdefault(key, []).append(run)
    rank, regret = [], []
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
    return {"jobs": len(rank), "spearman": _mean(rank), "best_chosen": regret.count(0), "regret": _mean(regret)}


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
