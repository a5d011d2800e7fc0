"""Checkpoints: whole or refused, by name; the newest that is whole is taken."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from train import checkpoint


def state(value: float) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"a": torch.full((7, 3), value), "b": torch.arange(5.0)},
        "optimizer": {"exp_avg.a": torch.full((7, 3), -value)},
    }


def test_a_checkpoint_round_trips(tmp_path: Path) -> None:
    path, size = checkpoint.save(tmp_path, 7, state(0.3), {"writer_epoch": 2})
    found = checkpoint.verify(path)
    assert (found.step, found.manifest["writer_epoch"], path.name) == (7, 2, "step-00000007")
    assert size == sum(file.stat().st_size for file in path.iterdir() if file.name != checkpoint.SEAL)
    restored = state(0.0)
    checkpoint.load(found, restored)
    assert checkpoint.state_sha256(7, restored) == checkpoint.state_sha256(7, state(0.3))
    assert checkpoint.state_sha256(8, restored) != checkpoint.state_sha256(7, restored)


def test_every_kind_of_damage_is_refused_by_name(tmp_path: Path) -> None:
    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[random.Random(file.name).randrange(len(content))] ^= 1
        file.write_bytes(content)

    def unlisted(file: Path) -> None:
        file.with_name("extra.bin").write_bytes(b"")

    damages: list[Callable[[Path], None]] = [
        flip,
        lambda file: os.truncate(file, file.stat().st_size - 1),
        lambda file: file.unlink(),
        unlisted,
    ]
    for number, damage in enumerate(damages):
        for name in ("model.safetensors", "optimizer.safetensors", "manifest.json", "manifest.json.sha256"):
            path, _ = checkpoint.save(tmp_path / f"{number}", 1, state(1.0), {})
            damage(path / name)
            with pytest.raises(checkpoint.Damaged, match="step-00000001") as refusal:
                checkpoint.verify(path)
            expected = "extra.bin" if damage is unlisted else name.removesuffix(".sha256")
            assert expected in str(refusal.value)


def test_every_bit_counts(tmp_path: Path) -> None:
    """200 single flips anywhere in a checkpoint: all refused."""
    path, _ = checkpoint.save(tmp_path, 1, state(1.0), {})
    rng = random.Random(0)
    files = sorted(path.iterdir())
    for _ in range(200):
        file = rng.choice(files)
        content = file.read_bytes()
        place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        file.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        with pytest.raises(checkpoint.Damaged):
            checkpoint.verify(path)
        file.write_bytes(content)
    checkpoint.verify(path)


def test_the_newest_that_is_whole_is_taken(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state(float(step)), {})
    os.truncate(tmp_path / "step-00000003" / "model.safetensors", 10)
    (tmp_path / "step-00000004").mkdir()
    found, refused = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 2
    assert ["step-00000004" in refused[0], "step-00000003" in refused[1], len(refused)] == [True, True, 2]


@pytest.mark.parametrize("call", range(60))
def test_a_crash_anywhere_in_a_save_leaves_old_or_new(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop a save at its n-th call that touches the disk: what is found is the old state or the new, whole."""
    checkpoint.save(tmp_path, 1, state(1.0), {})
    count = 0

    class Crash(BaseException):
        pass

    def crashing(function: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count > call:
                raise Crash
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", crashing(save_file))
        for name in ("open", "fsync", "mkdir", "rename"):
            patch.setattr(os, name, crashing(getattr(os, name)))
        try:
            checkpoint.save(tmp_path, 2, state(2.0), {})
            finished = True
        except Crash:
            finished = False
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 2 if finished else found.step in (1, 2)
    restored = state(0.0)
    checkpoint.load(found, restored)
    assert checkpoint.state_sha256(0, restored) == checkpoint.state_sha256(0, state(float(found.step)))


def test_retention_keeps_the_last_and_clears_drafts(tmp_path: Path) -> None:
    for step in (5, 10, 100_000_000):
        checkpoint.save(tmp_path, step, state(1.0), {})
    (tmp_path / ".draft-step-00000011").mkdir()
    checkpoint.retain(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-100000000"]


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    path, _ = checkpoint.save(tmp_path, 1, state(1.0), {})
    other_name = {"model": {"c": torch.zeros(3)}}
    other_shape = {"model": {"a": torch.zeros(3, 7), "b": torch.zeros(5)}}
    for target in (other_name, other_shape):
        with pytest.raises(checkpoint.Damaged, match="another model"):
            checkpoint.load(checkpoint.verify(path), target)


def test_the_manifest_says_what_it_covers(tmp_path: Path) -> None:
    path, _ = checkpoint.save(tmp_path, 3, state(1.0), {"fingerprint": {"torch": "x"}})
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest) == {"format", "step", "files", "fingerprint"}
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors"}
    assert not any(file.suffix in (".pkl", ".pt", ".bin") for file in path.iterdir())
