"""`colossus runs`: the runs under a folder, a line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from train import events
from train.commands import Runs
from train.folder import read_json
from train.summary import summarize


def runs(config: Runs) -> int:
    found = [_describe(path.parent) for path in sorted(Path(config.runs).expanduser().glob("*/config.yaml"))]
    none = f"no runs under {config.runs}/: colossus train makes the first one"
    config.format.tell(found, _show if found else lambda _: print(none))
    return 0


def _show(found: list[dict[str, Any]]) -> None:
    figures = (Column(name, justify="right") for name in ("steps", "tokens", "loss", "bits/byte", "tokens/s"))
    table = Table("name", "state", *figures, "state sha256", box=None)
    for run in found:
        numbers = (_shown(run["final_loss"], ".4f"), _shown(run["val_bpb"], ".4f"), _shown(run["tokens_per_s"], ",.0f"))
        digest = (run["state_sha256"] or "")[:12]
        table.add_row(run["name"], run["state"], str(run["steps"]), f"{run['tokens'] / 1e6:.2f} M", *numbers, digest)
    Console(soft_wrap=True, highlight=False).print(table)


def _describe(path: Path) -> dict[str, Any]:
    """A run by its summary, or by its events where it has not ended."""
    summary = read_json(path / "summary.json")
    state = "unfinished" if summary is None else "stopped" if summary["stopped"] else "done"
    return {"name": path.name, "state": state, **(summary or summarize(events.read(path / "events.jsonl")))}


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
