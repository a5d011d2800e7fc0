"""A rank as its supervisor has it: where its process does not end, or ends in the middle of a word."""

from __future__ import annotations

import multiprocessing
import os
import struct
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
