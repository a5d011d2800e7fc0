"""The parent of the ranks: starts them, watches them, records what they report, and passes on what the user wants.

It never imports torch. While the data is prepared, a forkserver imports torch and lightning once; ranks are forked from
it. This process is the only writer of `events.jsonl`. The first SIGINT, SIGTERM or SIGUSR1, here or at any rank, or
`stop_after`, makes the ranks agree on a step, save and stop; the second one here ends them at once. A rank that dies
ends the run, with its cause in one line; nothing is left behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import multiprocessing.resource_tracker
import signal
import socket
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ensure_running
from types import FrameType
from typing import Any, Self

from train import events, folder, hardware, mirror, nodes, plan
from train.channel import ECHO, MARK, RECORDED, REQUESTS, STOP
from train.config import DONE, FAILED, REFUSED, STOPPED, Refused, ResumeMode, Train, seconds
from train.console import Console
from train.data.prepare import prepare
from train.data.writing import Preparer
from train.summary import summarize

MOURNING = 1.0  # seconds in which the others may say what a dead rank did to them, before it is named


class Requests:
    """What was asked of this process by signals, while it is entered: the first asks to stop, the next, at once.

    Until `hold` is called there are no ranks that could save anything, and a signal raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._held = False
        self._last = -ECHO

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._on_signal) for number in REQUESTS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """From now on signals are only noted."""
        self._held = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last < ECHO:
            return
        self._last = now
        self.names.append(signal.Signals(number).name)
        if not self._held:
            raise KeyboardInterrupt


def train(config: Train) -> int:
    """`colossus train`. Returns the exit code; raises Refused before anything has started."""
    console = Console()
    with Requests() as requests:
        try:
            with folder.RunFolder(config.folder, nodes.here(config.nodes).index) as run:
                return _train(config, run, console, requests)
        except KeyboardInterrupt:
            console.close()
            console.say(f"asked to stop ({requests.names[0]}) before the first step: the same command starts again")
            return STOPPED


def _train(config: Train, run: folder.RunFolder, console: Console, requests: Requests) -> int:
    origin = mirror.Origin(config.resume_from, "resume_from") if config.resume_from else None
    elsewhere = next(origin.manifests(), None) if origin else None
    config = plan.resolve(run.pinned(config, elsewhere))
    resume = run.admit(config, elsewhere)
    if (store := config.checkpoint.store) and (
        held := next(mirror.Origin(store, "checkpoint.store").manifests(), None)
    ):
        folder.compare(held.get("identity", {}), config, f"the run at {store}", "use another checkpoint.store=…")
    finished = run.finished(config)
    if finished is not None:
        console.finished_already(config, finished)
        return DONE
    context = _forkserver()
    prepared, preparer = prepare(config.data, seed=config.seed, context=config.model.context, progress=console.progress)
    try:
        run.write(config, json.loads(prepared.to_json()))
        supervisor = Supervisor(config, run, console, context, preparer, requests)
        if origin is not None and run.node == 0:
            resume = supervisor.fetch(origin, prepared.digest) or resume
        requests.hold()
        return supervisor.run(resume)
    finally:
        if preparer is not None:
            preparer.stop()


def _forkserver() -> ForkServerContext:
    """Start the process that ranks are forked from; its imports go on while this one prepares the data.

    It has the requests' signals blocked for life, so that one that goes to all processes of a job does not end it, and
    the ranks with it. A rank begins like that too, and unblocks nothing until there is somebody to heed them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.run", "train.supervisor"])
    multiprocessing.resource_tracker.ensure_running()  # here, because it leaves these signals unblocked
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return context


def _rank(order: str, connection: Connection, listener: socket.socket | None) -> None:
    """Where a forked rank begins. Only there is `train.run` imported: this module stays free of torch."""
    importlib.import_module("train.run").worker(order, connection, listener)


@dataclasses.dataclass(slots=True)
class Rank:
    number: int
    process: ForkServerProcess
    connection: Connection
    left: bool = False  # it has said its last word


class Supervisor:
    def __init__(
        self,
        config: Train,
        run: folder.RunFolder,
        console: Console,
        context: ForkServerContext,
        preparer: Preparer | None,
        requests: Requests,
    ) -> None:
        self._config, self._run, self._console = config, run, console
        self._context, self._preparer, self._requests = context, preparer, requests
        self._node = nodes.here(config.nodes)
        self._ranks: list[Rank] = []
        self._log = events.EventLog(run.events_path)
        self._faults: list[dict[str, Any]] = []
        self._asked = self._stopped = False
        limit = seconds(config.stop_after)
        self._deadline = None if limit is None else time.monotonic() + limit

    def fetch(self, origin: mirror.Origin, data: str) -> bool:
        """Bring in the newest checkpoint of `resume_from`, if it is newer than this folder's; whether there was one."""
        url, root = self._config.resume_from, self._run.path / "checkpoints"

        def admit(found: dict[str, Any]) -> None:
            folder.compare(
                found.get("identity", {}), self._config, f"the checkpoint at {url}", "use another resume_from=…"
            )
            if found.get("data") != data:
                raise Refused("data", f"the corpus is not the one that the checkpoint at {url} was trained on")

        path = origin.fetch(root, admit)
        for refused in origin.refused:
            self._own(events.Warned(rank=0, text=f"passed over: {refused}"))
        here = self._run.checkpointed()
        if path is not None:
            self._console.say(f"fetched {path.name} from {url}")
        elif not here:
            if self._config.resume.mode is ResumeMode.required:
                raise Refused("resume_from", f"{url} holds no checkpoint that is whole, and resume=required")
            self._console.say(f"{url} holds no checkpoint yet: starting at step 0")
        return here

    def _own(self, event: events.Event) -> None:
        self._log.append(event.record())
        self._console.event(event.record())

    def run(self, resume: bool) -> int:
        """Start the ranks, watch them to their end, write the summary."""
        try:
            self._start(resume)
            code = self._watch()
        finally:
            self._kill()
            self._console.close()
        if self._node.index == 0 and code in (DONE, STOPPED):
            records = list(self._run.events())
            summary = summarize(records)
            folder.replace(self._run.path / "summary.json", json.dumps(summary, indent=1))
            self._console.summary(self._config, self._run.path, summary, records)
        self._log.close()
        return code

    # ------------------------------------------------------------------------------------------ starting

    def _start(self, resume: bool) -> None:
        epoch = 1 + sum(record["kind"] == "start" for record in self._run.events())
        per_node = int(self._config.devices)
        world = per_node * self._config.nodes
        listener = nodes.listen(self._node) if self._node.index == 0 and world > 1 else None
        port = listener.getsockname()[1] if listener else self._node.port
        gpus = len(hardware.gpus()) if self._config.accelerator == "cuda" else 0
        for local in range(per_node):
            number = self._node.index * per_node + local
            order = {
                "folder": str(self._run.path),
                "threads": 1,
                "writer_epoch": epoch,
                "resume": resume,
                "place": {
                    "rank": number,
                    "world": world,
                    "local_rank": local,
                    "device": f"cuda:{local % gpus}" if gpus else "cpu",
                    "host": self._node.host,
                    "port": port,
                    "loopback": self._config.nodes == 1,
                    "backend": self._config.backend,
                },
            }
            self._ranks.append(self._fork(number, order, listener if number == 0 else None))
        if listener is not None:
            listener.close()  # rank 0 holds its own copy

    def _fork(self, number: int, order: dict[str, Any], listener: socket.socket | None) -> Rank:
        ours, theirs = self._context.Pipe()
        arguments = (json.dumps(order), theirs, listener)
        process = self._context.Process(target=_rank, args=arguments, name=f"rank-{number}")
        process.start()
        theirs.close()
        return Rank(number, process, ours)

    # ------------------------------------------------------------------------------------------ watching

    def _watch(self) -> int:
        while any(rank.process.is_alive() for rank in self._ranks):
            alive = [rank for rank in self._ranks if rank.process.is_alive()]
            wait(
                [r.connection for r in alive if not r.connection.closed] + [r.process.sentinel for r in alive],
                timeout=0.2,
            )
            self._hear()
            if len(self._requests.names) > 1:
                self._console.say(f"stopped at once ({self._requests.names[1]}); the last checkpoint stands")
                return FAILED
            self._ask_to_stop()
            failure = self._failure()
            if failure is not None:
                return failure
        self._hear()
        failure = self._failure()
        return failure if failure is not None else STOPPED if self._stopped else DONE

    def _hear(self) -> None:
        """Take in all that the ranks have sent."""
        for rank in self._ranks:
            try:
                while not rank.connection.closed and rank.connection.poll():
                    message = rank.connection.recv_bytes()
                    if message == MARK:
                        self._log.sync()
                        rank.connection.send_bytes(RECORDED)
                    else:
                        self._record(json.loads(message), rank)
            except (EOFError, ConnectionError):
                rank.connection.close()

    def _record(self, record: dict[str, Any], rank: Rank | None = None) -> None:
        if rank is not None and record["kind"] == "left":
            rank.left = True
            self._stopped = self._stopped or record["stopped"]
        if record["kind"] == "fault":
            self._faults.append(record)
        self._log.append(record)
        self._console.event(record)

    def _ask_to_stop(self) -> None:
        late = self._deadline is not None and time.monotonic() > self._deadline
        if self._asked or not (self._requests.names or late):
            return
        self._asked = True
        by = self._requests.names[0] if self._requests.names else f"stop_after={self._config.stop_after}"
        self._record(events.Asked(rank=None, by=by).record())
        for rank in self._ranks:
            with contextlib.suppress(OSError):  # it has ended by itself
                rank.connection.send_bytes(STOP)

    def _failure(self) -> int | None:
        """The exit code of a run in which something has failed, once it is said who and why; else None."""
        if self._preparer is not None and (error := self._preparer.poll()):
            self._console.error(f"the data: {error}")
            return FAILED
        dead = [r for r in self._ranks if not r.process.is_alive() and not (r.left and r.process.exitcode == 0)]
        if not dead:
            return None
        until = time.monotonic() + MOURNING
        while time.monotonic() < until and not any(rank.process.exitcode in (None, 0) for rank in dead):
            self._hear()
            if self._faults or any((rank.process.exitcode or 0) < 0 for rank in dead):
                break
            time.sleep(0.02)
        self._hear()
        fault = self._culprit()
        refused = fault["fault"] == "refused"
        at = f" at step {fault['step']}" if fault["step"] is not None else ""
        log = self._run.path / "logs" / f"rank-{fault['rank']}.log"
        self._console.error(
            fault["cause"]
            if refused
            else f"rank {fault['rank']} failed{at} in {fault['phase']}: {fault['cause']} (see {log})"
        )
        return REFUSED if refused else FAILED

    def _culprit(self) -> dict[str, Any]:
        """The fault from which the others follow: a rank killed from outside, else the first that spoke."""
        killed = [rank for rank in self._ranks if (rank.process.exitcode or 0) < 0]
        if self._faults and not killed:
            return min(self._faults, key=lambda fault: fault["time"])
        rank = (killed or [r for r in self._ranks if not r.process.is_alive() and not r.left])[0]
        code = rank.process.exitcode or 0
        cause = f"ended with exit code {code}"
        if code < 0:
            cause = f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            cause += (
                "; if nobody did that, the machine ran out of memory: use a smaller batch.micro_batch or fewer devices"
            )
        fault = events.Fault(fault="lost", phase="a step", rank=rank.number, step=None, cause=cause).record()
        self._log.append(fault)
        return fault

    # -------------------------------------------------------------------------------------------- ending

    def _kill(self) -> None:
        for rank in self._ranks:
            if rank.process.is_alive():
                rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.connection.close()
