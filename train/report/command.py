"""`colossus report`, and the report that every run leaves behind."""

from __future__ import annotations

from pathlib import Path

from train.checks import DONE, place
from train.commands import Report
from train.folder import deliver, locate, replace
from train.report.page import page
from train.report.record import Run

NAMED = 4  # runs in a file's name


def report(config: Report) -> int:
    """Exit code 0; raises Refused where there is no such run, or the file cannot be written."""
    paths = [locate(name) for name in config.names]
    out = place(config.out, "out") if config.out else _beside(paths)
    deliver(out, page([Run(path) for path in paths]))
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB): open it in any browser")
    return DONE


def _beside(paths: list[Path]) -> Path:
    """Where a report goes if nobody says: of one run into its folder, of several beside the first one's."""
    if len(paths) == 1:
        return paths[0] / "report.html"
    names = [path.name for path in paths[:NAMED]] + [f"{len(paths) - NAMED}-more"] * (len(paths) > NAMED)
    return paths[0].parent / f"report-{'-'.join(names)}.html"


def leave_behind(path: Path) -> str:
    """The report of a run that has just ended, by who ran it: where it is, or why there is none. Raises nothing."""
    try:
        replace(path / "report.html", page([Run(path, held=False)]))
    except Exception as error:  # whatever it is: the run's work is done and on the disk
        return f"warning: no report was written ({type(error).__name__}: {error})"
    return f"report: {path}/report.html"
