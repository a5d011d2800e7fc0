"""A run as its folder tells it, however far it has come and whatever is broken in it.

Events are read on from where the last reading ended, so that looking at a long run again costs what is new. A line that
is no event, or lacks what its kind of event has, is counted and passed over; a torn last line is waited for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from train import events, folder
from train.checks import Refused
from train.summary import summarize

Record = dict[str, Any]

NEEDED = {
    kind.kind: frozenset(f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)
    | {"time"}
    for kind in events.Event.__subclasses__()
}
STEP = ("time", "kind", "step", "loss", "lr", "grad_norm", "tokens", "seconds", "world")  # what is kept of 100,000 such
UNREAD = b'"kind":"digests"'  # longer than all else together, and nothing here is made of them
SILENCE = 10.0  # seconds without an event after which a watcher asks whether anybody is there


class Tail:
    """The lines of a growing file, each once."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset = path, 0
        self.bad = 0  # lines that are no events

    def read(self) -> Iterator[Record]:
        """The events since the last call."""
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            file.seek(self._offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                self._offset += len(raw)
                if UNREAD not in raw[:80]:
                    record = _event(raw)
                    self.bad += record is None
                    if record is not None:
                        yield record


def _event(raw: bytes) -> Record | None:
    try:
        record = json.loads(raw)
        kind, when = record["kind"], record["time"]
        whole = NEEDED.get(kind, frozenset()) <= set(record)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not (whole and isinstance(when, int | float) and isinstance(kind, str)):
        return None
    return {key: record[key] for key in STEP} if kind == "step" else record


class Run:
    """A run's events in their order, and what is known of it by them."""

    def __init__(self, path: Path, held: bool | None = None) -> None:
        """`held`: whether a supervisor is at work in the folder; None: its lock is asked."""
        self.path, self.name, self._held = path, path.resolve().name, held
        self.tail = Tail(path / "events.jsonl")
        self.records: list[Record] = []
        self.steps: dict[int, Record] = {}  # those that count: none that a restart went back behind
        self.refresh()

    def refresh(self) -> bool:
        """Read what has been added; whether there was anything."""
        before = len(self.records)
        for record in self.tail.read():
            self.records.append(record)
            if record["kind"] == "step":
                self.steps[record["step"]] = record
            elif record["kind"] == "start" and self.steps and record["step"] < max(self.steps):
                self.steps = {number: step for number, step in self.steps.items() if number <= record["step"]}
        for name in ("summary", "config") if len(self.records) > before else ():
            self.__dict__.pop(name, None)
        return len(self.records) > before

    def of(self, *kinds: str) -> list[Record]:
        return [record for record in self.records if record["kind"] in kinds]

    def last(self, kind: str) -> Record | None:
        return next((record for record in reversed(self.records) if record["kind"] == kind), None)

    def state(self, silence: float = 0.0) -> str:
        """running, done, stopped (on request, saved), broken (ended without a last word), or not begun.

        The lock is asked only after `silence` seconds without an event: who asks holds it for a moment.
        """
        for record in reversed(self.records):
            if record["kind"] == "end":
                return "stopped" if record["stopped"] else "done"
            if record["kind"] in ("launch", "start", "step"):
                break
        if self._held is not None:
            return "running" if self._held else "broken"
        if self.records and time.time() - self.records[-1]["time"] < silence:
            return "running"
        try:
            return "running" if folder.under_way(self.path) else "broken" if self.records else "not begun"
        except Refused:  # somebody else's folder
            return "broken"

    @cached_property
    def summary(self) -> Record:
        return summarize(self.records)

    @cached_property
    def config(self) -> Record:
        """The settings, flattened; none where config.yaml is missing or broken."""
        try:
            return dict(folder.flatten(yaml.safe_load((self.path / "config.yaml").read_text())))
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            return {}

    @property
    def wanted(self) -> int:
        """Steps in all."""
        start = self.last("start")
        return int(start["steps"]) if start else int(self.config.get("steps") or 0)
