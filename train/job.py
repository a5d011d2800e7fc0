"""`colossus train`: from a composed configuration to ranks under a supervisor.

All that can be refused is refused here, before anything is started. Torch is never imported; while the data is prepared
a forkserver imports it.
"""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

from train import events, folder, hardware, manifest, mirror, nodes, plan
from train.agent import Agent
from train.channel import Requests
from train.checks import DONE, STOPPED, Refused, require
from train.config import ResumeMode, Train
from train.console import Console
from train.data.prepare import prepare
from train.faults.plan import plan as planned
from train.fleet import Fleet
from train.processes import Here, forkserver
from train.supervisor import Supervisor


def train(config: Train) -> int:
    """`colossus train`. Returns the exit code; raises Refused before anything has started."""
    console = Console()
    with Requests() as requests:
        try:
            node = nodes.here(config.most_nodes)
            with folder.RunFolder(config.folder, node.index) as run:
                return _train(config, node, run, console, requests)
        except KeyboardInterrupt:
            console.close()
            console.say(f"asked to stop ({requests.names[0]}) before the first step: the same command starts again")
            return STOPPED


def _train(config: Train, node: nodes.Node, run: folder.RunFolder, console: Console, requests: Requests) -> int:
    origin = mirror.Origin(config.resume_from, "resume_from") if config.resume_from else None
    elsewhere = next(origin.manifests(), None) if origin else None
    config = plan.resolve(run.pinned(config, elsewhere))
    there = config.accelerator != "cpu" or not config.compile or shutil.which(hardware.compiler())
    require(bool(there), "compile", f"true needs {hardware.compiler()}, which is not here: install it, or use false")
    faults = planned(config)
    resume = run.admit(config, elsewhere)
    store, held = config.checkpoint.store, None
    if store and (held := next(mirror.Origin(store, "checkpoint.store").manifests(), None)):
        folder.compare(held.get("identity", {}), config, f"the run at {store}", "use another checkpoint.store=…")
    finished = run.finished(config)
    if finished is not None:
        console.finished_already(config, finished)
        return DONE
    recomputes = config.model.loss_chunk > 0 or config.model.checkpoint_activations != "none"
    context = forkserver(*(["torch._inductor"] if recomputes or config.compiles else []))  # torch's compiler
    prepared, preparer = prepare(config.data, seed=config.seed, context=config.model.context, progress=console.progress)
    try:
        if held and held.get("data") != prepared.digest:
            raise Refused("checkpoint.store", f"the run at {store} was trained on another corpus: use another folder")
        run.write(config, dataclasses.asdict(prepared))
        here = Here(node, config, run.path, run.events_path, context, int(config.devices))
        agrees = folder.plain_identity(config, folder.LOCAL)
        agrees |= {"corpus": prepared.digest, "faults on order": [one.id for one in faults]}
        hello = {"node": node.index, "devices": here.devices, "agrees": agrees}
        if node.index:
            requests.hold()
            return Agent(here, run, console, preparer, requests, hello).run()
        with Fleet(here, config.most_nodes, hello) as fleet:
            supervisor = Supervisor(config, run, console, fleet, preparer, requests)
            if origin is not None:
                resume = _fetch(origin, prepared.digest, config, run, supervisor, console) or resume
            fleet.gather(config.least_nodes, console.say)
            requests.hold()
            code = supervisor.run(resume)
            fleet.verdict = fleet.verdict or (code, "")
        if config.report:
            from train.report.command import leave_behind  # numpy, which no refusal shall wait for

            console.say(leave_behind(run.path))
        return code
    finally:
        if preparer is not None:
            preparer.stop()


def _fetch(
    origin: mirror.Origin, data: str, config: Train, run: folder.RunFolder, supervisor: Supervisor, console: Console
) -> bool:
    """Bring in the newest checkpoint of `resume_from`, if it is newer than this folder's; whether there was one."""
    url = config.resume_from

    def admit(found: dict[str, Any]) -> None:
        folder.compare(found.get("identity", {}), config, f"the checkpoint at {url}", "use another resume_from=…")
        if found.get("data") != data:
            raise Refused("data", f"the corpus is not the one that the checkpoint at {url} was trained on")

    path = origin.fetch(run.path / "checkpoints", admit)
    for refused in origin.refused:
        supervisor.record(events.Warned(rank=0, text=f"passed over: {refused}"))
    here = run.checkpointed()
    if path is not None:
        run.leave_out(manifest.read(path).get("left_out", []))
        console.say(f"fetched {path.name} from {url}")
    elif not here:
        if config.resume.mode is ResumeMode.required:
            raise Refused("resume_from", f"{url} holds no checkpoint that is whole, and resume=required")
        console.say(f"{url} holds no checkpoint yet: starting at step 0")
    return here
