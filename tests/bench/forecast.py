"""Predicted against measured, on this machine: `make bench-forecast`.

Steps on 4 and 8 ranks, by the model of this machine (`colossus probe` is run first), anchored as `colossus scale run=`
does on what 1 and 2 ranks measured; and the goodput of a drill, by what a fault cost in another drill with more of them
and another seed; the peak of a rank by `colossus plan`. Ranks share this machine's cores: what is shown is the
arithmetic, not a cluster. Wall time is what is anchored, so the cores must be free: the load beforehand is said.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench import report
from train import hardware
from train.ledger import ledger
from train.outlook import anchor
from train.report.record import Run
from train.scale import failures, here
from train.scale.project import Anchor

KEYS = ["data=synthetic", "data.synthetic_tokens=400_000", "data.tokenizer.vocab=1000", "accelerator=cpu", "logger=[]"]
KEYS += ["eval.every=0", "checkpoint.every=0", "precision=fp32"]
STEP = ["model=llama_micro", "batch.sequences=32", "batch.micro_batch=4", "log.every=4"]
DRILL = [
    "model=llama_micro",
    "model.context=32",
    "batch.sequences=16",
    "devices=2",
    "steps=300",
    "recovery.restarts=100",
]
DRILL += ["faults=drill", "faults.kinds=[kill,exception,hang]", "faults.phases=[forward,backward,reduce,optimizer]"]


def colossus(*arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("colossus")), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def ranks(folder: str, rounds: int, steps: int) -> dict[str, Any]:
    """Steps of 1, 2, 4 and 8 ranks as the command anchors them: medians of interleaved runs."""
    found: dict[int, list[Anchor]] = {}
    load = os.getloadavg()[0]
    if load > hardware.cores() / 2:
        print(f"others are using the cores (load {load:.1f}): these steps will say little", file=sys.stderr)
    for turn in range(rounds):
        for world in (1, 2, 4, 8):
            path = Path(folder) / f"w{world}-{turn}"
            keys = [f"devices={world}", f"steps={steps}", f"runs={folder}", f"name={path.name}"]
            colossus("train", *KEYS, *STEP, *keys)
            run = Run(path)
            found.setdefault(world, []).append(anchor(path, run.last("start"), run.summary["tokens_per_s"]))
    return {"load": load, "rows": anchored([median(some) for some in found.values()])}


def median(runs: list[Anchor]) -> Anchor:
    """The run whose step is the middle one."""
    return sorted(runs, key=lambda run: run.measured)[len(runs) // 2]


def anchored(runs: list[Anchor]) -> list[dict[str, Any]]:
    """Each run's step beside what is predicted of it from a run with fewer ranks: the mean of those of 1 and 2."""
    known = [run for run in runs if run.ranks <= 2]
    rows = []
    for run in runs:
        times = [
            run.predicted * one.ratio ** one.share([here.of(run.device)], alone=True) for one in known if one is not run
        ]
        row = {"ranks": run.ranks, "measured": run.measured, "predicted": run.predicted, "anchor": run in known}
        rows.append(row | {"anchored": statistics.mean(times), "error": statistics.mean(times) / run.measured - 1})
    return rows


def peaks(folder: str) -> list[dict[str, Any]]:
    """Peak bytes of a rank beside `colossus plan`'s, above those of one with next to no model."""
    found, empty = [], 0
    for model in ("llama_micro", "llama_124m"):
        keys = [
            *KEYS,
            f"model={model}",
            "devices=1",
            "batch.virtual_ranks=1",
            "batch.sequences=1",
            "batch.micro_batch=1",
        ]
        keys += ["model.context=512", "steps=2", "log.every=1", f"runs={folder}", f"name={model}"]
        planned = json.loads(colossus("plan", *keys, "format=json"))["bytes_per_rank"]
        colossus("train", *keys)
        peak = max(record["memory_bytes"] for record in Run(Path(folder) / model).of("throughput"))
        empty = empty or peak - planned
        found.append({"model": model, "planned": planned, "peak": peak, "empty": empty})
    return found[1:]


def drill(folder: str, name: str, count: int, seed: int) -> dict[str, Any]:
    colossus(
        "drill", *KEYS, *DRILL, f"faults.count={count}", f"seed={seed}", f"runs={folder}", f"name={name}", "format=json"
    )
    records = [json.loads(line) for line in (Path(folder) / name / "events.jsonl").read_text().splitlines()]
    begin = next(record["time"] for record in records if record["kind"] == "start")
    spent = ledger([record for record in records if record["time"] >= begin])
    struck = sum(record["kind"] == "injected" for record in records)
    return {"faults": struck, "useful_s": spent["seconds"]["steps"], "wall_s": spent["wall_s"], "share": spent["share"]}


def drills(folder: str, counts: list[int]) -> dict[str, Any]:
    many, few = (drill(folder, f"drill{i}", count, i) for i, count in enumerate(counts))
    cost = (many["wall_s"] - many["useful_s"]) / many["faults"]
    predicted = failures.in_place(0.0, cost, few["useful_s"] / few["faults"])
    return {"many": many, "few": few, "fault_s": cost, "predicted": predicted}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--faults", type=int, nargs=2, default=(10, 5))
    parser.add_argument("--only", choices=("ranks", "memory", "drills"))
    options = parser.parse_args()
    path = report.RESULTS / "forecast.json"
    old = json.loads(path.read_text()) if options.only and path.exists() else {}
    parts = {name: old[name] for name in ("ranks", "memory", "drills") if name in old and name != options.only}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        if "ranks" not in parts:
            colossus("probe", "seconds=0.5", "format=json")
            parts["ranks"] = ranks(folder, options.rounds, options.steps)
        if "memory" not in parts:
            parts["memory"] = peaks(folder)
        if "drills" not in parts:
            parts["drills"] = drills(folder, options.faults)
    print(json.dumps(parts, indent=1))
    report.write("forecast", "make bench-forecast", cores=hardware.cores(), **parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
