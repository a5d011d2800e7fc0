"""The record: one line an event, a torn line cut, no NaN."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from train import events
from train.checks import Refused


def test_a_torn_last_line_is_cut_before_appending(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = events.EventLog(path)
    log.append(events.Warned(rank=0, text="one").record())
    log.close()
    with path.open("ab") as file:
        file.write(b'{"kind":"step","loss":1.')
    assert [record["text"] for record in events.read(path)] == ["one"]
    log = events.EventLog(path)
    log.append(events.Warned(rank=1, text="two").record())
    log.close()
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["one", "two"]


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"x" * 200_000)
    events.EventLog(path).close()
    assert path.read_bytes() == b""


def test_what_is_not_finite_becomes_null() -> None:
    step = events.Step(
        step=1, loss=float("nan"), loss_hex="nan", lr=1.0, grad_norm=float("inf"), tokens=1, seconds=0.1, world=1
    )
    record = json.loads(events.line(step.record()))
    assert record["loss"] is None
    assert record["grad_norm"] is None
    assert record["kind"] == "step"


def test_a_missing_file_has_no_events(tmp_path: Path) -> None:
    assert list(events.read(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize("damage", [b"\0" * 40, b"[1]", b'{"kind": 3}', b'{"step": 1}', b"[" * 100_000])
def test_a_line_that_is_no_event_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"kind": "launch"}\n' + damage + b'\n{"kind": "start"}\n')
    with pytest.raises(Refused, match=r"events\.jsonl:2: is no event"):
        list(events.read(path))


def test_a_full_disk_delays_lines_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write, room = tmp_path / "events.jsonl", os.write, 50

    def full(descriptor: int, content: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(28, "No space left on device")
        content = content[:room]
        room -= len(content)
        return write(descriptor, content)

    log = events.EventLog(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for number in range(3):
            log.append(events.Warned(rank=number, text="…").record())
        patch.setattr(os, "fsync", lambda descriptor: full(descriptor, b""))  # as a network's disk has it
        log.sync()
    assert path.stat().st_size == 50
    log.sync()
    assert path.stat().st_size > 50, "what is said to be on the disk is there, if it can be"
    log.append(events.Warned(rank=3, text="…").record())
    log.close()
    assert [record["rank"] for record in events.read(path)] == [0, 1, 2, 3]
