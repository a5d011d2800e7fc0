"""A run's record, read for comparison: its steps as they counted in the end, and what each was computed under."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import events
from train.config import Refused, Train, read_train
from train.data.prepare import Prepared
from train.folder import read_json

Checks = dict[str, Any]  # what is compared -> its bits: a number, hexadecimal digits, or a list of them by virtual rank


@dataclass(frozen=True, slots=True)
class Record:
    """Of a step that was computed again after a restart, the last time counts."""

    name: str  # as the user called it
    folder: Path
    steps: dict[int, dict[str, Any]]
    digests: dict[int, dict[str, Any]]
    starts: dict[int, dict[str, Any]]  # step -> the `start` event that it was computed after
    unequal: list[dict[str, Any]]  # handshakes at which the ranks did not compute the same bits

    def start(self, step: int) -> dict[str, Any]:
        """What step `step` was computed under; raises Refused where it is not recorded."""
        if step not in self.steps:
            there = f"{min(self.steps)} … {max(self.steps)}" if self.steps else "none"
            raise Refused("step", f"{self.name} has no step {step} (there: {there})")
        return self.starts[step]

    def config(self, step: int) -> Train:
        """The settings that a step was computed under: a run may be continued with others."""
        return read_train(self.folder / "config.yaml", self.start(step).get("identity"))

    def prepared(self) -> Prepared:
        """The run's tokens; raises Refused where they are gone."""
        found = read_json(self.folder / "data.json")
        if found is None:
            raise Refused(str(self.folder / "data.json"), "is missing, and with it what the run was trained on")
        prepared = Prepared.from_json((self.folder / "data.json").read_text())
        for path in map(Path, prepared.stores):
            if not path.is_dir():
                raise Refused(str(path), f"is gone, and with it the tokens that {self.name} was trained on")
        return prepared

    def checks(self, step: int, exact: bool) -> Checks:
        """The bits of a recorded step. The backend's own sum has no gradient of each virtual rank to tell of."""
        found = checks(self.steps[step], self.digests.get(step))
        return {key: value for key, value in found.items() if exact or key != "leaves"}


def checks(step: dict[str, Any], digests: dict[str, Any] | None) -> Checks:
    """What is compared of a step, in the order in which it is computed: causes before effects."""
    given = digests or {}
    found = {key: given[key] for key in ("parameters", "tokens", "leaves", "gradient") if key in given}
    return found | {"loss": step["loss_hex"], "gradient norm": step["grad_norm"], "learning rate": step["lr"]}


def different(a: Checks, b: Checks) -> dict[str, list[int]]:
    """What both have and is not the same -> where in it (virtual ranks, parameters; [] where it is one number)."""
    found = {}
    for key in a.keys() & b.keys():
        mine, other = a[key], b[key]
        if key in ("parameters", "gradient") and len(mine) != len(other):
            mine, other = [total(mine)], [total(other)]
        if mine != other:
            lists = isinstance(mine, list) and len(mine) == len(other)
            found[key] = [i for i, (x, y) in enumerate(zip(mine, other, strict=True)) if x != y] if lists else []
    return {key: found[key] for key in a if key in found}


def total(words: list[str]) -> str:
    """The checksum of all parameters, from those of each."""
    return f"{sum(int(word, 16) for word in words) % 2**64:016x}"


def read(name: str, folder: Path) -> Record:
    record = Record(name, folder, {}, {}, {}, [])
    start: dict[str, Any] = {}
    try:
        for event in events.read(folder / "events.jsonl"):
            match event["kind"]:
                case "start":
                    start = event
                case "step":
                    record.steps[event["step"]] = event
                    record.starts[event["step"]] = start
                    record.digests.pop(event["step"], None)
                case "digests":
                    record.digests[event["step"]] = event
                case "handshake" if not event["equal"]:
                    record.unequal.append(event)
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(str(folder / "events.jsonl"), f"cannot be read ({type(error).__name__}: {error})") from error
    if not record.steps:
        raise Refused("run", f"{name} has no recorded step")
    return record
