"""The page: one HTML file that needs nothing else, of one run or of several side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from train.report import sections, timeline
from train.report.colossus import projected
from train.report.record import Run
from train.report.settings import differing
from train.report.words import NONE, esc, lasting, number, percent, si, table

STYLE = Path(__file__).with_name("style.css")
Of = TypeVar("Of")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def beside(runs: list[Run]) -> str:
    """A line a run; equal states are said to be."""
    digests = [run.summary["state_sha256"] for run in runs]
    rows = []
    for i, run in enumerate(runs):
        found, digest = run.summary, digests[i]
        twins = [other.name for other, d in zip(runs, digests, strict=True) if d == digest and other is not run]
        bits = f"<code>{esc(digest[:12])}</code>" if digest else NONE
        bits += f' <span class="chip same">same bits as {esc(", ".join(twins))}</span>' if digest and twins else ""
        faults = len(run.of("injected") or run.of("fault"))
        scores = (number(found[key]) for key in ("final_loss", "val_bpb"))
        numbers = [f"{found['steps']:,}", *scores, si(found["tokens_per_s"])]
        numbers += [percent(found["mfu"]), percent(found["goodput"]["share"]), lasting(found["goodput"]["wall_s"])]
        worlds = ", ".join(map(str, dict.fromkeys(found["world_sizes"])))
        name = f'<i class="sw b{i % 6}"></i><b>{esc(run.name)}</b>'
        rows.append([name, sections.chip(run.state()), *numbers, worlds, str(faults) if faults else NONE, bits])
    head = ["run", "state", "steps|", "loss|", "bits/byte|", "tokens/s|", "MFU|", "goodput|", "wall time|", "ranks|"]
    said = ""
    if len(digests) == len({*digests}) + len(digests) - 1 and digests[0]:
        said = f'<p class="bits"><b>All {len(runs)} runs ended in the same bits.</b> <code>{esc(digests[0])}</code></p>'
    return table([*head, "faults|", "bits"], rows) + said


def differences(runs: list[Run]) -> str:
    found = differing([run.config for run in runs])
    rows = []
    for key, values in found.items():
        cells = [sections.shown(value) for value in values]
        rows.append([f"<code>{esc(key)}</code>", *(c if c == cells[0] else f"<mark>{c}</mark>" for c in cells)])
    if not rows:
        return "<p>No setting differs.</p>"
    equal = len(set().union(*(run.config for run in runs))) - len(found)
    note = f"<p class=note>Marked: other than the first run's. {equal} settings are equal in all.</p>"
    return table(["setting", *(run.name for run in runs)], rows) + note


def ledgers(runs: list[Run]) -> str:
    return "".join(
        f'<div class="row"><span>{esc(run.name)}</span>{sections.stacked(found)}'
        f"<span>{percent(found['share'])}</span></div>"
        for run in runs
        if (found := run.summary["goodput"])["wall_s"]
    )


ONE: dict[str, Callable[[Run], str]] = {
    "": sections.headline,
    "Learning": lambda run: sections.curves([run]),
    "Who was there": lambda run: timeline.draw(run.records),
    "What befell it": sections.faults,
    "Where the time went": sections.goodput,
    "Energy and money": sections.spent,
    "Experts": sections.experts,
    "In its own words": sections.samples,
    "This run on Colossus": projected,
    "Settings": sections.configuration,
    "Environment": sections.environment,
}
SEVERAL: dict[str, Callable[[list[Run]], str]] = {
    "": beside,
    "Learning": sections.curves,
    "What differs": differences,
    "Where the time went": ledgers,
    "Who was there": lambda runs: "".join(f"<h3>{esc(run.name)}</h3>{timeline.draw(run.records)}" for run in runs),
}


def page(runs: list[Run], refresh: int = 0) -> str:
    """HTML; `refresh`: seconds after which a browser asks for it again, 0: never."""
    if len(runs) == 1:
        parts = {title: _guarded(title, section, runs[0]) for title, section in ONE.items()}
    else:
        parts = {title: _guarded(title, section, runs) for title, section in SEVERAL.items()}
    return sheet(" · ".join(run.name for run in runs), parts, refresh)


def sheet(name: str, parts: dict[str, str], refresh: int = 0) -> str:
    """A page of sections by their titles, whose content is HTML."""
    shown = {f"<h2>{title}</h2>" * bool(title): content for title, content in parts.items() if content}
    body = "".join(f"<section>{head}{content}</section>" for head, content in shown.items())
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">{again}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f'<link rel="icon" href="data:,"><title>{esc(name)}</title><style>{STYLE.read_text()}</style></head>'
        f'<body><header><p class="kicker">Pocket Colossus</p><h1>{esc(name)}</h1></header>'
        f"<main>{body}</main></body></html>\n"
    )


def _guarded(title: str, section: Callable[[Of], str], of: Of) -> str:
    """A section, or the line that it cannot be made: what a broken run still says is shown."""
    try:
        return section(of)
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        why = esc(f"{title or 'The headline'} cannot be made of this record ({type(error).__name__}: {error}).")
        return f'<p class="trouble">{why}</p>'
