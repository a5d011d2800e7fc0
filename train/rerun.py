"""A run brought to any of its steps again, in one process.

By the batch law the number of ranks has no say, so one process computes what any number of them did. It begins at the
nearest whole checkpoint, or at initialisation, and goes through the very step of training (`train.loop.step`) under
the settings that each step was recorded with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from train import checkpoint, events, loop, manifest, record, trained
from train.config import Evidence, ReduceMode, Refused, Sharding, Train
from train.engine import Engine
from train.evidence import PARAMETERS
from train.evidence import Evidence as Checksums
from train.fingerprint import fingerprint
from train.group import Place
from train.record import Checks, Record
from train.telemetry import NotFinite, Recorder

Tell = Callable[[int, int], object]  # steps computed, of how many

PLACE = Place(rank=0, world=1, local_rank=0, device="cpu", host="", port=0, loopback=True, backend="gloo")


class Rerun:
    """A run between two of its steps, brought there again."""

    def __init__(self, run: Record, step: int, tell: Tell = lambda done, steps: None) -> None:
        """After `step` steps of it: saved ones, and from there on computed again.

        Raises Refused where nothing that leads there is left, or nothing could be proved.
        """
        self.run, self.prepared = run, run.prepared()
        self.foreign: dict[str, tuple[Any, Any]] = {}  # what this machine has otherwise: recorded, here
        self.computed: dict[int, Checks] = {}
        self._settings: tuple[Train, int] | None = None
        self.engine: Engine
        self.parts: loop.Parts
        self._sent: list[events.Event] = []
        found = self._nearest(step)
        self.base = found.step if found else 0
        self.settle(self.base + 1)
        if found is not None:
            try:
                checkpoint.load(found, self.engine.state.pieces())
            except manifest.Damaged as damage:
                raise Refused(str(found.path), str(damage)) from damage
            self.engine.state.restored(found.step)
        self.advance(step, tell)

    def _nearest(self, step: int) -> manifest.Verified | None:
        """The newest whole checkpoint from which all steps up to `step` are recorded; None: begin at initialisation."""
        passed = []
        for path in manifest.candidates(self.run.folder / "checkpoints"):
            at = manifest.step_of(path.name)
            if at is None or at > step or any(between not in self.run.steps for between in range(at + 1, step + 1)):
                continue
            try:
                found = manifest.verify(path)
            except manifest.Damaged as damage:
                passed.append(str(damage))
                continue
            if found.manifest.get("data", self.prepared.digest) == self.prepared.digest:
                return found
            passed.append(f"{path} was trained on other data")
        if all(between in self.run.steps for between in range(1, step + 1)) and self.run.starts[1].get("step") == 0:
            return None
        why = f" ({passed[0]})" if passed else ""
        raise Refused("step", f"nothing that {self.run.name} kept leads to its state after {step} steps{why}")

    def settle(self, step: int) -> None:
        """Take on the settings that `step` was computed under, keeping the state."""
        config, start = self.run.config(step), self.run.start(step)
        digests = self.run.digests.get(step)
        evidence = Evidence(
            digests=digests is not None, parameters=digests is not None and len(digests["gradient"]) > 1
        )
        config = replace(config, sharding=Sharding.none, evidence=evidence)  # neither has a say in the bits
        threads = int(start.get("fingerprint", {}).get("threads_per_rank") or 1)
        if (config, threads) == self._settings:
            return
        if config.reduce.mode is ReduceMode.fast and start["world"] > 1:
            why = f"was computed with reduce=fast on {start['world']} ranks: the order of its sum is not known"
            raise Refused("step", f"{step} of {self.run.name} {why}")
        on = trained.device(config.accelerator)
        place = replace(PLACE, device="cuda:0" if on.type == "cuda" else "cpu")
        before = self.engine.state if self._settings else None
        self.engine = Engine.build(config, self.prepared, place, threads)
        state = self.engine.state
        if before is not None:
            for piece, old in zip(state.pieces(), before.pieces(), strict=True):
                piece.data.copy_(old.data)
            state.restored(before.step)
        recorder = Recorder(config, self.engine.fabric, self._sent.append, self.prepared.vocab, None)
        self.parts = self.engine.parts(recorder)
        self._settings = config, threads
        here, there = fingerprint(config, self.engine.fabric.device), start.get("fingerprint", {})
        self.foreign |= {key: (there[key], here[key]) for key in here if there.get(key, here[key]) != here[key]}

    def advance(self, step: int, tell: Tell = lambda done, steps: None) -> None:
        """Compute steps until `step` of them are committed."""
        first = self.engine.state.step
        for number in range(first + 1, step + 1):
            self.settle(number)
            tell(number - first - 1, step - first)
            self._sent.clear()
            self.total, rate = loop.step(self.engine.state, self.parts)
            try:
                self.parts.recorder.step(number, self.total, rate)
                self.parts.recorder.flush()
            except NotFinite as error:
                raise Refused("step", f"{number} of {self.run.name}, computed again: {error}") from error
            sent = {event.kind: event.record() for event in self._sent}
            self.computed[number] = record.checks(sent["step"], sent.get("digests"))

    def different(self, step: int) -> dict[str, list[int]]:
        """What of a computed step is not as recorded, and where in it."""
        return record.different(self.recorded(step), self.computed[step])

    def recorded(self, step: int) -> Checks:
        return self.run.checks(step, self.engine.config.reduce.mode is ReduceMode.exact)

    def leaf(self, v: int, each: Callable[[int, Tensor], object] = lambda i, gradient: None) -> tuple[Checks, Tensor]:
        """Virtual rank v's part of the next step, and its gradient; `each` is told the sum after each micro-batch."""
        state = self.engine.state
        buffer = state.flat.buffer()
        state.flat.attach(buffer)
        for i in range(self.engine.config.batch.micro_batches):
            loop.micro_batch(v, i, buffer, state, self.parts)
            each(i, buffer.tensor)
        leaf = word(int(state.flat.checksum(buffer.tensor, 0).sum()))
        return {"parameters": self.parameters(), "tokens": [word(buffer.tokens)], "leaves": [leaf]}, buffer.tensor

    def parameters(self) -> list[str]:
        """The checksums that the next step would record of the parameters."""
        flat = self.engine.state.flat
        checksums = Checksums(flat, self.engine.config.evidence.parameters)
        checksums.of_state(PARAMETERS, flat.parameters, 0)
        return [word(number) for number in checksums.state[PARAMETERS].tolist()]


def word(number: int) -> str:
    return f"{number & (2**64 - 1):016x}"
