"""`colossus diff`: the first step at which two runs part, where in it, and why.

Two records are read and compared; only to narrow down what they leave open is anything computed again. Causes come
before effects: the data, the parameters, the gradient of each virtual rank, their sum.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from rich.console import Console as Rich
from rich.table import Table
from torch import Tensor

from train.batch import checksum
from train.checks import DONE, FAILED, Refused
from train.commands import Diff as Config
from train.commands import Format
from train.config import ReduceMode, Train
from train.data.prepare import Prepared
from train.data.stream import Stream
from train.data.tokenizer import Tokenizer
from train.evidence import word
from train.flat import Flat
from train.folder import differences, flatten, identity, locate, plain_identity, read_json
from train.models.build import build
from train.rerun import Record, Rerun, different, read, total

SAME = "same data, same parameters"
SHOWN = 5  # tensors named
BEFORE, EXCERPT = 8, 100  # tokens before the first that differs, characters shown

Bits = dict[str, Tensor]  # of each tensor of the state: int32, in its shape


def diff(config: Config) -> int:
    """Exit code 0 where the runs agree in all steps that both have, 1 where they part."""
    a, b = runs = [read(name, locate(name)) for name in map(str, config.run)]
    common = sorted(a.steps.keys() & b.steps.keys())
    if not common:
        raise Refused("run", f"{a.name} and {b.name} have no step in common")
    wrongs = ((at, different(a.steps[at], b.steps[at])) for at in common)
    step, wrong = next(((at, wrong) for at, wrong in wrongs if wrong), (None, {}))
    configs = [run.config(max(run.steps)) for run in runs]
    bits = {key for one in configs for key in identity(one)}
    settings = differences(*(dict(flatten(asdict(one))) for one in configs))
    report: dict[str, Any] = {
        "a": a.name,
        "b": b.name,
        "settings": [{"key": k, "a": x, "b": y, "harmless": k not in bits} for k, (x, y) in settings.items()],
        "data": [(read_json(run.folder / "data.json") or {}).get("digest") for run in runs],
        "fingerprint": differences(*(run.starts[max(run.steps)].get("fingerprint", {}) for run in runs)),
        "handshakes": [f"{run.name}, step {event['step']}" for run in runs for event in run.unequal],
        "steps": {"a": len(a.steps), "b": len(b.steps), "common": len(common)},
        "compared": sorted(a.steps[common[0]].keys() & b.steps[common[0]].keys()),
        "step": step,
        "differs": wrong,
        "findings": [],
    }
    if step is not None:
        parting = Parting(runs, step, wrong, config)
        report["findings"] = parting.findings(agreed_before=step - 1 in common)
    config.format.tell(report, _show)
    return DONE if step is None else FAILED


class Parting:
    """Two runs at the first step at which their records part: what its causes are, and notes beside them."""

    def __init__(self, runs: list[Record], step: int, wrong: dict[str, list[int]], config: Config) -> None:
        self.runs, self.step, self.wrong = runs, step, wrong
        self._recompute, self._quiet = config.recompute, config.format is Format.json
        self.configs = [run.config(step) for run in runs]
        self.recorded = [run.steps[step] for run in runs]
        self.known = all("tokens" in recorded for recorded in self.recorded)
        self.virtual_ranks = range(self.configs[0].batch.virtual_ranks)
        self.found: dict[str, str] = {}
        self.notes: list[str] = []

    def findings(self, agreed_before: bool) -> list[str]:
        """What is to be said of the step, causes before effects, then what computing it again has shown."""
        cuts = [_cut(config) for config in self.configs]
        if cuts[0] != cuts[1]:
            return [f"they cut a step differently: {cuts[0]} against {cuts[1]}"]
        if "learning rate" in self.wrong:
            old, new = (recorded["learning rate"] for recorded in self.recorded)
            self.found["learning rate"] = f"their learning rates differ: {old} -> {new}"
        for look in (self._data, lambda: self._parameters(agreed_before), self._gradient):
            try:
                look()
            except Refused as refusal:
                self.notes.append(f"not narrowed down further: {refusal}")
        return [*self.found.values(), *self.notes]

    def _data(self) -> None:
        """Name the first row whose tokens differ."""
        which = self.wrong.get("tokens", []) if self.known else self.virtual_ranks
        if not which:
            return
        if self.known:
            self.found["data"] = f"their data differ: virtual ranks {_list(which)}"
        prepared = [run.prepared() for run in self.runs]
        streams = [Stream.of(config, found) for config, found in zip(self.configs, prepared, strict=True)]
        rows: list[list[int]] = []  # that differ: virtual rank, micro-batch, row
        for v in which:
            both = [[one.micro_batch(self.step - 1, v, i) for i in range(one.micro_batches)] for one in streams]
            for run, recorded, tokens in zip(self.runs, self.recorded, both, strict=True):
                seen = functools.reduce(lambda before, part: checksum(part.tobytes(), before), tokens, 0)
                if "tokens" in recorded and recorded["tokens"][v] != word(seen):
                    why = f"the tokens that {run.name} recorded are not those that it has"
                    self.notes.append(f"virtual rank {v}: {why}")
            rows += [[v, *place] for place in np.argwhere((np.stack(both[0]) != np.stack(both[1])).any(-1)).tolist()]
        if not rows:
            return
        v, i, row = rows[0]
        sides, ids = "", [one.micro_batch(self.step - 1, v, i)[row] for one in streams]
        at = int((ids[0] != ids[1]).argmax())
        for one, found, tokens in zip(streams, prepared, ids, strict=True):
            source, _, shard, window = one.places(self.step - 1, v, i)[row]
            document = one.document(source, shard, window, at)
            text = Tokenizer.load(found.tokenizer).decode((tokens[max(0, at - BEFORE) :] % one.vocab).tolist())
            place = "" if document is None else f"document {document} of shard {shard} "
            sides += f"\n  {place}{text[:EXCERPT]!r}"
        first = f"virtual rank {v}, micro-batch {i}, row {row}, from token {at} on"
        more = f" (and {len(rows) - 1} more rows)" if len(rows) > 1 else ""
        self.found["data"] = f"their data differ: {first}{more}:{sides}"

    def _parameters(self, agreed_before: bool) -> None:
        """Name the elements that differed before the step."""
        if self.known and "parameters" not in self.wrong:
            return
        sentence = "their parameters differed before the step"
        if self.known:
            self.found["parameters"] = ": ".join(filter(None, (sentence, _some(self._named()))))
        if not self._recompute:
            return
        states = []
        for run in self.runs:
            again = Rerun(run, self.step, self._quiet)
            states.append(_bits(again, "model"))
            if self._leads_elsewhere(run, again):
                base = f"checkpoint {again.base}" if again.base else "initialisation"
                self.notes.append(
                    f"{run.name} did not record the parameters that {base} leads to: "
                    "they were changed on the way, or this machine computes otherwise"
                )
        if changes := _changes(*states):
            self.found["parameters"] = f"{sentence}: {changes}"
        if agreed_before and "parameters" in self.found:
            self._update()

    def _named(self) -> list[str]:
        """The parameters that differ by the records alone; empty where these have one checksum for all."""
        mine, other = (recorded["parameters"] for recorded in self.recorded)
        if min(len(mine), len(other)) < 2 or len(mine) != len(other):
            return []
        vocab = Prepared.read(self.runs[0].folder / "data.json").vocab
        names = Flat(build(self.configs[0].model, vocab, seed=0, device=torch.device("meta"))).slots
        return [name for name, x, y in zip(names, mine, other, strict=True) if x != y]

    def _leads_elsewhere(self, run: Record, again: Rerun) -> bool:
        recorded = run.steps[self.step].get("parameters")
        return recorded is not None and total(recorded) != again.checksums(again.engine.state.flat.parameters)[0]

    def _update(self) -> None:
        """The step before agrees, its gradient included: does its update lead here, and from equal moments?"""
        states, before, proved = [], self.step - 1, True
        for run in self.runs:
            again = Rerun(run, before, self._quiet)
            states.append(_bits(again, "optimizer"))
            again.advance()
            if self._leads_elsewhere(run, again):
                proved = False
                self.notes.append(
                    f"{run.name}: step {before}, computed again, does not lead to the parameters of step "
                    f"{self.step}: they were changed between the two, or its arithmetic went wrong"
                )
        if moments := _changes(*states):
            self.notes.append(f"the moments differed before step {before}: {moments}")
        elif proved:
            self.notes.append(f"step {before} agrees, its gradient too: its update differs ({self._why()})")

    def _gradient(self) -> None:
        """Where nothing before it differs: the virtual ranks whose gradient does, and whose record is not true."""
        if self.found.keys() - {"learning rate"} or self.wrong.keys() == {"learning rate"}:
            return
        starts = [run.start(self.step) for run in self.runs]
        if any(c.reduce.mode is ReduceMode.fast and s["world"] > 1 for c, s in zip(self.configs, starts, strict=True)):
            why = "the order of its sum is not fixed, so nothing can be proved"
            self.found["gradient"] = f"reduce=fast on several ranks: {why}"
            return
        which = self.wrong.get("leaves", []) if self.known else self.virtual_ranks
        if self.known and which:
            self.found["gradient"] = f"{SAME}, another gradient in virtual rank {_list(which)}"
        elif self.known:
            others = ", ".join(self.wrong)
            self.found["gradient"] = f"{SAME}, the same gradient in all virtual ranks, another sum: {others}"
        if self._recompute:
            self._prove(which)

    def _prove(self, which: Iterable[int]) -> None:
        """Compute the step again in both runs: whose record is not reproduced, which gradient differs first."""
        sums, reproduced = [], True
        for run in self.runs:
            again = Rerun(run, self.step, self._quiet)
            parts = ((v, i, buffer) for v in which for i, buffer in enumerate(again.leaf(v)))
            sums.append({(v, i): again.checksums(buffer.tensor, by_parameter=True) for v, i, buffer in parts})
            again.advance()
            if wrong := different(run.steps[self.step], again.computed[self.step]):
                reproduced = False
                self.notes.append(f"{run.name} is not reproduced here: {_places(wrong)}")
            if again.foreign:
                self.notes.append(f"{run.name} was computed on another machine than this one: {_pairs(again.foreign)}")
        if reproduced:
            self.notes.append(f"both are reproduced here: {self._why()}")
        for (v, i), mine in sums[0].items():
            if mine != sums[1][v, i]:
                slots = zip(again.engine.state.flat.slots, mine, sums[1][v, i], strict=True)
                names = [name for name, x, y in slots if x != y]
                self.notes.append(f"{SAME}, another gradient in virtual rank {v}, micro-batch {i}: {_some(names)}")
                return

    def _why(self) -> str:
        settings = ", ".join(differences(*map(plain_identity, self.configs)))
        prints = ", ".join(differences(*(run.start(self.step).get("fingerprint", {}) for run in self.runs)))
        why = f"settings: {settings}" if settings else "their settings are equal"
        return f"{why}; fingerprints: {prints}" if prints else why


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more parameters" if len(names) > SHOWN else "")


def _pairs(both: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} {old} -> {new}" for key, (old, new) in both.items())


def _places(wrong: dict[str, list[int]]) -> str:
    """What differs, and in which virtual ranks."""
    ranks = {key: f" of virtual rank {_list(at)}" for key, at in wrong.items() if at and key in ("tokens", "leaves")}
    return "; ".join(f"{key}{ranks.get(key, '')}" for key in wrong)


def _cut(config: Train) -> str:
    batch = config.batch
    rows = f"{batch.micro_batches} x {batch.micro_batch} sequences of {config.model.context} tokens"
    return f"{batch.virtual_ranks} virtual ranks x {rows}"


def _bits(again: Rerun, file: str) -> Bits:
    pieces = [piece for piece in again.engine.state.pieces() if piece.file == file]
    return {p.name: p.data.detach().cpu().clone().view(torch.int32).view(p.shape) for p in pieces}


def _changes(a: Bits, b: Bits) -> str:
    """The tensors whose bits differ; of each the first element, how many do, and in how many bits."""
    if {name: bits.shape for name, bits in a.items()} != {name: bits.shape for name, bits in b.items()}:
        raise Refused("model", "they train models of other shapes")
    told = []
    for name, mine in a.items():
        unequal = mine != b[name]
        if unequal.any():
            index = unequal.nonzero()[0].tolist()
            old, new = (int(side[unequal][0]) & (2**32 - 1) for side in (mine, b[name]))
            flipped = [(x & (2**32 - 1)).bit_count() for x in (mine ^ b[name])[unequal].tolist()]
            many, bits = len(flipped), sum(flipped)
            counts = f"({many:,} element{'s' * (many > 1)}, {bits:,} bit{'s' * (bits > 1)})"
            told.append(f"{name}{index}: 0x{old:08x} -> 0x{new:08x} {counts}")
    return "\n  ".join(told[:SHOWN] + ([f"and {len(told) - SHOWN} more tensors"] if len(told) > SHOWN else []))


def _show(report: dict[str, Any]) -> None:
    rich = Rich(soft_wrap=True, highlight=False, markup=False)
    if report["settings"]:
        table = Table("setting", report["a"], report["b"], "", box=None)
        for item in report["settings"]:
            table.add_row(item["key"], str(item["a"]), str(item["b"]), "harmless" if item["harmless"] else "")
        rich.print(table)
    ours, theirs = ((digest or "n/a")[:12] for digest in report["data"])
    rich.print(f"data: {f'the same ({ours})' if report['data'][0] == report['data'][1] else f'{ours} -> {theirs}'}")
    rich.print(f"fingerprint: {_pairs(report['fingerprint']) or 'the same'}")
    for where in report["handshakes"]:
        rich.print(f"unequal handshake: the ranks of {where} did not compute the same bits")
    if report["step"] is None:
        common, compared = report["steps"]["common"], ", ".join(report["compared"])
        rich.print(f"they agree in all {common} steps that both have, in {compared}")
        return
    rich.print(f"they part at step {report['step']}, in {_places(report['differs'])}")
    for finding in report["findings"]:
        rich.print(finding)
