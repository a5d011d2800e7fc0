"""`colossus drill`: a run under faults on order and its twin without any; what they cost, and whether a bit changed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from rich.console import Console as Rich
from rich.table import Column, Table

from train import events
from train.checks import DONE, FAILED
from train.commands import Drill as Config
from train.commands import Format
from train.config import Faults, Train
from train.faults.plan import Injection, plan
from train.folder import read_train
from train.job import train
from train.ledger import by_kind, recoveries
from train.summary import summarize

Record = dict[str, Any]


def drill(config: Config) -> int:
    """Exit code 0 where all faults have struck and were survived and the bits are equal; 75 where a run was stopped."""
    job = Train(**{item.name: getattr(config, item.name) for item in fields(Train)})
    twin = replace(job, name=f"{job.name}-twin", faults=Faults())
    codes = []
    with contextlib.redirect_stdout(sys.stdout if config.format is Format.table else sys.stderr):
        for one in (job, twin):  # the faulty one first: it also pays for importing torch
            codes.append(train(one))
            if codes[-1] != DONE:
                break
    if codes[-1] not in (DONE, FAILED):
        return codes[-1]  # stopped on request: the same command goes on
    records, twins = (list(events.read(one.folder / "events.jsonl")) for one in (job, twin))
    found = report(records, twins, plan(read_train(job.folder / "config.yaml")))
    config.format.tell(found, _show)
    return DONE if codes == [DONE, DONE] and found["passed"] else FAILED


def report(run: Sequence[Record], twin: Sequence[Record], planned: Sequence[Injection]) -> dict[str, Any]:
    """What the events of both say of the faults that were planned."""
    summaries = [summarize(one) for one in (run, twin)]
    struck = recoveries(run)
    ids = {one["id"] for one in struck}
    dead = {one["id"] for one in struck if not one["survived"]}
    hashes = [summary["state_sha256"] for summary in summaries]
    parted = _first_difference(run, twin)
    equal = None not in hashes and hashes[0] == hashes[1] and parted is None
    walls = [_wall(one) - told["goodput"]["seconds"]["idle"] for one, told in zip((run, twin), summaries, strict=True)]
    return {
        "planned": len(planned),
        "struck": len(ids),
        "survived": len(ids - dead),
        "never_struck": [one.id for one in planned if one.id not in ids],
        "kinds": by_kind(struck),
        "equal": equal,
        "state_sha256": hashes,
        "first_difference": parted,
        "goodput": [summary["goodput"] for summary in summaries],
        "efficiency": walls[1] / walls[0] if all(walls) else None,  # the twin's wall time by the run's
        "timeline": [{**one, "after_s": one["time"] - run[0]["time"]} for one in struck],
        "passed": equal and not dead and all(one.id in ids for one in planned),
    }


def _wall(records: Sequence[Record]) -> float:
    """Seconds from the first start on: importing torch, which is done once for both runs, is neither's."""
    begin = next((record["time"] for record in records if record["kind"] == "start"), None)
    return 0.0 if begin is None else float(records[-1]["time"] - begin)


def _first_difference(run: Sequence[Record], twin: Sequence[Record]) -> dict[str, Any] | None:
    """The first step whose loss, each time that the run computed it, is not its twin's to the bit."""
    losses = {r["step"]: r["loss_hex"] for r in twin if r["kind"] == "step"}
    steps = [r for r in run if r["kind"] == "step" and losses.get(r["step"], r["loss_hex"]) != r["loss_hex"]]
    first = min(steps, key=lambda r: r["step"], default=None)
    return first and {"step": first["step"], "run": first["loss_hex"], "twin": losses[first["step"]]}


def _show(found: dict[str, Any]) -> None:
    rich = Rich(soft_wrap=True, highlight=False, markup=False)
    rich.print("\ntimeline")
    for one in found["timeline"]:
        noticed, recovered = (_seconds(one[key]) for key in ("detection_s", "recovery_s"))
        what = "" if one["detection_s"] is None else f": noticed after {noticed}"
        what += "" if one["by"] is None else f", {one['by']} after {recovered} more"
        rich.print(f"  {one['after_s']:8.1f} s  {one['id']}, step {one['step']}{what}")
    right = [Column(name, justify="right") for name in ("n", "survived")]
    times = [Column(f"{what} {q}", justify="right") for what in ("noticed", "recovered") for q in ("p50", "p99")]
    table = Table("fault", *right, *times, box=None)
    for kind, row in found["kinds"].items():
        cells = (_seconds(row[key][q]) for key in ("detection_s", "recovery_s") for q in ("p50", "p99"))
        table.add_row(kind, str(row["n"]), str(row["survived"]), *cells)
    rich.print(table)
    goodputs = found["goodput"]
    sides = [Column(f"{side} {unit}", justify="right") for side in ("run", "twin") for unit in ("s", "%")]
    table = Table("rank-seconds", *sides, box=None)
    for part in goodputs[0]["seconds"]:
        table.add_row(part, *(cell for one in goodputs for cell in _both(one["seconds"][part], one)))
    table.add_row("all", *(cell for one in goodputs for cell in _both(one["wall_s"], one)))
    rich.print(table)
    never = f"; never struck: {', '.join(found['never_struck'])}" if found["never_struck"] else ""
    rich.print(f"survived {found['survived']} of {found['struck']} faults, {found['planned']} planned{never}")
    hashes, parted = found["state_sha256"], found["first_difference"]
    if found["equal"]:
        rich.print(f"bits changed 0: state {hashes[0][:16]}… in both")
    else:
        rich.print(f"BITS CHANGED: state {' and '.join((one or 'none')[:16] for one in hashes)}")
    if parted is not None:
        rich.print(f"their losses part at step {parted['step']}: {parted['run']} and {parted['twin']}")
    shares = " and ".join(f"{100 * one['share']:.1f} %" for one in goodputs)
    efficiency = "n/a" if found["efficiency"] is None else f"{100 * found['efficiency']:.1f} %"
    rich.print(f"goodput {shares} of its twin; efficiency (the twin's wall time by the run's) {efficiency}")


def _both(seconds: float, goodput: dict[str, Any]) -> tuple[str, str]:
    """A part's rank-seconds and its percentage."""
    share = seconds / goodput["wall_s"] if goodput["wall_s"] else 0.0
    return f"{share * goodput['rank_s']:.1f}", f"{100 * share:.1f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"
