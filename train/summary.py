"""The summary of a run, computed from its events alone, across restarts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from train.economy import economy
from train.ledger import ledger


def summarize(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """At least: steps final_loss val_bpb tokens tokens_per_s mfu waiting economy world_sizes state_sha256 goodput.

    A step that was computed again after a restart counts once. What lies behind the step that a restart went on from
    is no longer part of the run: its steps are redone work in `goodput`, its evaluations and its end do not count.
    `waiting`: for what share of the time the rank that waits least, the mean one, the one that waits most waits for the
    sum of the gradients; None where one rank was alone.
    """
    records = list(records)
    paces = [record for record in records if record["kind"] == "throughput"]
    mfus = [pace["mfu"] for pace in paces if pace["mfu"] is not None]
    waits = [pace["waiting"] for pace in paces if pace.get("waiting")]
    steps: dict[int, dict[str, Any]] = {}
    scores: dict[int, dict[str, Any]] = {}
    finished: dict[str, Any] | None = None
    for record in records:
        kind = record["kind"]
        if kind == "step":
            steps[record["step"]] = record
        elif kind == "start":
            steps = {number: step for number, step in steps.items() if number <= record["step"]}
            scores = {step: score for step, score in scores.items() if step <= record["step"]}
            finished = None
        elif kind == "eval":
            scores[record["step"]] = record
        elif kind == "end":
            finished = record
    newest = steps[max(steps)] if steps else None
    score = scores[max(scores)] if scores else None
    ways = {"least": list(map(min, waits)), "mean": list(map(statistics.mean, waits)), "most": list(map(max, waits))}
    return {
        "steps": (newest or finished or {"step": 0})["step"],  # none of its own, where all was fetched
        "stopped": finished["stopped"] if finished else True,
        "final_loss": newest["loss"] if newest else None,
        "val_loss": score["loss"] if score else None,
        "val_bpb": score["bpb"] if score else None,
        "tokens": newest["tokens"] if newest else 0,
        "tokens_per_s": statistics.median(pace["tokens_per_s"] for pace in paces) if paces else None,
        "mfu": statistics.median(mfus) if mfus else None,
        "waiting": {name: statistics.median(shares) if shares else None for name, shares in ways.items()},
        "economy": economy(records),
        "world_sizes": [record["world"] for record in records if record["kind"] == "start"],
        "state_sha256": finished["state_sha256"] if finished else None,
        "yardsticks": finished["yardsticks"] if finished else {},
        "goodput": ledger(records),
    }
