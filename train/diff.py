"""`colossus diff`: the first step at which two runs part, where in it, and why.

Two records are read and compared; only to narrow down what they leave open is anything computed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console as Rich
from rich.table import Table

from train import record
from train.commands import Diff as Config
from train.config import DONE, FAILED, ReduceMode, Refused, Train
from train.console import Console
from train.folder import flatten, identity, locate, read_json
from train.narrow import SHOWN, Narrow, places, tell_changes
from train.record import Record


def diff(config: Config) -> int:
    """Exit code 0 where the runs agree in all steps that both have, 1 where they part."""
    a, b = (record.read(name, locate(name)) for name in map(str, config.run))
    common = sorted(a.steps.keys() & b.steps.keys())
    if not common:
        raise Refused("run", f"{a.name} and {b.name} have no step in common")
    newest = a.config(max(a.steps)), b.config(max(b.steps))
    exact = all(one.reduce.mode is ReduceMode.exact for one in newest)
    step, wrong = None, {}
    for at in common:
        if wrong := record.different(a.checks(at, exact), b.checks(at, exact)):
            step = at
            break
    console = Console()

    def tell(done: int, steps: int) -> None:
        if config.format == "table":
            console.progress(f"computing {steps} steps again", done, steps)

    report: dict[str, Any] = {
        "a": a.name,
        "b": b.name,
        "settings": _settings(a, b),
        "data": [(read_json(run.folder / "data.json") or {}).get("digest") for run in (a, b)],
        "fingerprint": _fingerprints(a, b),
        "handshakes": [f"{run.name}, step {event['step']}" for run in (a, b) for event in run.unequal],
        "steps": {"a": len(a.steps), "b": len(b.steps), "common": len(common)},
        "compared": sorted(a.checks(common[0], exact).keys() & b.checks(common[0], exact).keys()),
        "step": step,
        "differs": wrong,
        "findings": [],
    }
    if step is not None:
        report["findings"] = findings(Narrow(a, b, step, tell), wrong, step - 1 in common, config.recompute)
        console.close()
    if config.format == "json":
        print(json.dumps(report))
    else:
        _show(report)
    return DONE if step is None else FAILED


def findings(at: Narrow, wrong: dict[str, list[int]], agreed_before: bool, recompute: bool) -> list[str]:
    """What is to be said of the step, causes before effects, then what computing it again has shown."""
    virtual_ranks = at.configs[0].batch.virtual_ranks
    found: list[str] = []

    def attempt(action: Callable[[], None]) -> None:
        try:
            action()
        except Refused as refusal:
            at.notes.append(f"not narrowed down further: {refusal}")

    cuts = [_cut(config) for config in at.configs]
    if cuts[0] != cuts[1]:
        return [f"they cut a step differently: {cuts[0]} against {cuts[1]}"]
    if "learning rate" in wrong:
        rates = [run.steps[at.step]["lr"] for run in (at.a, at.b)]
        found.append(f"their learning rates differ: {rates[0]} -> {rates[1]}")
    known = all(run.digests.get(at.step) for run in (at.a, at.b))
    causes = len(found)

    def data() -> None:
        which = wrong.get("tokens", []) if known else range(virtual_ranks)
        row = at.data(which) if which else None
        if row is not None:
            found.append(_data(row))

    def parameters() -> None:
        if known and "parameters" not in wrong:
            return
        names = at.named()
        if names:
            found.append(f"their parameters differed before the step: {_some(names)}")
        if recompute:
            changes = at.parameters(agreed_before)
            if changes:
                found[len(found) - bool(names) :] = [
                    f"their parameters differed before the step:{tell_changes(changes)}"
                ]

    def gradient() -> None:
        if at.sums_have_no_order():
            found.append("reduce=fast on several ranks: the order of its sum is not fixed, so nothing can be proved")
            return
        which = wrong.get("leaves", []) if known else list(range(virtual_ranks))
        same = "same data, same parameters, another gradient"
        if known and which:
            found.append(f"{same} in virtual rank {', '.join(map(str, which))}")
        elif known:
            others = ", ".join(wrong)
            found.append(f"same data, same parameters, the same gradient in all virtual ranks, another sum: {others}")
        if recompute:
            at.prove()
            one = at.gradient(which)
            if one is not None:
                place = f"virtual rank {one['virtual_rank']}, micro-batch {one['micro_batch']}"
                at.notes.append(f"{same} in {place}: {_some(one['parameters'])}")

    attempt(data)
    if known and "tokens" in wrong and len(found) == causes:
        found.append(f"their data differ: virtual ranks {', '.join(map(str, wrong['tokens']))}")
    before = len(found)
    attempt(parameters)
    if known and "parameters" in wrong and len(found) == before:
        found.append("their parameters differed before the step")
    if len(found) == causes and (wrong.keys() - {"learning rate"}):
        attempt(gradient)
    return found + at.notes


def _cut(config: Train) -> str:
    batch = config.batch
    rows = f"{batch.micro_batches} x {batch.micro_batch} sequences of {config.model.context} tokens"
    return f"{batch.virtual_ranks} virtual ranks x {rows}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more parameters" if len(names) > SHOWN else "")


def _data(row: dict[str, Any]) -> str:
    sides = [
        ("" if side["document"] is None else f"document {side['document']} of shard {side['shard']} ")
        + repr(side["text"])
        for side in row["sides"]
    ]
    place = f"virtual rank {row['virtual_rank']}, micro-batch {row['micro_batch']}, row {row['row']}"
    more = "" if row["rows"] == 1 else f" (and {row['rows'] - 1} more rows)"
    return f"their data differ: {place}, from token {row['token']} on{more}:\n  {sides[0]}\n  {sides[1]}"


def _settings(a: Record, b: Record) -> list[dict[str, Any]]:
    """The keys that differ; harmless are those that have no say in the result."""
    configs = a.config(max(a.steps)), b.config(max(b.steps))
    mine, other = (dict(flatten(asdict(config))) for config in configs)
    bits = {key for config in configs for key in identity(config)}
    keys = sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key))
    return [{"key": key, "a": mine.get(key), "b": other.get(key), "harmless": key not in bits} for key in keys]


def _fingerprints(a: Record, b: Record) -> dict[str, list[Any]]:
    mine, other = (run.starts[max(run.steps)].get("fingerprint", {}) for run in (a, b))
    keys = sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key))
    return {key: [mine.get(key), other.get(key)] for key in keys}


def _show(report: dict[str, Any]) -> None:
    rich = Rich(soft_wrap=True, highlight=False, markup=False)
    if report["settings"]:
        table = Table(box=None)
        for column in ("setting", report["a"], report["b"], ""):
            table.add_column(column)
        for item in report["settings"]:
            values = (str(item["a"]), str(item["b"]))
            table.add_row(item["key"], *values, "harmless" if item["harmless"] else "")
        rich.print(table)
    ours, theirs = ((digest or "n/a")[:12] for digest in report["data"])
    rich.print(f"data: {f'the same ({ours})' if report['data'][0] == report['data'][1] else f'{ours} -> {theirs}'}")
    prints = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in report["fingerprint"].items())
    rich.print(f"fingerprint: {prints or 'the same'}")
    for where in report["handshakes"]:
        rich.print(f"unequal handshake: the ranks of {where} did not compute the same bits")
    steps = report["steps"]
    if report["step"] is None:
        rich.print(f"they agree in all {steps['common']} steps that both have, in {', '.join(report['compared'])}")
        return
    rich.print(f"they part at step {report['step']}, in {places(report['differs'])}")
    for finding in report["findings"]:
        rich.print(finding)
