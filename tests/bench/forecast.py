"""Predicted against measured, on this machine: `make bench-forecast`.

Step times of 4 and 8 CPU ranks, by the projector's model of this machine (`colossus probe` is run first), anchored on
what 1 and 2 ranks measured; and the goodput of a drill, by what a fault cost in another drill with more of them and
another seed; the peak of a rank by `colossus plan`. Ranks share 2 cores here, and other work is on them: what is shown
is the arithmetic, not a cluster.
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
from train.scale import failures

KEYS = ["data=synthetic", "data.synthetic_tokens=400_000", "data.tokenizer.vocab=1000", "accelerator=cpu", "logger=[]"]
KEYS += ["eval.every=0", "checkpoint.every=0", "precision=fp32"]
STEP = ["model=llama_micro", "batch.sequences=32", "batch.micro_batch=4", "log.every=4"]
DRILL = [
    "model=llama_micro",
    "model.context=32",
    "batch.sequences=16",
    "devices=2",
    "steps=600",
    "recovery.restarts=100",
]
DRILL += ["faults=drill", "faults.kinds=[kill,exception,hang]", "faults.phases=[forward,backward,reduce,optimizer]"]


def colossus(*arguments: str) -> str:
    command = [Path(sys.executable).with_name("colossus"), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def ranks(folder: str, rounds: int, steps: int) -> dict[str, Any]:
    """By number of ranks: seconds a step as measured and as predicted, the median of interleaved runs."""
    found: dict[int, list[tuple[float, float]]] = {}
    for turn in range(rounds):
        for world in (1, 2, 4, 8):
            name = f"w{world}-{turn}"
            colossus("train", *KEYS, *STEP, f"devices={world}", f"steps={steps}", f"runs={folder}", f"name={name}")
            run = Run(Path(folder) / name)
            one = anchor(run.path, run.last("start"), run.summary["tokens_per_s"])
            found.setdefault(world, []).append((one.measured, one.predicted))
    times = {world: [statistics.median(x) for x in zip(*pairs, strict=True)] for world, pairs in found.items()}
    ratio = statistics.mean(times[w][0] / times[w][1] for w in (1, 2))
    rows = [
        {"ranks": w, "measured": m, "predicted": p, "anchored": ratio * p, "error": ratio * p / m - 1, "anchor": w <= 2}
        for w, (m, p) in times.items()
    ]
    return {"ratio": ratio, "rows": rows}


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--faults", type=int, nargs=2, default=(24, 8))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        colossus("probe", "seconds=0.5", "format=json")
        measured = ranks(folder, options.rounds, options.steps)
        for row in measured["rows"]:
            print(row, flush=True)
        memory = peaks(folder)
        print(memory, flush=True)
        many, few = (drill(folder, f"drill{i}", count, i) for i, count in enumerate(options.faults))
    cost = (many["wall_s"] - many["useful_s"]) / many["faults"]
    predicted = failures.in_place(0.0, cost, few["useful_s"] / few["faults"])
    print(f"a fault costs {cost:.2f} s; goodput {100 * predicted:.1f} % predicted, {100 * few['share']:.1f} % measured")
    drills = {"many": many, "few": few, "fault_s": cost, "predicted": predicted}
    report.write(
        "forecast", "make bench-forecast", cores=hardware.cores(), ranks=measured, drills=drills, memory=memory
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
