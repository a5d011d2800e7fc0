"""`colossus resize`: give a run that is under way more ranks, or take some away, without stopping it.

The wish is a file in the run's folder, which the supervisor reads and removes: whoever may write there owns the run,
and nothing listens anywhere. It says how many ranks there shall be, not how many more: asking twice is harmless.
Those for whom there is no virtual rank stand by: warm, without work, each ready to take a lost rank's place at once.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from train import events, hardware
from train.checks import DONE, FAILED, Refused
from train.commands import Resize as Config
from train.folder import WISH, locate, read_train, replace, under_way

PATIENCE = 60.0  # seconds in which the ranks must have come to the end of a step, and newcomers be ready


def resize(config: Config) -> int:
    """Exit code 0 once so many ranks train; 1 where they do not within a minute."""
    path = locate(config.run)
    run = read_train(path / "config.yaml")
    if not run.heals or run.most_nodes > 1:
        why = "only one node's ranks with whole states are resized (of several nodes, let one come or go)"
        raise Refused("run", f"{why}: stop {config.run} and start it again with devices={config.devices}")
    if not under_way(path):
        raise Refused("run", f"{config.run} is not under way: start it with devices={config.devices}")
    if run.backend == "nccl" and config.devices > (gpus := len(hardware.gpus())):
        raise Refused("devices", f"{config.devices} are more than the {gpus} GPUs here")
    ranks = min(config.devices, run.batch.virtual_ranks)
    replace(path / WISH, json.dumps({"devices": config.devices}))
    until = time.monotonic() + PATIENCE
    while under_way(path) and time.monotonic() < until:
        if not (path / WISH).exists() and _world(path) == ranks:
            more = f", and {config.devices - ranks} that stand by" if config.devices > ranks else ""
            print(f"{config.run} has {ranks} rank{'s' * (ranks > 1)}{more}")
            return DONE
        time.sleep(0.1)
    (path / WISH).unlink(missing_ok=True)  # or a later run of this name would heed it
    print(f"{config.run} has {_world(path)} ranks: it {'goes on' if under_way(path) else 'has ended'}")
    return FAILED


def _world(path: Path) -> int:
    """How many ranks there are, as the run's record has it."""
    worlds = [r["world"] for r in events.read(path / "events.jsonl") if r["kind"] in ("start", "regroup")]
    return worlds[-1] if worlds else 0
