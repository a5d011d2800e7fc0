"""Who was there, when, and what befell them: a lane a place, marks where something happened, from the events alone.

A process has a number as a member that is never given twice until all start again; a place is what it takes among the
others. Whoever joins after a loss takes the first place that is free. Time in which nobody was there, between a stop
and the command given again, is cut out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from train.report.chart import WIDE, figure, ticks, xlabel, ylabel
from train.report.record import Record
from train.report.words import esc, lasting

LANE = 10  # a lane's height, in the plot's units
CUT = 1.0  # seconds that a pause is shown as

SIGNS = {  # kind -> what its sign means, and what it says
    "fault": ("lost or failed", "{fault} in {phase}, process {rank}: {cause}"),
    "injected": ("fault on order", "{id}"),
    "regroup": ("regroup", "{why}: {world} ranks go on after {seconds:.2f} s"),
    "start": ("start", "{world} ranks"),
    "rollback": ("gone back", "batches left out: {left_out}"),
    "audit": ("audit disagrees", "virtual rank {virtual_rank}, ranks {suspects}"),
    "slow": ("slow rank", "rank {rank}: {times:.1f} times the median rank's time"),
    "checkpoint": ("saved", "{bytes:,} bytes, the step waited {seconds:.3f} s"),
    "eval": ("evaluated", "loss {loss}"),
    "asked": ("asked to stop", "{by}"),
    "warning": ("warning", "{text}"),
}
BELOW = ("checkpoint", "eval", "asked", "warning", "rollback")  # these stand below the lanes


@dataclass(slots=True)
class Span:
    """A process at a place: from when it was a member until when it was none any more."""

    member: int
    lane: int
    begin: float
    end: float | None = None
    waiting: bool = False  # ready, and no member yet


@dataclass(slots=True)
class Lanes:
    spans: list[Span] = field(default_factory=list)
    marks: list[tuple[str, int, float, str]] = field(default_factory=list)  # kind, lane or -1: of all, time, text
    cuts: list[tuple[float, float]] = field(default_factory=list)  # pauses: begin, end
    count: int = 0

    def _there(self) -> dict[int, Span]:
        return {span.member: span for span in self.spans if span.end is None}

    def _open(self, member: int, time: float, waiting: bool = False) -> None:
        taken = {span.lane for span in self._there().values()}
        lane = next(i for i in range(len(taken) + 1) if i not in taken)
        self.spans.append(Span(member, lane, time, waiting=waiting))
        self.count = max(self.count, lane + 1)

    def _seat(self, members: list[int], time: float) -> None:
        """These are the members from now on."""
        there = self._there()
        for member, span in there.items():
            if span.waiting == (member in members):  # it is admitted, or it has left
                span.end = time
        for member in members:
            if member not in self._there():
                self._open(member, time)

    def take(self, record: Record, before: float) -> None:
        """`before`: the time of the event before."""
        kind, time = record["kind"], record["time"]
        there: dict[Any, Span] = {**self._there()}
        span = there.get(record.get("member", record.get("rank")))
        if kind == "launch":
            for old in there.values():
                old.end = before
            if not record["again"] and time - before > CUT and self.spans:
                self.cuts.append((before, time - CUT))
        elif kind in ("start", "regroup"):
            self._seat(record.get("members", list(range(record["world"]))), time)
        elif kind == "ready" and span is None:
            self._open(record["rank"], time, waiting=True)
        elif kind in ("fault", "left") and span:
            span.end = time
        if kind in SIGNS:
            at = f"step {record['step']}, " if record.get("step") is not None else ""
            lane = span.lane if span and kind in ("fault", "injected", "slow") else -1
            self.marks.append((kind, lane, time, f"{SIGNS[kind][0]}: {at}{SIGNS[kind][1].format_map(record)}"))

    def squeeze(self, time: float) -> float:
        """A time with the pauses before it taken out."""
        return time - sum(min(time, end) - begin for begin, end in self.cuts if time > begin)


def lanes(records: list[Record]) -> Lanes:
    found, before = Lanes(), records[0]["time"] if records else 0.0
    for record in records:
        if record["kind"] not in ("step", "throughput"):
            found.take(record, before)
        before = record["time"]
    return found


def draw(records: list[Record]) -> str:
    """A figure; empty where no ranks were ever up."""
    found = lanes(records)
    if not found.count:
        return ""
    zero, last = found.squeeze(records[0]["time"]), records[-1]["time"]
    whole, high = max(found.squeeze(last) - zero, 1e-3), LANE * (found.count + 1)

    def across(time: float) -> float:
        return WIDE * (found.squeeze(time) - zero) / whole

    drawn = []
    for span in found.spans:
        begin, end = across(span.begin), across(last if span.end is None else span.end)
        drawn.append(
            f'<rect class="{"waits" if span.waiting else "there"}" x="{begin:.1f}" y="{LANE * span.lane + 2}" '
            f'width="{max(end - begin, 0.5):.1f}" height="{LANE - 4}"><title>process {span.member}</title></rect>'
        )
    for begin, end in found.cuts:
        title = f"nobody was there for {lasting(end - begin)}"
        drawn.append(f'<path class="cut" d="M{across(end):.1f} 0V{high}"><title>{title}</title></path>')
    signs: dict[tuple[str, int, int], list[str]] = {}  # what lies within half a unit of the plot is one sign
    for kind, lane, time, text in found.marks:
        signs.setdefault((kind, lane, round(across(time) * 2)), []).append(text)
    drawn += [_sign(*place, texts, found.count) for place, texts in signs.items()]
    unit, scale = ("h", 3600) if whole > 7200 else ("min", 60) if whole > 180 else ("s", 1)
    labels = [ylabel((i + 0.5) * LANE / high, f"rank {i}") for i in range(found.count)]
    for i, value in enumerate(ticks(0, whole / scale, 8)):
        labels.append(xlabel(i, value * scale / whole, f"{value:g}" + f" {unit}" * (i == 0)))
    kinds = {mark[0] for mark in found.marks}
    key = "".join(f'<span class="k m-{kind}">{SIGNS[kind][0]}</span>' for kind in SIGNS if kind in kinds)
    size = f"height:{1.6 * (found.count + 1):.1f}rem"
    return figure("timeline by rank", f'<span class="key">{key}</span>', labels, drawn, high, kind="lanes", size=size)


def _sign(kind: str, lane: int, column: int, texts: list[str], lanes: int) -> str:
    """A stroke for what concerns all ranks, a dot for what befell one, and below the lanes what changed none."""
    shape, path = "dot", f"M{column / 2:g} {LANE * ((lanes if lane < 0 else lane) + 0.5):g}h0"
    if lane < 0 and kind not in BELOW:
        shape, path = "stroke", f"M{column / 2:g} 0V{LANE * lanes}"
    title = esc("\n".join([*texts[:4], *([f"… and {len(texts) - 4} more"] if len(texts) > 4 else [])]))
    return f'<path class="{shape} m-{kind}" d="{path}"><title>{title}</title></path>'
