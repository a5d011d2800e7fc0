"""What `auto` means, and what a run would need, without training it."""

from __future__ import annotations

import pytest

from train import compose, hardware, plan
from train.config import Refused, Train

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
    assert resolved("batch.virtual_ranks=4").devices == 4
    assert resolved("nodes=4").devices == 2, "8 virtual ranks on 4 nodes"


@pytest.mark.usefixtures("two_gpus")
def test_auto_on_gpus() -> None:
    config = resolved()
    assert (config.accelerator, config.backend, config.devices) == ("cuda", "nccl", 2)
    assert (config.precision, config.compile) == ("bf16", True)
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
