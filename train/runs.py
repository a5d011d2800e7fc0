"""`colossus runs`: the runs under a folder, a line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from train import events
from train.checks import MALFORMED, Refused, place
from train.commands import Runs
from train.folder import read_json
from train.summary import summarize


def runs(config: Runs) -> int:
    found = [_describe(path.parent) for path in sorted(place(config.runs, "runs").glob("*/config.yaml"))]
    none = f"no runs under {config.runs}/: colossus train makes the first one"
    config.format.tell(found, _show if found else lambda _: print(none))
    return 0


def _show(found: list[dict[str, Any]]) -> None:
    figures = (Column(name, justify="right") for name in ("steps", "tokens", "loss", "bits/byte", "tokens/s"))
    table = Table("name", "state", *figures, "state sha256", box=None)
    for run in found:
        table.add_row(run["name"], run["state"], *_cells(run))
    Console(soft_wrap=True, highlight=False).print(table)


def _cells(run: dict[str, Any]) -> list[str]:
    numbers = (_shown(run["final_loss"], ".4f"), _shown(run["val_bpb"], ".4f"), _shown(run["tokens_per_s"], ",.0f"))
    return [f"{run['steps']:d}", f"{run['tokens'] / 1e6:.2f} M", *numbers, (run["state_sha256"] or "")[:12]]


def _describe(path: Path) -> dict[str, Any]:
    """A run by its summary, or by its events where it has not ended; `broken` where neither can be read."""
    try:
        summary = read_json(path / "summary.json")
        state = "unfinished" if summary is None else "stopped" if summary["stopped"] else "done"
        found = summarize(events.read(path / "events.jsonl")) if summary is None else summary
        _cells(found)
    except (Refused, *MALFORMED):
        state, found = "broken", summarize([])
    return {"name": path.name, "state": state, **found}


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
