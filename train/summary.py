"""The summary of a run, computed from its events alone, across restarts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any


def summarize(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """At least: steps final_loss val_bpb tokens tokens_per_s mfu world_sizes state_sha256 goodput.

    A step that was computed again after a restart counts once as a step, and as redone work in `goodput`, whose parts
    are seconds: of steps that count, of steps redone, of evaluation, of checkpoints, and the rest of the wall time
    (start-up, warming up, pauses between stop and restart). What lies behind the step that a restart went on from is
    no longer part of the run: its steps are redone work, its evaluations and its end do not count.
    """
    steps: dict[int, dict[str, Any]] = {}
    speeds: list[float] = []
    mfus: list[float] = []
    worlds: list[int] = []
    scores: dict[int, dict[str, Any]] = {}
    finished: dict[str, Any] | None = None
    spent = {"redone": 0.0, "evaluation": 0.0, "checkpoint": 0.0}
    begin = end = None
    for record in records:
        kind = record["kind"]
        begin, end = record["time"] if begin is None else begin, record["time"]
        if kind == "step":
            if record["step"] in steps:
                spent["redone"] += steps[record["step"]]["seconds"]
            steps[record["step"]] = record
        elif kind == "throughput":
            speeds.append(record["tokens_per_s"])
            mfus += [record["mfu"]] if record["mfu"] is not None else []
        elif kind == "start":
            worlds.append(record["world"])
            spent["redone"] += sum(steps.pop(step)["seconds"] for step in list(steps) if step > record["step"])
            scores = {step: score for step, score in scores.items() if step <= record["step"]}
            finished = None
        elif kind == "eval":
            scores[record["step"]] = record
            spent["evaluation"] += record["seconds"]
        elif kind == "checkpoint":
            spent["checkpoint"] += record["seconds"]
        elif kind == "end":
            finished = record
    newest = steps[max(steps)] if steps else None
    score = scores[max(scores)] if scores else None
    useful = sum(record["seconds"] for record in steps.values())
    wall = (end - begin) if begin is not None and end is not None else 0.0
    rest = max(0.0, wall - useful - sum(spent.values()))
    return {
        "steps": newest["step"] if newest else 0,
        "stopped": finished["stopped"] if finished else True,
        "final_loss": newest["loss"] if newest else None,
        "val_loss": score["loss"] if score else None,
        "val_bpb": score["bpb"] if score else None,
        "tokens": newest["tokens"] if newest else 0,
        "tokens_per_s": statistics.median(speeds) if speeds else None,
        "mfu": statistics.median(mfus) if mfus else None,
        "world_sizes": worlds,
        "state_sha256": finished["state_sha256"] if finished else None,
        "yardsticks": finished["yardsticks"] if finished else {},
        "goodput": {
            "wall_s": wall,
            "share": useful / wall if wall else 0.0,
            "seconds": {"steps": useful, **spent, "other": rest},
        },
    }
