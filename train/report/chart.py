"""Line charts as SVG, drawn here: no script, no font, nothing to load.

A plot is stretched to whatever room there is while lines keep their width; labels stand beside it as HTML, so they keep
their size on a phone and in print. Of a long run each column of the plot has its first, least, greatest and last value:
a curve of 100,000 points costs 50 kB, and no extreme is lost. Values show where the pointer rests (<title>).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from train.report.words import esc, number

WIDE, HIGH = 1000, 250  # of a plot, in its own units
STOPS = 80  # places in a plot that say their values
STEEP = 200  # greatest over least value from where on the scale is logarithmic

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A curve: x ascending; None, or what is not finite, is a gap."""

    name: str
    x: Sequence[float]
    y: Values
    color: int = 0  # of the page's palette
    faint: bool = False  # behind the others, and not in the legend
    dots: bool = False  # mark each point
    dashed: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """1-2-5 ticks of a logarithmic scale; powers of ten alone where those are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    parts = (1,) if len(powers) > 4 else (1, 3) if len(powers) > 2 else (1, 2, 5)
    return [m * 10.0**p for p in powers for m in parts if low <= m * 10.0**p <= high]


def envelope(x: Sequence[float], y: Values, columns: int) -> list[tuple[float, float] | None]:
    """The points that a plot of so many columns shows, in order; None: a gap. Few points stay as they are."""
    if len(x) <= 2 * columns:
        return [(a, b) if b is not None and math.isfinite(b) else None for a, b in zip(x, y, strict=True)]
    points: list[tuple[float, float] | None] = []
    width = (x[-1] - x[0]) / columns
    begin = 0
    while begin < len(x):
        end = max(begin + 1, bisect_left(x, x[0] + width * (math.floor((x[begin] - x[0]) / width) + 1)))
        there = [i for i in range(begin, end) if (v := y[i]) is not None and math.isfinite(v)]
        if there:
            least, most = min(there, key=lambda i: y[i] or 0.0), max(there, key=lambda i: y[i] or 0.0)
            points += [(x[i], float(y[i] or 0.0)) for i in sorted({there[0], least, most, there[-1]})]
        else:
            points.append(None)
        begin = end
    return points


def smooth(y: Values, window: int) -> list[float | None]:
    """The mean of `window` values around each one; gaps are left out of it."""
    sums, counts = [0.0], [0]
    for value in y:
        known = value is not None and math.isfinite(value)
        sums.append(sums[-1] + (value or 0.0 if known else 0.0))
        counts.append(counts[-1] + known)
    ends = [(max(0, i - window // 2), min(len(y), i + window // 2 + 1)) for i in range(len(y))]
    return [(sums[b] - sums[a]) / (counts[b] - counts[a]) if counts[b] > counts[a] else None for a, b in ends]


def chart(title: str, unit: str, series: Sequence[Series], *, zero: bool = False, note: str = "") -> str:
    """A figure; empty where no series has a point. `zero`: the scale begins there."""
    known = [v for s in series for v in s.y if v is not None and math.isfinite(v)]
    if not known:
        return ""
    low, high = min(known), max(known)
    log = not zero and low > 0 and high / low > STEEP
    if log:
        low, high = low / 1.1, high * 1.1
    else:
        low = min(0.0, low) if zero else low
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = (low if zero else low - room), high + room
    left, right = min(s.x[0] for s in series if s.x), max(s.x[-1] for s in series if s.x)
    right = right if right > left else left + 1

    def across(value: float) -> float:
        return WIDE * (value - left) / (right - left)

    def down(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return HIGH * (1 - share)

    marks = decades(low, high) if log else ticks(low, high)
    grid = f'<path class="grid" d="{"".join(f"M0 {down(v):.1f}H{WIDE}" for v in marks)}"/>'
    lines = [_line(s, across, down) for s in sorted(series, key=lambda s: not s.faint)]
    labels = [ylabel(down(v) / HIGH, _tick(v)) for v in marks]
    labels += [xlabel(i, across(v) / WIDE, _tick(v)) for i, v in enumerate(ticks(left, right, 6))]
    shown = [s for s in series if not s.faint]
    head = f'<b>{esc(title)}</b> <span class="unit">{esc(unit)}{" (log scale)" if log else ""}</span>'
    if len(shown) > 1:
        names = "".join(f'<span class="k c{s.color % 6}">{esc(s.name)}</span>' for s in shown)
        head += f'<span class="key">{names}</span>'
    else:
        head += f'<span class="now">{number(next((v for v in reversed(series[0].y) if v is not None), None))}</span>'
    return figure(title, head, labels, [grid, *lines, *_stops(series, left, right, unit)], HIGH, note=note)


def ylabel(share: float, text: str) -> str:
    return f'<span class="y" style="top:{100 * share:.2f}%">{text}</span>'


def xlabel(i: int, share: float, text: str) -> str:
    return f'<span class="x{" odd" * (i % 2)}" style="left:{100 * share:.2f}%">{text}</span>'


def figure(title: str, head: str, labels: list[str], drawn: list[str], high: int, **more: str) -> str:
    """A plot of WIDE by `high` units, with its labels beside it. `more`: note, kind (a class), size (a style)."""
    kind, size, note = (more.get(name, "") for name in ("kind", "size", "note"))
    after = f'<p class="note">{esc(note)}</p>' if note else ""
    return (
        f'<figure class="chart {kind}"><figcaption>{head}</figcaption>'
        f'<div class="plot" style="{size}">{"".join(labels)}'
        f'<svg viewBox="0 0 {WIDE} {high}" preserveAspectRatio="none" role="img" aria-label="{esc(title)}">'
        f"{''.join(drawn)}</svg></div>{after}</figure>"
    )


def parted(label: str, parts: Iterable[tuple[str, float, str]]) -> str:
    """A bar of shares of 1, each (attributes of its rectangle, share, title in HTML)."""
    x, drawn = 0.0, ""
    for attributes, share, title in parts:
        place = f'x="{WIDE * x:.1f}" width="{WIDE * share:.1f}" height="40"'
        drawn += f"<rect {attributes} {place}><title>{title}</title></rect>" if share > 0 else ""
        x += share
    box = f'viewBox="0 0 {WIDE} 40" preserveAspectRatio="none" role="img" aria-label="{label}"'
    return f'<svg class="bar" {box}>{drawn}</svg>'


def _line(s: Series, across: Callable[[float], float], down: Callable[[float], float]) -> str:
    kind = f"line c{s.color % 6}" + " faint" * s.faint + " dashed" * s.dashed
    points = [p and (across(p[0]), down(p[1])) for p in envelope(s.x, s.y, WIDE)]
    path, pen = [], "M"
    for p in points:
        if p is not None:
            path.append(f"{pen}{p[0]:.1f} {p[1]:.1f}")
        pen = "M" if p is None else "L"
    dots = "".join(f"M{p[0]:.1f} {p[1]:.1f}h0" for p in points if p) if s.dots or len(points) == 1 else ""
    return f'<path class="{kind}" d="{"".join(path)}"/>' + (f'<path class="dots {kind}" d="{dots}"/>' if dots else "")


def _stops(series: Sequence[Series], left: float, right: float, unit: str) -> Iterator[str]:
    """Invisible columns over a plot, each with the values under it."""
    told = [s for s in series if not s.faint] if len(series) > 2 else list(series)
    count = min(STOPS, max(len(s.x) for s in series))
    for i in range(count):
        begin, end = (left + (right - left) * j / count for j in (i, i + 1))
        words = []
        for s in told:
            first, last = bisect_left(s.x, begin), (bisect_right if i == count - 1 else bisect_left)(s.x, end)
            there = [v for v in s.y[first:last] if v is not None and math.isfinite(v)]
            if there:
                low, high = number(min(there)), number(max(there))
                words.append(f"{s.name}: {low if low == high else f'{low} … {high}'} {unit}")
        if words:
            text = f"{number(math.ceil(begin))} – {number(math.floor(end))}\n" + "\n".join(words)
            place = f'x="{WIDE * i / count:.1f}" width="{WIDE / count:.1f}" height="{HIGH}"'
            yield f"<rect {place}><title>{esc(text)}</title></rect>"


def _tick(value: float) -> str:
    if abs(value) >= 10_000:
        power = 2 if abs(value) >= 1e6 else 1
        return f"{value / 1000**power:g} {'kM'[power - 1]}"
    return f"{value:.6g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.0e}".replace("e-0", "e-")
