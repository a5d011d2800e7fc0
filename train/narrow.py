"""Where in a step two runs part, and why: what their records leave open is computed again, and no more.

Causes come before effects: the data, the parameters, the gradient of each virtual rank, their sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from train.batch import checksum
from train.config import ReduceMode, Refused
from train.data.prepare import Prepared
from train.data.tokenizer import Tokenizer
from train.engine import stream
from train.flat import Flat
from train.folder import plain_identity, read_json
from train.models.build import build
from train.record import Record, total
from train.rerun import Rerun, Tell, word

SHOWN = 5  # tensors named
BEFORE, EXCERPT = 8, 100  # tokens before the first that differs, characters shown

State = dict[tuple[str, str], Tensor]  # (file, name) -> bits, int32, in the tensor's shape


class Narrow:
    """Two runs, a and b, at the first step at which their records part."""

    def __init__(self, a: Record, b: Record, step: int, tell: Tell) -> None:
        self.a, self.b, self.step, self._tell = a, b, step, tell
        self.configs = a.config(step), b.config(step)
        old, new = map(plain_identity, self.configs)
        self.settings = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        self.notes: list[str] = []

    # ------------------------------------------------------------------------------------------------- data

    def data(self, which: Iterable[int]) -> dict[str, Any] | None:
        """The first row of these virtual ranks whose tokens differ; None where none does."""
        prepared = self.a.prepared(), self.b.prepared()
        both = [stream(config, found) for config, found in zip(self.configs, prepared, strict=True)]
        first: dict[str, Any] | None = None
        count = 0
        for v in which:
            seen = [0, 0]
            for i in range(both[0].micro_batches):
                tokens = [one.micro_batch(self.step - 1, v, i) for one in both]
                seen = [checksum(one.tobytes(), before) for one, before in zip(tokens, seen, strict=True)]
                for row in range(both[0].rows):
                    unequal = tokens[0][row] != tokens[1][row]
                    count += int(unequal.any())
                    if first is None and unequal.any():
                        at = int(unequal.argmax())
                        sides = [
                            self._side(one, prepared[side], v, i, row, at, tokens[side][row].tolist())
                            for side, one in enumerate(both)
                        ]
                        first = {"virtual_rank": v, "micro_batch": i, "row": row, "token": at, "sides": sides}
            for run, number in zip((self.a, self.b), seen, strict=True):
                recorded = run.digests.get(self.step, {}).get("tokens")
                if recorded and recorded[v] != word(number):
                    self.notes.append(
                        f"virtual rank {v}: the tokens that {run.name} recorded are not those that it has"
                    )
        return first and {**first, "rows": count}

    def _side(self, one: Any, prepared: Prepared, v: int, i: int, row: int, at: int, ids: list[int]) -> dict[str, Any]:
        source, _, shard, window = one.places(self.step - 1, v, i)[row]
        text = Tokenizer.load(prepared.tokenizer).decode(ids[max(0, at - BEFORE) :])[:EXCERPT]
        document = one.document(source, shard, window, at)
        return {"source": source, "shard": shard, "window": window, "document": document, "text": text}

    # ------------------------------------------------------------------------------------------- parameters

    def named(self) -> list[str]:
        """The parameters that differ by the records alone; empty where these have one checksum for all."""
        mine, other = (run.digests.get(self.step, {}).get("parameters", []) for run in (self.a, self.b))
        if min(len(mine), len(other)) < 2 or len(mine) != len(other):
            return []
        config, vocab = self.configs[0], (read_json(self.a.folder / "data.json") or {})["vocab"]
        names = Flat(build(config.model, vocab, seed=0, device=torch.device("meta"))).slots
        return [name for name, x, y in zip(names, mine, other, strict=True) if x != y]

    def parameters(self, agreed_before: bool) -> list[dict[str, Any]]:
        """The elements that differed before the step; `agreed_before`: the step before it agrees in all it recorded."""
        states = []
        for run in (self.a, self.b):
            again = Rerun(run, self.step - 1, self._tell)
            states.append(_bits(again))
            again.settle(self.step)
            recorded = run.digests.get(self.step, {}).get("parameters")
            if recorded and total(recorded) != total(again.parameters()):
                self.notes.append(
                    f"{run.name} did not record the parameters that {_base(again)} leads to: "
                    "they were changed on the way, or this machine computes otherwise"
                )
        found = _changes(*states)
        if agreed_before:
            self._updates()
        return [change for change in found if change["file"] == "model"]

    def _updates(self) -> None:
        """Step - 1 agrees, its gradient included: does its update lead to what was recorded, and from equal moments?"""
        states, proved = [], True
        for run in (self.a, self.b):
            try:
                again = Rerun(run, self.step - 2, self._tell)
                states.append(_bits(again))
                again.advance(self.step - 1)
                again.settle(self.step)
            except Refused as refusal:
                self.notes.append(f"{run.name}: whether step {self.step - 1} leads there is not known ({refusal})")
                return
            recorded = run.digests.get(self.step, {}).get("parameters")
            if recorded and total(recorded) != total(again.parameters()):
                proved = False
                self.notes.append(
                    f"{run.name}: step {self.step - 1}, computed again, does not lead to the parameters of step "
                    f"{self.step}: they were changed between the two, or its arithmetic went wrong"
                )
        moments = [change for change in _changes(*states) if change["file"] == "optimizer"]
        if moments:
            self.notes.append(f"the moments differed before step {self.step - 1}:{tell_changes(moments)}")
        elif proved:
            self.notes.append(f"step {self.step - 1} agrees, its gradient too: its update differs ({self._why()})")

    # --------------------------------------------------------------------------------------------- gradient

    def gradient(self, which: Iterable[int]) -> dict[str, Any] | None:
        """The first of these virtual ranks that computes another gradient when it is computed again in both runs."""
        for v in which:
            sums: list[list[Tensor]] = []
            for run in (self.a, self.b):
                again = Rerun(run, self.step - 1, self._tell)
                again.settle(self.step)
                kept: list[Tensor] = []
                again.leaf(v, lambda i, gradient, kept=kept: kept.append(gradient.cpu().clone()))  # type: ignore[misc]
                sums.append(kept)
            for i, (mine, other) in enumerate(zip(*sums, strict=True)):
                if not torch.equal(mine.view(torch.int32), other.view(torch.int32)):
                    flat = again.engine.state.flat
                    pairs = zip(flat.named(mine).items(), flat.named(other).values(), strict=True)
                    names = [name for (name, x), y in pairs if not torch.equal(x, y)]
                    return {"virtual_rank": v, "micro_batch": i, "parameters": names}
        return None

    def prove(self) -> None:
        """Compute the step again in both runs, and say whose record is not reproduced."""
        wrong = []
        for run in (self.a, self.b):
            again = Rerun(run, self.step - 1, self._tell)
            again.advance(self.step)
            found = again.different(self.step)
            if found:
                wrong.append(run.name)
                self.notes.append(f"{run.name} is not reproduced here: {places(found)}")
            if again.foreign:
                changes = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in again.foreign.items())
                self.notes.append(f"{run.name} was computed on another machine than this one: {changes}")
        if not wrong:
            self.notes.append(f"both are reproduced here: {self._why()}")

    def _why(self) -> str:
        prints = [run.start(self.step).get("fingerprint", {}) for run in (self.a, self.b)]
        keys = sorted(key for key in prints[0].keys() | prints[1].keys() if prints[0].get(key) != prints[1].get(key))
        settings = f"settings: {', '.join(self.settings)}" if self.settings else "their settings are equal"
        return settings + (f"; fingerprints: {', '.join(keys)}" if keys else "")

    def sums_have_no_order(self) -> bool:
        runs = zip((self.a, self.b), self.configs, strict=True)
        return any(c.reduce.mode is ReduceMode.fast and run.start(self.step)["world"] > 1 for run, c in runs)


def places(wrong: dict[str, list[int]]) -> str:
    """What differs, and in which virtual ranks."""
    ranks = {key: ", ".join(map(str, at)) for key, at in wrong.items() if key in ("tokens", "leaves") and at}
    return "; ".join(f"{key} of virtual rank {ranks[key]}" if key in ranks else key for key in wrong)


def _base(again: Rerun) -> str:
    return f"checkpoint {again.base}" if again.base else "initialisation"


def _bits(again: Rerun) -> State:
    pieces = again.engine.state.pieces()
    return {(p.file, p.name): p.data.detach().cpu().clone().view(torch.int32).view(p.shape) for p in pieces}


def _changes(a: State, b: State) -> list[dict[str, Any]]:
    """The tensors whose bits differ; of each the first element, how many do, and in how many bits."""
    if {key: bits.shape for key, bits in a.items()} != {key: bits.shape for key, bits in b.items()}:
        raise Refused("model", "they train models of other shapes")
    found = []
    for (file, name), mine in a.items():
        unequal = (mine != b[file, name]).view(-1)
        if unequal.any():
            at = int(unequal.int().argmax())
            index = [int(i) for i in torch.unravel_index(torch.tensor(at), mine.shape)]
            xor = (mine ^ b[file, name]).view(-1)[unequal].tolist()
            old, new = (int(side.view(-1)[at]) & (2**32 - 1) for side in (mine, b[file, name]))
            change = {"file": file, "name": name, "index": index, "a": f"0x{old:08x}", "b": f"0x{new:08x}"}
            bits = sum((x & (2**32 - 1)).bit_count() for x in xor)
            found.append({**change, "elements": len(xor), "of": math.prod(mine.shape), "bits": bits})
    return found


def tell_changes(changes: list[dict[str, Any]]) -> str:
    told = [
        f"{c['name']}{c['index']}: {c['a']} -> {c['b']} "
        f"({c['elements']:,} element{'s' * (c['elements'] > 1)}, {c['bits']:,} bit{'s' * (c['bits'] > 1)})"
        for c in changes[:SHOWN]
    ]
    told += [f"and {len(changes) - SHOWN} more tensors"] if len(changes) > SHOWN else []
    return f" {told[0]}" if len(told) == 1 else "".join(f"\n  {line}" for line in told)
