"""What the console says of a run before its first step."""

from __future__ import annotations

from typing import Any

import pytest

from train import hardware
from train.console import Console

START: dict[str, Any] = {
    "kind": "start",
    **{"step": 0, "steps": 10, "world": 2, "virtual_ranks": 8, "micro_batch": 2, "micro_batches": 1},
    **{"device": "cpu AVX2", "peak_flops": 2.4e9, "peak_source": "measured matmul", "precision": "bf16"},
    **{"compiled": False, "parameters": 2_560_000, "flops_per_token": 1.5e7, "memory_bytes": 2**27},
    "tokens_per_step": 4096,
}


def said(capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    Console().event(START | changes)
    return capsys.readouterr().out


def test_bf16_on_a_cpu_without_it_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "processor", lambda: ("Some CPU", ()))
    assert "fp32 may be ten times as fast" in said(capsys)
    assert "fp32 may" not in said(capsys, precision="fp32")
    assert "fp32 may" not in said(capsys, device="NVIDIA H100")
    monkeypatch.setattr(hardware, "processor", lambda: ("Some CPU", ("avx512_bf16",)))
    assert "fp32 may" not in said(capsys)


def test_a_small_peak_is_no_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert "2.40 GFLOP/s peak" in said(capsys)
    assert "0.42 TFLOP/s peak" in said(capsys, peak_flops=4.2e11)
    assert "peak n/a" in said(capsys, peak_flops=None)
