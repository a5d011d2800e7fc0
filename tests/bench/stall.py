"""How long the survivors stand still when a rank is killed, and when its replacement takes part again.

    make bench-stall

Runs of several sizes and numbers of ranks, with kills in every phase of a step (any rank, rank 0 too). Of each kill, in
seconds:

    noticed    from the kill to the supervisor's `fault` event
    stall      from the kill to the survivors' `regroup` event: they go on with the step in flight
    back       from the `fault` event to the replacement's `regroup` event: it takes part from there on
    handed     what all ranks wait for at that: the state goes over, hands are shaken

Half of them have a spare that stands by (`recovery.spares=1`): there the replacement takes part as soon as the
survivors go on, and what is handed over is part of the stall.

A stall is that of the ranks, not of the work: the leaves that are computed again after it are counted beside it. To
the medians a plane a + b·(bytes of state) + c·(ranks) is fitted by least squares.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench import report
from train import events
from train.ledger import quantile

Kill = dict[str, float]

MODELS = ("llama_micro", "llama_nano")
SMALL = ["data=synthetic", "data.synthetic_tokens=400_000", "data.tokenizer.vocab=512", "model.context=64"]
SMALL += [
    "batch.sequences=16",
    "eval.every=0",
    "eval.tokens=2048",
    "checkpoint.every=0",
    "logger=[]",
    "evidence.digests=true",
]
PHASES = "faults.phases=[forward,backward,reduce,optimizer,commit]"


def kills(
    model: str, ranks: int, spares: int, count: int, steps: int, runs: Path
) -> tuple[int, list[dict[str, float]]]:
    """The model's parameters; the seconds of each kill of a run, and the leaves that were computed again."""
    name = f"{model}-{ranks}-{spares}"
    faults = ["faults=drill", f"faults.count={count}", "faults.kinds=[kill]", PHASES]
    keys = [f"name={name}", f"runs={runs}", f"devices={ranks}", f"steps={steps}", f"model={model}", *SMALL, *faults]
    keys.append(f"recovery.spares={spares}")
    subprocess.run([sys.executable, "-m", "train", *keys], check=True, stdout=subprocess.DEVNULL)
    found: list[Kill] = []
    kill: Kill = {}
    parameters = 0
    for record in sorted(events.read(runs / name / "events.jsonl"), key=lambda record: record["time"]):
        kind, time = record["kind"], record["time"]
        if kind == "start":
            parameters = record["parameters"]
        elif kind == "injected":
            kill = {"at": time}
        elif kind == "fault" and kill:
            kill |= {"fault": time, "noticed": time - kill["at"]}
        elif kind == "regroup" and record["why"] == "lost" and "fault" in kill and "stall" not in kill:
            kill |= {"stall": time - kill["at"], "again": record["redone"]}
            if record["world"] == ranks:  # a spare took its place
                found.append(kill | {"back": time - kill["fault"], "handed": record["seconds"]})
                kill = {}
        elif kind == "regroup" and record["why"] == "joined" and "stall" in kill:
            found.append(kill | {"back": time - kill["fault"], "handed": record["seconds"]})
            kill = {}
    return parameters, found


def row(model: str, ranks: int, spares: int, count: int, spacing: int, runs: Path) -> dict[str, Any]:
    parameters, found = kills(model, ranks, spares, count, count * spacing, runs)
    figures: dict[str, Any] = {"model": model, "parameters": parameters, "ranks": ranks, "spares": spares}
    figures |= {
        "kills": count,
        "followed": len(found),
        "leaves_again": statistics.mean(kill["again"] for kill in found),
    }
    for key in ("noticed", "stall", "back", "handed"):
        values = [kill[key] for kill in found]
        figures[key] = {"p50": statistics.median(values), "p99": quantile(values, 0.99)}
    times = ", ".join(
        f"{key} {figures[key]['p50']:.3f} / {figures[key]['p99']:.3f} s" for key in ("stall", "back", "handed")
    )
    print(f"{model}, {ranks} ranks, {spares} spares: {times} (p50 / p99 of {len(found)})", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=40, help="kills a run")
    parser.add_argument("--spacing", type=int, default=20, help="steps between two kills")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = [(model, ranks, spares) for spares in (0, 1) for model in MODELS for ranks in (2, 4)]
        rows = [row(*setting, options.count, options.spacing, Path(folder)) for setting in settings]
    fits = {}
    without = [figures for figures in rows if not figures["spares"]]
    inputs = np.array([[1, 12 * figures["parameters"], figures["ranks"]] for figures in without])  # weights and moments
    for key in ("stall", "handed"):
        a, b, c = np.linalg.lstsq(inputs, np.array([figures[key]["p50"] for figures in without]), rcond=None)[0]
        fits[key] = {"a_s": a, "b_s_per_byte": b, "c_s_per_rank": c}
    given = f" ARGS='{' '.join(sys.argv[1:])}'" if len(sys.argv) > 1 else ""
    report.write("stall", f"make bench-stall{given}", rows=rows, fit_of_p50=fits)


if __name__ == "__main__":
    main()
