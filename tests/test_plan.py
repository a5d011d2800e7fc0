"""What `auto` means, and what a run would need, without training it."""

from __future__ import annotations

import pytest

from train import compose, flops, hardware, plan
from train.checks import Refused
from train.config import Train

GPU = hardware.Gpu("NVIDIA H100 80GB HBM3", 80 * 2**30)


def resolved(*overrides: str) -> Train:
    return plan.resolve(compose.config("train", ["data=synthetic", *overrides]))


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: (GPU, GPU))


def test_auto_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: ())
    for cores, ranks in ((1, 1), (4, 4), (64, 8)):
        monkeypatch.setattr(hardware, "cores", lambda cores=cores: cores)
        config = resolved()
        assert (config.accelerator, config.backend, config.devices, config.compile) == ("cpu", "gloo", ranks, False)
    with pytest.raises(Refused, match="compile: graphs are CUDA's: use true"):
        resolved("compile=graphs")
    assert resolved("batch.virtual_ranks=4").devices == 4
    assert resolved("nodes=4").devices == 2, "8 virtual ranks on 4 nodes"


@pytest.mark.usefixtures("two_gpus")
def test_auto_on_gpus() -> None:
    config = resolved()
    assert (config.accelerator, config.backend, config.devices) == ("cuda", "nccl", 2)
    assert (config.precision, config.compile) == ("bf16", True)
    assert resolved("compile=graphs").compile == "graphs"
    assert resolved("devices=4", "backend=gloo").devices == 4
    with pytest.raises(Refused, match="backend=gloo"):
        resolved("devices=4")


def test_the_micro_batch_does_not_depend_on_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else 1 rank and 4 would cut different micro-batches, and differ in the last bits. Memory is tight on purpose."""
    monkeypatch.setattr(hardware, "cores", lambda: 8)
    monkeypatch.setattr(hardware, "gpus", lambda: ())
    monkeypatch.setattr(hardware, "memory", lambda: 8 * 2**30)
    sizes = {resolved("model=llama_mini", f"devices={d}").batch.micro_batch for d in (1, 2, 5, 8)}
    assert len(sizes) == 1
    assert sizes < {1, 2, 4, 8}


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: ())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for overrides in (["accelerator=cuda"], ["backend=nccl"], ["nodes=9"], ["logger=[wandb]"]):
        with pytest.raises(Refused, match=overrides[0].split("=")[0]):
            resolved(*overrides)


def test_sharding_takes_its_part_off_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numbers written out for 8 ranks, V = 32: 4 leaves a rank, so a leaf and log2(4) sums."""
    monkeypatch.setattr(hardware, "gpus", lambda: ())
    needs = {}
    for more in ("sharding=none", "sharding=optimizer", "sharding=full", "reduce.dtype=bf16", "reduce=fast"):
        shape = ("model=llama_1b", "devices=8", "batch.virtual_ranks=32", "batch.sequences=32", "precision=fp32")
        config = resolved(*shape, more)
        needs[more] = plan.memory(config, 32_000)
    n = flops.parameters(config.model, 32_000)
    sizes = flops.sizes(config.model, 32_000)
    assert needs["sharding=none"].gradients == 3 * 4 * n
    assert needs["sharding=none"].weights == 4 * n
    assert {need.snapshot for need in needs.values()} == {12 * n // 8}
    assert needs["reduce.dtype=bf16"].gradients == 4 * n + 2 * 2 * n
    assert needs["reduce=fast"].gradients == 4 * n
    assert needs["sharding=optimizer"].optimizer == n
    assert needs["sharding=optimizer"].gradients == 3 * 4 * n
    layer = sizes.matrices // sizes.layers
    assert needs["sharding=full"].weights == n // 2 + 4 * (sizes.embedding + sizes.head + layer)
    assert needs["sharding=full"].gradients == 4 * n + 6 * n // 2
    assert needs["sharding=full"].optimizer == n
