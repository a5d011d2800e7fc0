"""A rank as its supervisor has it: where its process does not end, or ends in the middle of a word."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from train import processes
from train.processes import KILLED, Rank


def rank(folder: Path, **words: Any) -> Rank:
    usual = {"process": None, "connection": None, "pulse": None, "trace": folder / "pulse"}
    return Rank(member=0, slot=0, port=0, named=True, **usual | words)  # type: ignore[arg-type]


def test_a_process_that_cannot_be_killed_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for a device or a disk that does not answer: nobody waits for it for ever, whoever kills it again."""
    now, joined = 1000.0, list[float]()
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: now))
    stuck = SimpleNamespace(is_alive=lambda: True, kill=lambda: None, join=joined.append)
    one = rank(tmp_path, process=stuck, connection=SimpleNamespace(close=lambda: None))
    one.kill()
    assert one.alive
    now += KILLED - 1
    one.kill()
    assert one.alive
    now += 1
    assert not one.alive
    one.end()
    assert joined == [0.0]


def test_a_rank_that_dies_in_the_middle_of_a_word_has_ended(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.send_bytes(b"whole")
    os.write(theirs.fileno(), struct.pack("!i", 100) + b"half")
    theirs.close()
    one = rank(tmp_path, connection=ours)
    assert list(one.words()) == [b"whole"]
    assert ours.closed


ORPHANED = """
import os, signal, sys
from multiprocessing import forkserver
from pathlib import Path
from train import compose, nodes, plan, processes

folder = Path(sys.argv[1])
here = processes.Here(
    nodes.here(1), plan.resolve(compose.config("train", sys.argv[2:])), folder, folder / "events.jsonl",
    processes.forkserver(), 1,
)
server = forkserver._forkserver._forkserver_pid
os.kill(server, signal.SIGSTOP)
print(server, flush=True)
forkserver.read_signed = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # the order is sent, the rank not forked yet
here.fork(0, {"member": 0, "writer_epoch": 1, "resume": False, "joins": False, "left_out": []})
"""


def test_a_rank_that_is_forked_after_its_run_was_killed_touches_nothing(tiny: list[str], tmp_path: Path) -> None:
    """The same command may have begun again by then: this one's pulse stands where the next rank's does."""
    command = [sys.executable, "-c", ORPHANED, str(tmp_path), *tiny]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        server = int(run.stdout.readline())
        assert run.wait() == -signal.SIGKILL
        left = {path.name for path in (tmp_path / "logs").iterdir()}
        os.kill(server, signal.SIGCONT)
        assert run.stdout.read() == ""  # all that it had started have ended
    assert left == {"rank-0.pulse"}
    assert {path.name for path in (tmp_path / "logs").iterdir()} == left
