"""Run folders made up of events alone: what a run would leave, in a moment and of any length."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from train import compose, events, folder
from train.config import Train

Record = dict[str, Any]
BEGUN = 1_795_000_000.0
SPIKE = 0.37  # of the steps: there the loss is SPIKED
SPIKED = 9.875


def launched(time: float, world: int) -> Record:
    return events.Launch(time=time, world=world, again=False).record()


def started(time: float, world: int, step: int, steps: int) -> Record:
    about = {"device": "cpu", "torch": "2.13.0", "precision": "fp32"}
    numbers: Any = {"virtual_ranks": 8, "micro_batch": 2, "micro_batches": 1, "peak_flops": 1e11, "parameters": 50_000}
    numbers |= {"flops_per_token": 3e5, "memory_bytes": 2**20, "tokens_per_step": 512, "compiled": False}
    words: Any = {"device": "cpu", "peak_source": "measured matmul", "precision": "fp32"}
    words |= {"fingerprint": about, "identity": {}}
    return events.Start(time=time, step=step, world=world, steps=steps, **numbers, **words).record()


def lines(steps: int, world: int = 2, experts: bool = False, digest: str = "d0" * 32) -> list[Record]:
    """A run of so many steps of a tenth of a second, with a spike, evaluations and checkpoints."""
    found = [launched(BEGUN, world), started(BEGUN + 5, world, 0, steps)]
    halves = [f"{17**13:016x}"] * 8
    more: Any = {"experts": [[5, 1, 1, 1], [2, 2, 2, 2]], "balance": 1.2, "router_z": 0.5} if experts else {}
    for n in range(1, steps + 1):
        loss = 1.5 + 4 * math.exp(-5 * n / steps) + 0.05 * math.sin(n * n)
        loss = SPIKED if n == max(1, int(steps * SPIKE)) else loss
        at = {"time": BEGUN + 5 + n / 10, "step": n}
        numbers = {"loss": loss, "loss_hex": loss.hex(), "lr": 1e-3 * (1 - n / (steps + 1)), "seconds": 0.1}
        numbers |= {"grad_norm": 1 + 0.3 * math.sin(n), "tokens": 512 * n, "world": world}
        found.append({**at, "kind": "step", **numbers})
        found.append({**at, "kind": "digests", "tokens": halves, "leaves": halves, "parameters": [], "gradient": []})
        if n % 10 == 0:
            pace: Any = {"tokens_per_s": 5000 + n % 70, "mfu": 0.2, "memory_bytes": 2**28}
            pace["waiting"] = [0.05, *[0.25] * (world - 1)] if world > 1 else []
            found.append({**at, "kind": "throughput", **pace})
        if n % 10 == 0 and experts:
            found.append({**at, "kind": "routing", **more})
        if n % max(1, steps // 5) == 0:
            score: Any = {**at, "loss": loss, "bpb": loss / 2, "tokens": 500, "whole": False, "seconds": 0.01, **more}
            score["sample"] = f"def after_{n}():"
            saved: Any = {**at, "path": "x", "bytes": 10**6, "seconds": 0.01, "wall": 0.1}
            found += [events.Evaluated(**score).record(), events.Saved(**saved).record()]
    last: Any = {"step": steps, "stopped": False, "state_sha256": digest, "sample": "def f():"}
    last["yardsticks"] = {"gzip_windows": 3.5, "gzip_documents": 2.5}
    return [*found, events.Finished(time=BEGUN + 6 + steps / 10, **last).record()]


def struck() -> list[Record]:
    """Three ranks; the second is lost in step 4, its replacement, process 3, joins after step 6."""
    at = BEGUN + 5.45
    words: Any = {"rank": 1, "phase": "reduce", "step": 4}
    group: Any = {"kept": 5, "redone": 3, "seconds": 0.02}
    found = [
        events.Injected(time=at, id="kill:1@reduce:4", member=1, fault="kill", **words),
        events.Fault(time=at + 0.01, fault="lost", cause="killed by SIGKILL", **words),
        events.Regroup(time=at + 0.03, step=4, epoch=2, members=[0, 2], world=2, why="lost", **group),
        events.Ready(time=at + 0.1, rank=3),
        events.Regroup(time=at + 0.2, step=6, epoch=3, members=[0, 2, 3], world=3, why="joined", **group),
    ]
    return sorted(lines(10, world=3) + [event.record() for event in found], key=lambda record: record["time"])


@cache
def _composed(overrides: tuple[str, ...]) -> Train:
    config = compose.config("train", [*overrides, "name=x"])
    assert isinstance(config, Train)
    return config


def leave(path: Path, found: list[Record], overrides: list[str]) -> Path:
    """Make the folder of a run with these events and settings."""
    path.mkdir(parents=True)
    steps = max((record["step"] for record in found if record["kind"] == "step"), default=1)
    elsewhere = (override for override in overrides if not override.startswith("runs="))
    config = replace(_composed(tuple(elsewhere)), name=path.name, steps=steps)
    (path / "config.yaml").write_text(folder.to_yaml(config))
    (path / "data.json").write_text(json.dumps({"digest": "x", "vocab": 300}))
    with (path / "events.jsonl").open("w") as file:
        file.writelines(json.dumps(record, separators=(",", ":")) + "\n" for record in found)
    return path
