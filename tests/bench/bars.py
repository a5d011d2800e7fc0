"""The figures of `colossus bench` as a picture: `python -m tests.bench.bars PEERS.json` draws it anew beside them.

A row of panels for each model and precision, a panel for each number of ranks and threads: tokens/s of each contestant
as a bar from 0, its quartiles over the rounds as a whisker. Panels of a row have one scale.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from train.report.chart import ticks
from train.report.words import esc, number

LEFT, WIDE, GAP = 270, 200, 24  # of labels, of a panel, between panels
BAR, PITCH, HEAD, FOOT = 11, 18, 44, 34
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#6e7681}.big{font-size:14px;font-weight:600}.small{font-size:10px}"
    ".bar{fill:#9aa3b0;fill-opacity:.55}.ours{fill:#2f7fd6;fill-opacity:.8}.other{fill:#d1432f;fill-opacity:.35}"
    ".limit{fill:none;stroke:#9aa3b0;stroke-dasharray:3 2}path{fill:none;stroke:#6e7681}.grid{stroke-opacity:.25}"
)
Row = dict[str, Any]


def draw(figures: dict[str, Any]) -> str:
    """An SVG that stands alone."""
    parts, y = [_text(10, 20, _head(figures), "big")], 34
    results = figures["results"]
    shapes = list(dict.fromkeys((result["ranks"], result["threads"]) for result in results))
    for group in dict.fromkeys(_group(result) for result in results):
        panels = [result for result in results if _group(result) == group]
        titles = {row["contestant"]: row["title"] for panel in panels for row in panel["rows"]}
        high, top = len(titles) * PITCH, max(_end(row) for panel in panels for row in panel["rows"]) * 1.22
        parts.append(_text(10, y + 20, ", ".join(group), "big"))
        for place, title in enumerate(titles.values()):
            parts.append(_text(LEFT - 8, y + HEAD + place * PITCH + BAR, title, anchor="end"))
        for panel in panels:
            x = LEFT + shapes.index((panel["ranks"], panel["threads"])) * (WIDE + GAP)
            parts.append(_panel(panel, list(titles), x, y, high, top))
        y += HEAD + high + FOOT
    wide = LEFT + len(shapes) * (WIDE + GAP)
    whole = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {y}"'
    return f"<svg {whole}><style>{STYLE}</style>{''.join(parts)}</svg>\n"


def _head(figures: dict[str, Any]) -> str:
    counts = {result["rounds"] for result in figures["results"]}
    rounds = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    days = [result["date"] for result in figures["results"]]
    when = " to ".join(sorted({min(days), max(days)}))
    return f"tokens/s, medians and quartiles of {rounds} rounds ({figures['cpu']}, {when})"


def _group(result: dict[str, Any]) -> tuple[str, str]:
    return result["family"], result["precision"]


def _spread(row: Row) -> tuple[float, float]:
    low, most = row["tokens_per_s_quartiles"]
    return low, most


def _end(row: Row) -> float:
    return float(max(row["tokens_per_s"], *_spread(row)))


def _panel(panel: dict[str, Any], names: list[str], x: int, y: int, high: int, top: float) -> str:
    def across(value: float) -> str:
        return f"{x + WIDE * value / top:.1f}"

    ranks, threads = (f"{panel[key]} {key[: -1 if panel[key] == 1 else None]}" for key in ("ranks", "threads"))
    marks = ticks(0, top, 3)
    lines = "".join(f"M{across(value)} {y + HEAD - 4}v{high + 4}" for value in marks)
    parts = [_text(x, y + HEAD - 10, f"{ranks} x {threads}"), f'<path class="grid" d="{lines}"/>']
    parts += [_text(across(value), y + HEAD + high + 12, f"{value:,.0f}", "small", "middle") for value in marks]
    for row in panel["rows"]:
        at, value = y + HEAD + names.index(row["contestant"]) * PITCH, row["tokens_per_s"]
        kind = "bar" if row["same_work"] else "other"
        kind = "ours" if row["contestant"].startswith("ours") else "limit" if row["contestant"] == "ceiling" else kind
        width = f"{WIDE * value / top:.1f}"
        parts.append(f'<rect class="{kind}" x="{x}" y="{at}" width="{width}" height="{BAR}"/>')
        low, most = _spread(row)
        if low < most:
            ends = "".join(f"M{across(end)} {at + 2}v{BAR - 4}" for end in (low, most))
            parts.append(f'<path d="M{across(low)} {at + BAR / 2}H{across(most)}{ends}"/>')
        said = number(round(value)) + ("" if row["same_work"] else ", other work")
        parts.append(_text(f"{float(across(_end(row))) + 4:.1f}", at + BAR - 1, said, "small"))
    return "".join(parts)


def _text(x: float | str, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{esc(text)}</text>'


if __name__ == "__main__":
    source = Path(sys.argv[1])
    source.with_suffix(".svg").write_text(draw(json.loads(source.read_text())))
