"""What a device that is sick or slow looks like beside the others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from train import cli, hardware
from train.probe import findings


def row(digests: tuple[str, ...] = ("a",), flops: float = 1e11, copied: float = 1e10) -> dict[str, Any]:
    return {"device": "x", "matmul_flops": flops, "copy_bytes_per_s": copied, "digests": list(digests)}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(), row(), row(flops=0.9e11)], []),
        ([row(), row(digests=("a", "b")), row()], ["device 1 does not compute the same bits twice"]),
        ([row(), row(digests=("b",)), row()], ["device 1: other bits than the others"]),
        ([row(), row(digests=("b",))], ["devices 0, 1: other bits than the others"]),
        ([row(), row(), row(flops=5e10)], ["device 2 multiplies 2.0 times as slowly as the median"]),
        ([row(copied=4e9), row(), row()], ["device 0 copies 2.5 times as slowly as the median"]),
        ([{"device": "x", "error": "its process died"}, row()], ["device 0 gave no answer: its process died"]),
        ([{"device": "x", "error": "it is silent"}], ["device 0 gave no answer: it is silent"]),
    ],
)
def test_a_sick_or_slow_device_is_named(rows: list[dict[str, Any]], said: list[str]) -> None:
    assert findings(rows) == said


def test_the_devices_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """Equal bits on all, whatever the speed: two cores of one machine; the exit code is the findings'."""
    code = cli.main(["probe", "devices=2", "accelerator=cpu", "seconds=0.2", "check=true", "format=json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (1 if found["findings"] else 0)
    assert not [one for one in found["findings"] if "bits" in one or "no answer" in one]
    one, other = found["devices"]
    assert one["digests"] == other["digests"]
    assert len(one["digests"]) == 1
    assert one["digests_taken"] > 1
    assert 1e8 < one["matmul_flops"] < 1e13
    assert 1e8 < one["copy_bytes_per_s"] < 1e12


@pytest.mark.parametrize(
    ("override", "word"), [("devices=0", "devices"), ("devices=some", "devices"), ("seconds=0", "seconds")]
)
def test_a_mistake_is_refused(override: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", override]) == 2
    assert word in capsys.readouterr().err


def test_no_gpu_is_made_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: ())
    assert cli.main(["probe", "accelerator=cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err
