"""`colossus verify`: every byte of a run's checkpoints, read and compared."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from rich.console import Console as Rich
from rich.table import Column, Table

from train import manifest
from train.checks import DONE, FAILED, Refused
from train.commands import Format, Verify
from train.console import Console
from train.folder import locate


def verify(config: Verify) -> int:
    """Exit code 0 where all are whole, 1 where one is damaged, which is named."""
    root = locate(config.run) / "checkpoints"
    paths = manifest.candidates(root)
    if config.step >= 0:
        paths = [path for path in paths if path.name == manifest.folder_name(config.step)]
    if not paths:
        which = "checkpoint" if config.step < 0 else f"checkpoint of step {config.step}"
        raise Refused(str(root), f"holds no {which}")
    total = sum(size for path in paths for name, size in _sizes(path).items() if name.endswith(".safetensors"))
    console, done = Console(), 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if config.format is Format.table:
            console.progress("verifying", done, total)

    found: list[dict[str, Any]] = []
    for path in reversed(paths):
        sizes, why = _sizes(path), ""
        try:
            manifest.verify(path, progress)
        except manifest.Damaged as damage:
            if not path.exists():
                continue  # a run under way has removed it, as it should
            why = str(damage)
        step = manifest.step_of(path.name)
        found.append({"step": step, "files": len(sizes), "bytes": sum(sizes.values()), "whole": not why, "why": why})
    console.close()
    config.format.tell(found, _show)
    for row in found:
        if row["why"]:
            console.error(row["why"])
    return DONE if all(row["whole"] for row in found) else FAILED


def _sizes(path: Path) -> dict[str, int]:
    """Of a checkpoint's files; none where a run under way removes it just now, or it is no folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    return {}


def _show(found: list[dict[str, Any]]) -> None:
    table = Table(*(Column(name, justify="right") for name in ("step", "files", "bytes")), "state", box=None)
    for row in found:
        state = "whole" if row["whole"] else "damaged"
        table.add_row(str(row["step"]), str(row["files"]), f"{row['bytes']:,}", state)
    Rich(soft_wrap=True, highlight=False).print(table)
