"""From the command to the first step: `make bench-startup`, or `python -m tests.bench.startup`.

Data is prepared before, nothing is compiled. Warm: Python has its bytecode. Cold: it has none (an empty
PYTHONPYCACHEPREFIX), as after an installation. Beside each stands what importing torch and lightning.fabric alone
takes, in the same way and in turns with it; "on top" is the difference, below 0 where ranks import less. Medians. CPU
seconds are those of the command itself: its forkserver and ranks are not in them.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench import report
from train import events

IMPORTS = "import torch, lightning.fabric"
TRAIN = "model=gpt2_micro steps=1 devices=1 accelerator=cpu compile=false logger=[] report=false eval.tokens=256"


def timed(command: list[str], cold: bool) -> tuple[float, float, float]:
    """When it began, wall seconds, CPU seconds of it and of the children that it has waited for."""
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, **({"PYTHONPYCACHEPREFIX": empty} if cold else {})}
        before, began, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time(), time.perf_counter()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return began, seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start(workspace: Path, name: str, cold: bool) -> dict[str, float]:
    """Seconds from the command to the run's events, of which `step` is the first step's end."""
    keys = [*TRAIN.split(), f"data.cache={workspace}/cache", f"runs={workspace}/runs", f"name={name}"]
    began, _, cpu = timed([sys.executable, "-m", "train", *keys], cold)
    found: dict[str, float] = {}
    for event in events.read(workspace / "runs" / name / "events.jsonl"):
        found.setdefault(event["kind"], event["time"] - began)
    return {**{kind: found[kind] for kind in ("launch", "start", "step")}, "cpu": cpu}


def measure(cold: bool, rounds: int, workspace: Path) -> dict[str, Any]:
    rows = []
    for number in range(rounds):
        _, imports, imports_cpu = timed([sys.executable, "-c", IMPORTS], cold)
        rows.append({"imports": imports, "imports_cpu": imports_cpu, **start(workspace, f"{cold}-{number}", cold)})
        rows[-1]["on_top"] = rows[-1]["step"] - imports
    return {"cold": cold, "rounds": rounds, **{key: statistics.median(row[key] for row in rows) for key in rows[0]}}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start(Path(folder), "data", cold=False)
        results = [measure(cold, options.rounds, Path(folder)) for cold in (True, False)]
    for found in results:
        print(f"{'cold' if found['cold'] else 'warm'}: first step after {found['step']:.2f} s", end=" ")
        print(f"(ranks started at {found['launch']:.2f}, ready at {found['start']:.2f})", end="; ")
        print(f"importing torch and lightning.fabric {found['imports']:.2f}; on top {found['on_top']:.2f}", end="; ")
        print(f"CPU {found['cpu']:.2f} s, of imports alone {found['imports_cpu']:.2f}")
    report.write("startup", "make bench-startup", results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
