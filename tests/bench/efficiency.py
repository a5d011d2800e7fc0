"""What faults cost a run in wall time, beside torchft's: `make bench-efficiency` (needs `pip install torchft`).

Efficiency is the time that a job's fault-free twin takes for so many steps, divided by the time that the job takes for
them while somebody kills its ranks with SIGKILL: one in every interval, at a random moment of it, at a random place,
the same moments and places for both contestants. The twin runs beside it, at the same time, so that other work on the
machine holds both up alike. All four ranks may be struck, rank 0 too; exempt are our supervisor and torchft's
lighthouse. Both jobs sleep in the place of computing (`asleep.py`): a step lasts a second, or ten.

Ours is `colossus train` as it comes, without spares: 48 micro-batches a step, by 12 virtual ranks or by 48. Each step
has the whole batch; in the end `state_sha256` is the twin's, or the command fails. torchft's is the job of
`torchft.py`, with as many bytes of gradients and of state. It drops the step in which a replica is lost, and until that
is back what it would have added. Beside its efficiency in steps stands that in work, where a step counts as the share
of replicas that computed it.

A job that takes more than twice as long as it should is ended there, and judged by the steps that it has done.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tests.bench import report, torchft
from train import events

RANKS = 4
MICRO = 48  # micro-batches of a step, whatever the number of virtual ranks
PARAMETERS = 787_200
KEYS = ["model=llama_micro", "model.layers=1", "model.width=256", "model.ffn=512", "model.context=16"]  # few calls
KEYS += ["data=synthetic", "data.synthetic_tokens=400_000", "data.tokenizer.vocab=512", "precision=fp32"]
KEYS += [f"batch.sequences={MICRO}", "batch.micro_batch=1", f"devices={RANKS}", "accelerator=cpu"]
KEYS += ["logger=[]", "report=false"]
KEYS += ["eval.every=0", "eval.tokens=512", "checkpoint.every=4"]
START = """
import sys
from multiprocessing.context import BaseContext
preload = BaseContext.set_forkserver_preload
BaseContext.set_forkserver_preload = lambda self, modules: preload(self, ["tests.bench.asleep", *modules])
from train.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""
PATIENCE = 300  # seconds for a job to start
Contestant = Callable[[float, float, int], dict[str, Any]]  # seconds a step, seconds a kill, steps -> a row
LATE = 2  # times what the steps should take, after which a job is ended


class Job(Protocol):
    def committed(self) -> dict[int, tuple[float, int]]:
        """When each step was committed, and by how many ranks, or replicas, it was computed."""

    def tend(self) -> None: ...

    def kill(self, rank: int) -> object: ...

    def end(self) -> None: ...


class Ours:
    """`colossus train` in a process of its own."""

    def __init__(self, name: str, step: float, steps: int, virtual: int, runs: Path) -> None:
        self.folder, environment = runs / name, os.environ | {"MICRO_BATCH_S": str(step * RANKS / MICRO)}
        command = [sys.executable, "-c", START, *KEYS, f"name={name}", f"runs={runs}", f"steps={steps}"]
        command += [f"batch.virtual_ranks={virtual}"]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    def records(self) -> list[dict[str, Any]]:
        return list(events.read(self.folder / "events.jsonl"))

    def committed(self) -> dict[int, tuple[float, int]]:
        found: dict[int, tuple[float, int]] = {}
        for record in self.records():
            if record["kind"] == "start":  # anew, from a checkpoint
                found = {step: when for step, when in found.items() if step <= record["step"]}
            elif record["kind"] == "step":
                found[record["step"]] = record["time"], RANKS  # whoever computes it, it is all of it
        return found

    def tend(self) -> None:
        if self.process.poll():
            raise SystemExit(f"the run at {self.folder} ended with exit code {self.process.returncode}")

    def kill(self, rank: int) -> None:
        """The rank at that place, if so many take part now."""
        members = [record["members"] for record in self.records() if record["kind"] == "regroup"]
        now = members[-1] if members else list(range(RANKS))
        log = str(self.folder / "logs" / f"rank-{now[rank % len(now)]}.log")
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(process / "fd" / "1") == log:  # a rank writes to its log, and to nothing else
                    os.kill(int(process.name), signal.SIGKILL)
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                pass  # gone, or somebody else's

    def end(self) -> None:
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:  # it was late
            self.process.kill()

    def state(self) -> str | None:
        path = self.folder / "summary.json"
        return str(json.loads(path.read_text())["state_sha256"]) if path.exists() else None


def plan(every: float) -> Iterator[tuple[float, int]]:
    """Moments, in seconds, and places of the kills."""
    rng = random.Random(every)
    for i in itertools.count():
        yield (i + rng.random()) * every, rng.randrange(RANKS)


def race(job: Job, twin: Job, step: float, every: float, steps: int) -> dict[str, Any]:
    """Kill ranks of `job` while both take `steps` steps after the first one of all ranks; what came of it."""
    asked = time.time()
    while not all(complete(one) for one in (job, twin)):
        assert time.time() < asked + PATIENCE, "the ranks do not come together"
        job.tend()
        twin.tend()
        time.sleep(0.1)
    first, of_twin = complete(job)[0], complete(twin)[0]
    began, kills = time.time(), 0
    late = began + LATE * step * steps
    for after, rank in plan(every):
        while time.time() < min(began + after, late) and max(job.committed(), default=0) < first + steps:
            job.tend()
            time.sleep(0.2)
        if time.time() >= late or max(job.committed(), default=0) >= first + steps:
            break
        job.kill(rank)
        kills += 1
    while max(twin.committed()) < of_twin + steps:
        twin.tend()
        time.sleep(0.2)
    ran, calm = (within(one, start, steps) for one, start in ((job, first), (twin, of_twin)))
    done = len(ran) - 1
    seconds = (ran[-1][0] if done == steps else late) - ran[0][0]
    usual = (calm[-1][0] - calm[0][0]) / (len(calm) - 1)
    work = sum(ranks for _, ranks in ran[1:]) / RANKS
    row = {"step_s": step, "kill_every_s": every, "kills": kills, "steps": done, "of": steps, "seconds": seconds}
    return row | {"twin_step_s": usual, "efficiency": done * usual / seconds, "in_work": work * usual / seconds}


def complete(job: Job) -> list[int]:
    """The steps that all ranks have computed."""
    return [step for step, (_, ranks) in job.committed().items() if ranks == RANKS]


def within(job: Job, first: int, steps: int) -> list[tuple[float, int]]:
    return [found for step, found in job.committed().items() if first <= step <= first + steps]


def ours(step: float, every: float, steps: int, virtual: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        job, twin = (Ours(name, step, steps + 1, virtual, Path(folder)) for name in ("run", "twin"))
        try:
            row = race(job, twin, step, every, steps)
        finally:
            for one in (job, twin):
                one.end()
        assert row["twin_step_s"] > step, "a micro-batch did not sleep"
        records = job.records()
        row["virtual_ranks"] = virtual
        row["equal"] = job.state() == twin.state()
        row["left_empty"] = sum("left empty" in record.get("text", "") for record in records)
        row["leaves_again"] = [record["redone"] for record in records if record.get("why") == "lost"]
        row["starts"] = sum(record["kind"] == "start" for record in records)
    return row


def theirs(step: float, every: float, steps: int, join: int) -> dict[str, Any]:
    from torchft.coordination import LighthouseServer

    with tempfile.TemporaryDirectory() as run, tempfile.TemporaryDirectory() as other:
        houses = [
            LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=join, heartbeat_timeout_ms=1000)
            for _ in range(2)
        ]
        jobs = [
            torchft.Job(RANKS, PARAMETERS, step, house.address(), Path(folder))
            for house, folder in zip(houses, (run, other), strict=True)
        ]
        try:
            return race(jobs[0], jobs[1], step, every, steps) | {"join_timeout_ms": join}
        finally:
            for job in jobs:
                job.end()
            for house in houses:
                house.shutdown()


def main() -> int:
    os.environ.setdefault("RUST_LOG", "error")  # the lighthouse tells of every heartbeat
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=float, nargs="+", default=[1.0, 10.0], help="seconds that a step lasts")
    parser.add_argument("--every", type=float, nargs="+", default=[60.0, 15.0], help="seconds a kill")
    parser.add_argument("--kills", type=float, default=4, help="kills of a job that takes no longer than its twin")
    parser.add_argument("--seconds", type=float, default=120, help="that a job takes at least")
    parser.add_argument("--virtual", type=int, nargs="*", default=[12, 48], help="virtual ranks of our runs")
    parser.add_argument("--join", type=int, nargs="*", default=[1000], help="ms that torchft waits for a late replica")
    options = parser.parse_args()
    if options.join and importlib.util.find_spec("torchft") is None:
        print("torchft is not here: .venv/bin/python -m pip install torchft, or ARGS=--join for ours alone")
        return 2
    contestants: list[tuple[str, Contestant]] = [
        ("ours", partial(ours, virtual=virtual)) for virtual in options.virtual
    ]
    contestants += [("torchft", partial(theirs, join=join)) for join in options.join]
    head: dict[str, Any] = {"cores": os.cpu_count(), "parameters": PARAMETERS, "ranks": RANKS}
    if options.join:
        head["torchft"] = importlib.metadata.version("torchft")
    given = f" ARGS='{' '.join(sys.argv[1:])}'" if len(sys.argv) > 1 else ""
    rows = []
    for every, step in itertools.product(options.every, options.steps):
        steps = round(max(options.seconds, options.kills * every) / step)
        for name, contestant in contestants:
            load = os.getloadavg()[0]
            row = {"contestant": name, **contestant(step, every, steps), "load_average": [load, os.getloadavg()[0]]}
            rows.append(row)
            print(
                f"{name}, {step:g} s a step, a kill every {every:g} s: {row['efficiency']:.1%} in steps, "
                f"{row['in_work']:.1%} in work, {row['kills']} kills, {row['steps']} of {steps} steps",
                flush=True,
            )
            report.write("efficiency", f"make bench-efficiency{given}", **head, rows=rows)
    return int(not all(row.get("equal", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
