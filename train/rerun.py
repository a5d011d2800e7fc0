"""A run's record, and the run brought to any of its steps again, in one process.

By the batch law the number of ranks has no say, so one process computes what any number of them did. It begins at the
nearest whole checkpoint, or at initialisation, and goes through the very step of training (`train.loop.step`) under
the settings that each step was recorded with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from train import checkpoint, events, evidence, loop, manifest, trained
from train.checks import Refused
from train.config import Evidence, ReduceMode, Sharding, Train
from train.console import Console
from train.data.prepare import Prepared
from train.engine import Engine
from train.fingerprint import fingerprint
from train.flat import Buffer
from train.folder import read_train
from train.group import Group, Place
from train.telemetry import NotFinite, Recorder

# What is compared of a step, causes before effects -> its bits: a number, digits, or a list of them by virtual rank.
Checks = dict[str, Any]

DIGESTS = ("parameters", "tokens", "leaves", "gradient")


@dataclass(frozen=True, slots=True)
class Record:
    """Of a step that was computed again after a restart, the last time counts."""

    name: str  # as the user called it
    folder: Path
    steps: dict[int, Checks]
    starts: dict[int, dict[str, Any]]  # step -> the `start` event that it was computed after
    unequal: list[dict[str, Any]]  # handshakes at which the ranks did not compute the same bits
    configs: dict[int, Train] = field(default_factory=dict)  # by the id of their start: reading takes a step's time

    def start(self, step: int) -> dict[str, Any]:
        """What step `step` was computed under; raises Refused where it is not recorded."""
        if step not in self.steps:
            raise Refused("step", f"{self.name} has no step {step} (there: {min(self.steps)} … {max(self.steps)})")
        return self.starts[step]

    def config(self, step: int) -> Train:
        """The settings that a step was computed under: a run may be continued with others."""
        start = self.start(step)
        if id(start) not in self.configs:
            self.configs[id(start)] = read_train(self.folder / "config.yaml", start.get("identity"))
        return self.configs[id(start)]

    def prepared(self) -> Prepared:
        """The run's tokens; raises Refused where they are gone."""
        prepared = Prepared.read(self.folder / "data.json")
        for store in map(Path, prepared.stores):
            if not store.is_dir():
                raise Refused(str(store), f"is gone, and with it the tokens that {self.name} was trained on")
        return prepared


def read(name: str, folder: Path) -> Record:
    record = Record(name, folder, {}, {}, [])
    start: dict[str, Any] = {}
    try:
        for event in events.read(folder / "events.jsonl"):
            take(record.steps, event)
            match event["kind"]:
                case "start":
                    start = event
                case "step":
                    record.starts[event["step"]] = start
                case "digests" if start.get("identity", {}).get("reduce.mode") == ReduceMode.fast.name:
                    del record.steps[event["step"]]["leaves"]  # the backend's sum has no gradient of each virtual rank
                case "handshake" if not event["equal"]:
                    record.unequal.append(event)
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(str(folder / "events.jsonl"), f"cannot be read ({type(error).__name__}: {error})") from error
    for step in [step for step, checks in record.steps.items() if "loss" not in checks]:  # killed between the two
        del record.steps[step]
    if not record.steps:
        raise Refused("run", f"{name} has no recorded step")
    return record


def take(steps: dict[int, Checks], event: dict[str, Any]) -> None:
    """Keep what an event tells of a step. Its checksums come before its numbers, in older runs after them."""
    known = steps.get(event.get("step", 0), {})
    if event["kind"] == "step":
        numbers = {"loss": event["loss_hex"], "gradient norm": event["grad_norm"], "learning rate": event["lr"]}
        steps[event["step"]] = numbers if "loss" in known else known | numbers
    elif event["kind"] == "digests":
        checksums = {key: event[key] for key in DIGESTS}
        steps[event["step"]] = checksums if "parameters" in known else checksums | known


def different(a: Checks, b: Checks) -> dict[str, list[int]]:
    """What both have and is not the same -> where in it (virtual ranks, parameters; [] where it is one number)."""
    found = {}
    for key in (key for key in a if key in b):
        mine, other = a[key], b[key]
        if key in ("parameters", "gradient") and len(mine) != len(other):
            mine, other = [total(mine)], [total(other)]
        if mine != other:
            lists = isinstance(mine, list) and len(mine) == len(other)
            found[key] = [i for i, x in enumerate(mine) if x != other[i]] if lists else []
    return found


def total(words: list[str]) -> str:
    """The checksum of all parameters, from those of each."""
    return evidence.word(sum(int(part, 16) for part in words))


class Rerun:
    """A run between two of its steps, brought there again."""

    def __init__(self, run: Record, step: int, quiet: bool) -> None:
        """Before step `step`, under its settings: from a checkpoint, and from there on computed again.

        Raises Refused where nothing that leads there is left, or nothing could be proved.
        """
        self.run, self.prepared = run, run.prepared()
        self.foreign: dict[str, tuple[Any, Any]] = {}  # what this machine has otherwise: recorded, here
        self.computed: dict[int, Checks] = {}
        self._settings: tuple[Train, int] | None = None
        self.engine: Engine
        self.parts: loop.Parts
        found = self._nearest(step - 1)
        self.base = found.step if found else 0
        self._settle(self.base + 1)
        if found is not None:
            try:
                checkpoint.load(found, self.engine.state.pieces())
            except manifest.Damaged as damage:
                raise Refused(str(found.path), str(damage)) from damage
            self.engine.state.restored(found.step)
        console, steps = Console(), step - 1 - self.base
        for done in range(steps):
            if not quiet:
                console.progress(f"computing {steps} steps again", done, steps)
            self.advance()
        console.close()
        self._settle(step)

    def _nearest(self, step: int) -> manifest.Verified | None:
        """The newest whole checkpoint from which all steps up to `step` are recorded; None: begin at initialisation."""
        gap = max((between for between in range(1, step + 1) if between not in self.run.steps), default=0)
        found, passed = manifest.newest(self.run.folder / "checkpoints", lambda at: gap <= at <= step)
        if found is None and (gap or self.run.starts[1].get("step") != 0):
            why = f" ({passed[0]})" if passed else ""
            raise Refused("step", f"nothing that {self.run.name} kept leads to its state after {step} steps{why}")
        if found is not None and found.manifest.get("data", self.prepared.digest) != self.prepared.digest:
            raise Refused("step", f"{found.path} was trained on other data")
        return found

    def _settle(self, step: int) -> None:
        """Take on the settings that `step` was computed under, keeping the state."""
        config, start = self.run.config(step), self.run.start(step)
        checksums = Evidence(parameters=len(self.run.steps[step].get("gradient", [])) > 1)
        config = replace(config, sharding=Sharding.none, evidence=checksums)  # neither has a say in the bits
        threads = int(start.get("fingerprint", {}).get("threads_per_rank") or 1)
        if (config, threads) == self._settings:
            return
        if config.reduce.mode is ReduceMode.fast and start["world"] > 1:
            why = f"was computed with reduce=fast on {start['world']} ranks: the order of its sum is not known"
            raise Refused("step", f"{step} of {self.run.name} {why}")
        on = trained.device(config.accelerator)
        named = "cuda:0" if on.type == "cuda" else "cpu"
        group = Group(Place.alone(named), trained.precision(config.precision, on))
        before = self.engine.state if self._settings else None
        self.engine = Engine.build(config, self.prepared, group, threads)
        state = self.engine.state
        if before is not None:
            for piece, old in zip(state.pieces(), before.pieces(), strict=True):
                piece.data.copy_(old.data)
            state.restored(before.step)
        fabric = self.engine.fabric
        told = self.engine.model.aside.shape
        recorder = Recorder(config, fabric, lambda e: take(self.computed, e.record()), self.prepared.vocab, told)
        self.parts = self.engine.parts(recorder)
        self._settings = config, threads
        here, there = fingerprint(config, fabric.device), start.get("fingerprint", {})
        self.foreign |= {key: (there[key], here[key]) for key in here if there.get(key, here[key]) != here[key]}

    def advance(self) -> None:
        """Compute the next step."""
        number = self.engine.state.step + 1
        self._settle(number)
        self.total, rate = loop.step(self.engine.state, self.parts)
        try:
            self.parts.recorder.step(number, self.total, rate)
            self.parts.recorder.flush()
        except NotFinite as error:
            raise Refused("step", f"{number} of {self.run.name}, computed again: {error}") from error

    def leaf(self, v: int) -> Iterator[Buffer]:
        """Virtual rank v's part of the next step, after each of its micro-batches."""
        state = self.engine.state
        buffer = state.flat.buffer()
        state.flat.attach(buffer)
        for i in range(self.engine.config.batch.micro_batches):
            loop.micro_batch(v, i, buffer, state, self.parts)
            yield buffer

    def checksums(self, tensor: Tensor, by_parameter: bool = False) -> list[str]:
        """Of a flat tensor: one for all of it, or one for each parameter."""
        checksums = evidence.Evidence(self.engine.state.flat, by_parameter)
        checksums.of_state(evidence.PARAMETERS, tensor, 0)
        return [evidence.word(number) for number in checksums.state[evidence.PARAMETERS].tolist()]
