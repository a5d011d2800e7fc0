"""`make gpu-check` is ready before a GPU is at hand: the same script, on a CPU, with tiny models and no compiling."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import gpu_check
from train import hardware


def test_the_checks_run_and_find_what_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = gpu_check.Check(tmp_path, "cpu")
    base = [*gpu_check.TINY, "compile=false", "precision=fp32"]
    check.same_bits("1 and 2 ranks", [*base, "devices=1"], [*base, "devices=2"])
    check.same_bits("two seeds", [*base, "devices=1"], [*base, "devices=1", "seed=1"])
    check.same_bits("a run that is refused", [*base, "devices=9"])
    check.speed("speed", *base, "devices=1", "steps=12", "log.every=2")
    same, different, refused, speed = check.found
    assert [finding["holds"] for finding in check.found] == [True, False, False, True]
    assert "devices" in refused["error"]
    assert speed["tokens_per_s"] > 0
    assert speed["memory_bytes"] > 0
    assert same["state_sha256"][0] in different["state_sha256"]
    assert "FAILS  two seeds" in capsys.readouterr().out


@pytest.mark.skipif(hardware.gpus() != (), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
