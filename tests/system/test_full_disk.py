"""A disk that is really full: a small tmpfs."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import Running
from tests.test_train import sha256, summary
from train import events, manifest

pytestmark = pytest.mark.system


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """3 MB."""
    if os.geteuid() != 0:
        pytest.skip("skipped, because mounting needs root")
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"skipped, because no tmpfs can be mounted here ({mounted.stderr.strip()})")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_ends_no_run(disk: Path, tiny: list[str]) -> None:
    """Full but for 200 kB, which the record of the run takes, from a save on and until two have failed."""
    more = ("name=a", "devices=2", "steps=150", "checkpoint.every=5", "eval.every=0")
    running = Running([argument for argument in tiny if not argument.startswith("runs=")], f"runs={disk}", *more)
    running.wait_for(lambda found: any(record["kind"] == "checkpoint" for record in found))
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - 200_000)
    running.wait_for(lambda found: sum(record["kind"] == "warning" for record in found) >= 2)
    ballast.unlink()
    code, _, err = running.end()
    assert code == 0, err
    warnings = [record for record in events.read(running.folder / "events.jsonl") if record["kind"] == "warning"]
    assert "No space left on device" in warnings[0]["text"]
    found, refused = manifest.newest(running.folder / "checkpoints")
    assert found is not None
    assert (found.step, refused) == (150, [])
    assert summary(running.folder)["state_sha256"] == sha256(tiny, *more, "name=b", "devices=1")
