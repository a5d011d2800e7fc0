"""What is measured of a device before a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from train import telemetry


@pytest.mark.parametrize(("seconds", "products"), [(0.002, 8), (0.02, 5), (0.2, 1)])
def test_a_slow_device_is_not_measured_for_long(seconds: float, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 on a CPU that has no instructions for it takes 0.2 s a product, which every rank would wait for."""
    now, done = [0.0], list[float]()

    def multiply(*_: torch.Tensor) -> None:
        now[0] += seconds
        done.append(seconds)

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    rate = telemetry.matmul_peak(torch.device("cpu"), torch.float32)
    assert rate == pytest.approx(2 * 512**3 / seconds)
    assert len(done) == products
