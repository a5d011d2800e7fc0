"""Energy and money: what a meter says, else what a table says, and which of them it was."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from train.economy import Meter, economy


def test_a_meter_of_packages_counts_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a package (":0:0") are in it already; a counter that begins anew is no power."""
    now = itertools.count(0.0, 2.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))

    def count(**microjoules: int) -> None:
        for name, value in microjoules.items():
            folder = tmp_path / name.replace("_", ":").replace("x", "-")
            folder.mkdir(exist_ok=True)
            (folder / "energy_uj").write_text(f"{value}\n")

    count(intelxrapl_0=1_000_000, intelxrapl_1=2_000_000, intelxrapl_0_0=500_000)
    meter = Meter(None, tmp_path)
    count(intelxrapl_0=101_000_000, intelxrapl_1=22_000_000, intelxrapl_0_0=99_000_000)
    assert meter.watts() == pytest.approx(60.0)  # 120 J in 2 s
    count(intelxrapl_0=1_000_000)
    assert meter.watts() is None
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.watts() is None
    assert Meter(None, tmp_path / "nowhere").watts() is None


def records(device: str, watts: float | None, world: int = 2) -> list[dict[str, Any]]:
    about = {"device": device, "threads_per_rank": 3 if device.startswith("cpu") else 0}
    pace = {"kind": "throughput", "tokens_per_s": 1000.0, "watts": watts}
    return [{"kind": "start", "fingerprint": about}, {"kind": "step", "world": world}, pace]


def value(device: str, watts: float | None, key: str) -> tuple[Any, str]:
    figure = economy(records(device, watts))[key]
    assert figure is not None
    assert figure["source"]
    return pytest.approx(figure["value"]), figure["tag"]


H100, RTX = "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090"


def test_a_figure_says_what_it_is() -> None:
    assert value("cpu AVX2", None, "watts") == (2 * 3 * 5.0, "assumed")
    assert value("cpu AVX2", None, "joules_per_token") == (0.03, "assumed")
    assert value("cpu AVX2", 80.0, "watts") == (80.0, "measured")  # of the machine
    assert value(H100, None, "watts") == (1400.0, "datasheet")
    assert value(H100, 500.0, "joules_per_token") == (1.0, "measured")  # 500 W each
    assert value(H100, 500.0, "usd_per_million_tokens") == (3.933 * 2 / 3600 / 1000 * 1e6, "published")


def test_what_is_not_known_is_not_guessed() -> None:
    assert economy(records("Some GPU", None)) == dict.fromkeys(economy([]), None)
    assert economy(records(RTX, None))["usd_per_million_tokens"] is None
    mixed = [*records("cpu AVX2", 80.0), records("cpu AVX2", None)[-1]]  # one window without a meter: all estimated
    figure = economy(mixed)["watts"]
    assert figure is not None
    assert figure["tag"] == "assumed"
