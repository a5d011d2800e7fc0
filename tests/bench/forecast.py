"""Predicted against measured, on this machine: `make bench-forecast`.

CPU seconds of steps on 4 and 8 ranks, by the model of this machine (`colossus probe` is run first), anchored on what 1
and 2 ranks measured; and the goodput of a drill, by what a fault cost in another drill with more of them and
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
import time
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
    "steps=300",
    "recovery.restarts=100",
]
DRILL += ["faults=drill", "faults.kinds=[kill,exception,hang]", "faults.phases=[forward,backward,reduce,optimizer]"]


def colossus(*arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("colossus")), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def spent(root: int) -> float:
    """CPU seconds of a process and of all that came from it and live."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        stats[int(path.parent.name)] = int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    family, more = set[int](), {root}
    while more:
        family |= more
        more = {pid for pid, (parent, _) in stats.items() if parent in family} - family
    return sum(stats[pid][1] for pid in family if pid in stats)


def step_cpu(folder: Path, *arguments: str) -> float:
    """CPU seconds of a step, all ranks together: from the fourth step to the last."""
    seen: list[tuple[float, float]] = []
    command = [str(Path(sys.executable).with_name("colossus")), "train", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            seen.append((time.time(), spent(process.pid)))
            time.sleep(0.2)
    ends = {record["step"]: record["time"] for record in Run(folder).of("step")}
    first, last = 4, max(ends)
    before, after = (min(seen, key=lambda one: abs(one[0] - ends[step]))[1] for step in (first, last))
    return float((after - before) / (last - first))


def ranks(folder: str, rounds: int, steps: int) -> dict[str, Any]:
    """By number of ranks: CPU seconds a step, all ranks together, as measured and as predicted; interleaved medians.

    Wall time would say how many others wait for the cores: with 20 of them, eight ranks are given more than two are.
    """
    found: dict[int, list[tuple[float, float]]] = {}
    for turn in range(rounds):
        for world in (1, 2, 4, 8):
            path = Path(folder) / f"w{world}-{turn}"
            keys = [*KEYS, *STEP, f"devices={world}", f"steps={steps}", f"runs={folder}", f"name={path.name}"]
            cpu, run = step_cpu(path, *keys), Run(path)
            one = anchor(path, run.last("start"), run.summary["tokens_per_s"])
            found.setdefault(world, []).append((cpu, one.predicted * min(world, hardware.cores())))
    times = {world: [statistics.median(x) for x in zip(*pairs, strict=True)] for world, pairs in found.items()}
    ratio = statistics.mean(times[w][0] / times[w][1] for w in (1, 2))
    rows = [
        {"ranks": w, "measured": m, "predicted": p, "anchored": ratio * p, "error": ratio * p / m - 1, "anchor": w <= 2}
        for w, (m, p) in times.items()
    ]
    return {"ratio": ratio, "load": os.getloadavg()[0], "rows": rows}


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
    report.write(
        "forecast", "make bench-forecast", cores=hardware.cores(), background="other work on both cores", **parts
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
