"""An installed wheel works from any folder: the configs travel with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parent.parent


def test_an_installed_wheel_works_from_any_folder(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert "train/configs/model/llama_nano.yaml" in names
    assert {"train/configs/cluster/colossus_200k.yaml", "train/scale/tables/calibration.csv"} <= set(names)
    assert not any(name.startswith(("tests/", "configs/")) for name in names)
    assert "colossus = train.cli:main" in next(site.glob("*.dist-info/entry_points.txt")).read_text()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # -P and the path put the unpacked wheel, not this checkout, in front
    command = [sys.executable, "-P", "-c", "import sys, train.cli; sys.exit(train.cli.main(sys.argv[1:]))"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    arguments = ["plan", "model=llama_8b", "format=json"]
    result = subprocess.run([*command, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["parameters"] > 6.9e9
    bench = subprocess.run([*command, "bench"], cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert bench.returncode == 2
    assert bench.stderr.startswith("colossus: bench: ")
    assert "in a checkout" in bench.stderr
    code = "import train.config; print(train.config.CONFIGS)"
    shown = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert shown.stdout.strip() == str(site / "train" / "configs")
