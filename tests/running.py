"""`colossus train` in a process of its own, to be sent signals and killed.

`Running` is forked from the server that the ranks of this test process are forked from, and forks the server of its own
ranks in the same way: both have torch and lightning already, whose import costs more than a small run does. All else is
as in `Fresh`, which starts Python anew, as a shell would.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import util
from pathlib import Path
from typing import Any

from train import cli, events
from train.channel import REQUESTS
from train.processes import forkserver

TIMEOUT = 120.0  # seconds; far more than any of these runs takes


class Running:
    def __init__(self, overrides: list[str], *more: str, **environment: str) -> None:
        settings = dict(argument.split("=", 1) for argument in [*overrides, *more])
        self.folder = Path(settings["runs"]) / settings["name"]
        self._says = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115
        self.process: Any = self._start([*overrides, *more], environment, [file.name for file in self._says])

    def _start(self, overrides: list[str], environment: dict[str, str], says: list[str]) -> Any:
        arguments = (overrides, environment, says)
        process = forkserver().Process(target=_live, args=arguments, daemon=True)  # type: ignore[attr-defined]
        process.start()
        return process

    def code(self) -> int | None:
        """Its exit code, once there is one."""
        code: int | None = self.process.exitcode
        return code

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.process.pid, number)

    def wait_for(self, condition: Callable[[list[dict[str, Any]]], bool]) -> None:
        until = time.monotonic() + TIMEOUT
        while not condition(list(events.read(self.folder / "events.jsonl"))):
            assert self.code() is None, self.end()
            assert time.monotonic() < until, "the run does not get there"
            time.sleep(0.02)

    def end(self) -> tuple[int, str, str]:
        """Its exit code when it has ended, and what it has said to standard output and to standard error."""
        until = time.monotonic() + TIMEOUT
        while (code := self.code()) is None:
            assert time.monotonic() < until, "the run does not end"
            time.sleep(0.01)
        out, err = (file.read() for file in self._says)
        return code, out, err

    def children(self) -> set[int]:
        """All processes below this one, whatever session they are in."""
        return set(descendants(self.process.pid))


class Fresh(Running):
    def _start(self, overrides: list[str], environment: dict[str, str], says: list[str]) -> Any:
        command = [sys.executable, "-m", "train", *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env={**os.environ, **environment}, **pipes)  # type: ignore[call-overload]

    def code(self) -> int | None:
        code: int | None = self.process.poll()
        return code

    def end(self) -> tuple[int, str, str]:
        """The same, and that of all its children, who hold the pipes."""
        out, err = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, out, err


def _live(overrides: list[str], environment: dict[str, str], says: list[str]) -> None:
    """Where the process of a `Running` begins."""
    multiprocessing.current_process().daemon = False  # which it is only to end with its test, if that has failed
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)
    os.environ.update(environment)
    for stream, path in enumerate(says, start=1):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    util.spawnv_passfds = _fork_passfds  # type: ignore[assignment]
    sys.exit(cli.main(["train", *overrides]))


def _fork_passfds(_: bytes, arguments: list[str], descriptors: list[int]) -> int:
    """Run the last of `arguments`, Python code, in a process with these descriptors and no other, as in a new one."""
    sys.stdout.flush()
    gc.collect()  # what is not collected here would close descriptors there that are others' by then
    if pid := os.fork():
        return pid
    for number in REQUESTS:
        signal.signal(number, signal.SIG_DFL)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor not in descriptors:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(descriptor)
    try:
        exec(arguments[-1])
    finally:
        os._exit(0)  # and nothing of this process's stack is cleared up there


def descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            yield child
            yield from descendants(child)


def runs(pid: int) -> bool:
    """Whether there is such a process; one that has ended and only waits to be reaped by init is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: set[int], within: float) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not any(runs(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def at_step(number: int) -> Callable[[list[dict[str, Any]]], bool]:
    return lambda records: any(record["kind"] == "step" and record["step"] >= number for record in records)
