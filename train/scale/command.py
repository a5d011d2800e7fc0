"""Which of the questions of `colossus scale` is asked, and the answer as tables or JSON."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from train.checks import Refused, place
from train.commands import Scale
from train.scale import claims, project, tables, validation
from train.scale.calibrate import jobs_of
from train.scale.step_time import calibration, step_time

PLAIN = ("", "model", "published", "spearman", "seconds", "tokens_to_loss", "days")  # numbers that are no proportions
ADDED = ("predicted_step_time_s", "not_predicted", "assumed")


def answer(config: Scale) -> dict[str, Any]:
    """Raises Refused for a plan that cannot be, or a table that cannot be read."""
    if config.table:
        return predict(place(config.table, "table"), place(config.out, "out") if config.out else None)
    if config.show == "validation":
        return validation.validate()
    return {"claims": claims.claims()} if config.show == "claims" else project.project(config)


def show(found: dict[str, Any]) -> None:
    console = Console(width=max(Console().width, 180), highlight=False, markup=False, emoji=False)
    for name, part in ((name, part) for name, part in found.items() if part):
        console.print(_table(name, part))
        console.print(*_notes(part), sep="", end="", soft_wrap=True)


def predict(path: Path, out: Path | None) -> dict[str, Any]:
    """Predict each row of a table; written to `out` with three more columns, errors returned by source."""
    header, rows = tables.rows(path)
    runs = [tables.parse(row) for row in rows]
    possible = [run for run in runs if run.job is not None]
    seconds = step_time(jobs_of(possible), calibration()) if possible else np.zeros(0)
    for run, value in zip(possible, seconds, strict=True):
        if not np.isfinite(value) or value <= 0:
            run.job, run.why_not = None, "the model gives no finite time for it"
    found = {id(run): f"{value:.6g}" for run, value in zip(possible, seconds, strict=True) if run.job is not None}
    if out is not None:
        try:
            with out.open("w", newline="", encoding="utf-8") as file:
                table = csv.writer(file, lineterminator="\n")
                table.writerow([*(key for key in header if key not in ADDED), *ADDED])
                for run in runs:
                    cells = [run.row[key] for key in header if key not in ADDED]
                    table.writerow([*cells, found.get(id(run), ""), run.why_not, "; ".join(run.assumed)])
        except OSError as error:
            raise Refused("out", f"'{out}' cannot be written: {error}") from error
    return {"sources": validation.errors_per_source(runs, calibration())}


def _table(name: str, part: Any) -> Table:
    """A part of an answer: a list of records as columns, a record as lines, figures in their unit with their tag."""
    records = isinstance(part, list) and bool(part)
    table = Table(title=name.replace("_", " "), title_justify="left", title_style="bold", box=None, show_header=records)
    if records:
        keys = [key for key, value in part[0].items() if not isinstance(value, dict)]
        for key in keys:
            numeric = all(isinstance(record[key], int | float | None) for record in part)
            words, widest = (key.replace("_", "\n"), None) if numeric else (key.replace("_", " "), 48)
            table.add_column(words, justify="right" if numeric else "left", max_width=widest)
        table.columns[0].no_wrap, table.columns[0].max_width = True, None  # what a record is about
        for record in part:
            table.add_row(*(shown(record[key], key) for key in keys))
        return table
    for key, value in part.items() if isinstance(part, dict) else [("", part)]:
        table.add_row(key.replace("_", " "), shown(value, key))
    return table


def _notes(part: Any) -> Iterator[str]:
    """Of records what is too long for a column: `left out  PaLM Table 3: the row does not say gpus (1)`."""
    for record in part if isinstance(part, list) else ():
        for key, value in record.items():
            for words, count in value.items() if isinstance(value, dict) else ():
                yield f" {key.replace('_', ' ')}  {next(iter(record.values()))}: {words} ({count})\n"


def shown(value: Any, key: str = "") -> str:
    """A number as people read it: proportions of errors in per cent, figures with unit and tag."""
    if isinstance(value, dict) and set(value) >= {"value", "unit", "tag"}:
        about = f", {value['about']}" if value.get("about") else ""
        return f"{shown(value['value'])} {value['unit']}".rstrip() + f"  ({value['tag']}{about})"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {shown(v, key)}" for k, v in value.items())
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and key not in PLAIN:
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
