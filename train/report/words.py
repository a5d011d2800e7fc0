"""Numbers as people read them, and text as HTML holds it."""

from __future__ import annotations

import html
import math
from typing import Any

NONE = "–"


def esc(value: Any) -> str:
    """Text for HTML, whoever wrote it; an attribute's value too."""
    return html.escape(str(value))


def plain(text: str) -> str:
    """Without what no screen shows: a young model writes any byte."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)


def number(value: Any, digits: int = 4) -> str:
    """So many significant digits, thousands apart: 0.04123, 12.34, 1,234,567."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    if value == 0 or isinstance(value, int):
        return f"{value:,}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}" if places < 8 else f"{value:.{digits - 1}e}"


def si(value: float | None, unit: str = "") -> str:
    """Three digits and a prefix: 12.3 k, 4.56 M."""
    if value is None:
        return NONE
    power = min(5, max(0, math.floor(math.log10(abs(value)) / 3))) if value else 0
    return f"{number(value / 1000**power, 3)} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}".rstrip()


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def lasting(seconds: float | None) -> str:
    """A duration in its two largest units."""
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{number(float(seconds), 3)} s"
    minutes, hours = round(seconds / 60), seconds / 3600
    if minutes < 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours / 24:.1f} d"


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """Cells are HTML already. Columns whose head ends in a bar are numbers: set to the right."""
    right = [name.endswith("|") for name in head]
    classes = [' class="n"' if r else "" for r in right]
    top = "".join(f"<th{c}>{esc(name.rstrip('|'))}</th>" for name, c in zip(head, classes, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, classes, strict=True)) + "</tr>" for row in rows
    )
    top = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'
