"""`colossus scale`: the projector's answer on the terminal, and as a page with plots, a CSV or JSON.

`run=` takes the question from a finished run's folder and scales the answer by what that run measured.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from train.checks import DONE, place
from train.commands import Scale
from train.folder import deliver, locate
from train.outlook import anchor, asked
from train.report.chart import Series, chart, parted
from train.report.page import sheet
from train.report.record import Run
from train.report.words import esc, table
from train.scale import command
from train.scale.project import project

Part = Any  # of an answer: records, or figures by name


def scale(config: Scale) -> int:
    """Exit code 0; raises Refused for a plan that cannot be, a run that cannot be compared, a file that is no table."""
    if config.run:
        run = Run(locate(config.run))
        answer = project(asked(run.path, config)[1], anchor(run.path, run.last("start"), run.summary["tokens_per_s"]))
    else:
        answer = command.answer(config)
    if config.out and not config.table:
        out = place(config.out, "out")
        deliver(out, {".html": page, ".csv": _csv}.get(out.suffix, json.dumps)(answer))
    config.format.tell(answer, command.show)
    return DONE


def _csv(answer: dict[str, Any]) -> str:
    """A line a figure: the part it is of, its row there, name, value, unit, tag and what is to be known of it."""
    lines: list[Sequence[Any]] = [("part", "row", "name", "value", "unit", "tag", "about")]
    for part, content in answer.items():
        for i, record in enumerate(content if isinstance(content, list) else [content]):
            for name, value in record.items() if isinstance(record, dict) else [("", record)]:
                figure = value if isinstance(value, dict) and "value" in value else {"value": value}
                lines.append((part, i, name, *(figure.get(key, "") for key in ("value", "unit", "tag", "about"))))
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(lines)
    return written.getvalue()


def page(answer: dict[str, Any]) -> str:
    """HTML that needs nothing else: plots where there are some, and every part of the answer as a table."""
    title = f"{answer['job']['cluster']}" if "job" in answer else "the projector"
    parts = {"": _plots(answer)} if "by_size" in answer else {}
    return sheet(title, parts | {name.replace("_", " "): _table(part) for name, part in answer.items() if part})


def _plots(answer: dict[str, Any]) -> str:
    """MFU, goodput and the fabric's share against the number of GPUs and the batch; where a step's time goes."""
    sizes, batches = answer["by_size"], answer["by_batch"]

    def curve(rows: list[dict[str, Any]], key: str, x: str, name: str, color: int) -> Series:
        known = [row for row in rows if key in row]
        values = [100 * row[key] if key != "days" else row[key] for row in known]
        return Series(name=name, x=[row[x] for row in known], y=values, color=color, dots=True)

    names = {"mfu": "MFU", "goodput_restart": "goodput, restarting", "goodput_in_place": "goodput, in place"}
    lines = [curve(sizes, key, "gpus", name, i) for i, (key, name) in enumerate((names | {"fabric": "fabric"}).items())]
    note = "The same job and batch, predicted; fabric: the share of a step that waits for it."
    drawn = chart("Against the number of GPUs", "%", [line for line in lines if line.x], zero=True, note=note)
    drawn += chart("MFU against the batch", "%", [curve(batches, "mfu", "batch", "MFU", 0)], zero=True)
    drawn += chart("Days to one loss, by batch", "d", [curve(batches, "days", "batch", "days", 1)], zero=True)
    whole, bars, key = answer["step"]["seconds"]["value"], [], ""
    for i, (name, part) in enumerate(answer["where_it_goes"].items()):
        share = part["value"] / whole
        words = f"{esc(name)} {100 * share:.1f} %"
        bars.append((f'style="fill:var(--c{i % 6})"', share, words))
        key += f'<span class="k c{i % 6}">{words}</span>' if share > 0.01 else ""
    head = f'<figcaption><b>A step</b> <span class="key">{key}</span></figcaption>'
    return f'{drawn}<figure class="chart">{head}{parted("a step", bars)}</figure>'


def _table(part: Part) -> str:
    if isinstance(part, list):
        rows = [[esc(command.shown(value, key)) for key, value in record.items()] for record in part]
        return table([key.replace("_", " ") for key in part[0]], rows)
    pairs = part.items() if isinstance(part, dict) else [("", part)]
    return table(["", ""], [[esc(key.replace("_", " ")), esc(command.shown(value, key))] for key, value in pairs])
