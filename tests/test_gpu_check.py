"""`make gpu-check` is ready before a GPU is at hand: the same script, on a CPU, with tiny models and no compiling."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.bench import gpu_check, gpu_kernels
from tests.bench.contestants import TITAN_WHEELS
from tests.bench.work import count
from train import compose, hardware
from train.models.build import build


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


def test_deterministic_kernels_are_priced_one_by_one(tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, "cpu")
    check.says(gpu_check.KERNELS, "gpu_kernels", "--cpu")
    assert [finding["check"].split(", ")[1] for finding in check.found] == list(
        gpu_kernels.operations(gpu_kernels.TINY, torch.device("cpu"))
    )
    assert all(finding["holds"] and finding["ms"] > 0 and finding["deterministic_ms"] > 0 for finding in check.found)


def test_kernels_that_take_too_long_are_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "PATIENCE", 0.01)
    check = gpu_check.Check(tmp_path, "cpu")
    check.says(gpu_check.KERNELS, "gpu_kernels", "--cpu")
    assert [(finding["holds"], finding["error"]) for finding in check.found] == [(False, "not done after 0.01 s")]


def test_a_kernel_that_repeats_no_bits_or_does_not_exist_is_a_finding() -> None:
    drawn = gpu_kernels.priced("drawn", lambda: [torch.rand(3)], 0.001)
    assert (drawn["holds"], drawn["repeats_anyway"]) == (False, False)

    def step() -> list[torch.Tensor]:
        assert not torch.are_deterministic_algorithms_enabled() or gone()
        return [torch.ones(1)]

    def gone() -> bool:
        raise RuntimeError("no deterministic implementation\nand more")

    missing = gpu_kernels.priced("gone", step, 0.001)
    expected = {"check": "deterministic kernels, gone", "holds": False, "error": "no deterministic implementation"}
    assert missing == expected
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_has_no_time_left_is_named_and_not_run(tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, "cpu", limit=0)
    gpu_check.run_all(check, gpu_check.TINY, gpu_check.speeds(), None)
    assert check.found == []
    late = {"llama_1b, compile=true, exact", "deterministic kernels, one by one", "tiny, torchtitan"}
    assert {f"{what}: no time left" for what in late} <= set(check.left_out)
    assert any("nanoGPT" in left for left in check.left_out)


@pytest.mark.skipif(not find_spec("torchtitan"), reason=TITAN_WHEELS)
def test_torchtitan_is_timed_at_the_shape_that_it_is_told(tmp_path: Path) -> None:
    check = gpu_check.Check(tmp_path, "cpu")
    check.torchtitan("well", *gpu_check.TINY, "precision=fp32")
    check.torchtitan("ill", *gpu_check.TINY, "precision=fp32", "model.heads=3")
    well, ill = check.found
    config = compose.config("train", ["data=synthetic", *gpu_check.TINY])
    ours = build(config.model, config.data.tokenizer.vocab, seed=0, device=torch.device("meta"))
    assert well["parameters"] == count(ours)
    assert well["tokens_per_s"] > 0
    assert not ill["holds"]


def test_without_torchtitan_it_is_left_out_and_how_to_get_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchtitan.py").write_text("raise ImportError('too old a torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    check = gpu_check.Check(tmp_path, "cpu")
    check.torchtitan("beside torchtitan", *gpu_check.TINY)
    assert check.found == []
    assert check.left_out == [f"beside torchtitan: too old a torch: {TITAN_WHEELS}"]


def test_all_that_a_gpu_is_asked_composes() -> None:
    for row in gpu_check.speeds():
        config = compose.config("train", ["data=synthetic", *row.overrides])
        assert config.batch.sequences % (config.batch.virtual_ranks * int(config.batch.micro_batch)) == 0, row.what
    ours = compose.config("train", ["data=synthetic", *gpu_check.SHAPES["gpt2_124m"]])
    theirs = gpu_check.TRAIN_PY["batch_size"] * gpu_check.TRAIN_PY["gradient_accumulation_steps"] * 1024
    assert ours.tokens_per_step == theirs


TRAIN_PY = """
import sys
print(sys.argv[1:])
for number in range(30):
    print(f"iter {number}: loss 5.0000, time {100 if number < 10 else 20}.00ms, mfu -100.00%")
sys.exit("--batch_size=3" in sys.argv)
"""


def test_the_peer_is_timed_by_its_own_words_after_it_has_warmed_up(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN_PY)
    check = gpu_check.Check(tmp_path, "cpu")
    check.nanogpt("well", tmp_path, 100, batch_size=2, gradient_accumulation_steps=4, block_size=10)
    check.nanogpt("ill", tmp_path, 100, batch_size=3, gradient_accumulation_steps=4, block_size=10)
    well, ill = check.found
    assert well["tokens_per_s"] == pytest.approx(2 * 4 * 10 / 0.020)
    assert not ill["holds"]
    assert "exit code 1" in ill["error"]


def test_a_peer_that_never_ends_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(gpu_check, "PATIENCE", 0.5)
    check = gpu_check.Check(tmp_path, "cpu")
    check.nanogpt("late", tmp_path, 100, batch_size=2, gradient_accumulation_steps=4)
    assert check.found == [{"check": "late", "holds": False, "error": "not done after 0.5 s"}]


def test_what_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--nanogpt", str(tmp_path)])
    assert ended.value.code == 2
    assert "holds no train.py" in capsys.readouterr().err


@pytest.mark.skipif(hardware.gpus() != (), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
