"""Checkpoints: whole or refused, by name, however the state is cut; the newest that is whole is taken."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import Precision
from torch import Tensor

from tests import dist
from train import checkpoint, manifest
from train.config import Checkpoint
from train.flat import Piece
from train.group import Group, Place
from train.manifest import MANIFEST, SEAL, Damaged

State = dict[str, dict[str, Tensor]]


def state(value: float) -> State:
    return {
        "model": {"a": torch.full((7, 3), value), "b": torch.arange(5.0), "c": torch.tensor(-0.0)},
        "optimizer": {"exp_avg.a": torch.full((7, 3), -value), "exp_avg.z": torch.full((4,), -0.0)},
    }


def pieces(tensors: State) -> list[Piece]:
    return [
        Piece(file, name, tensor.shape, 0, tensor.view(-1), replicated=True)
        for file, named in tensors.items()
        for name, tensor in named.items()
    ]


def cut(tensors: State, rank: int, world: int) -> list[Piece]:
    """The optimizer's tensors and `a` in `world` uneven parts, of which this rank has one; the rest on all ranks."""
    found = []
    for piece in pieces(tensors):
        if piece.file == "model" and piece.name != "a":
            found.append(piece)
            continue
        size = piece.data.numel()
        bounds = [0, *(size * (i + 1) // world + (i + 1 < world) for i in range(world))]
        part = slice(bounds[rank], bounds[rank + 1])
        found.append(dataclasses.replace(piece, offset=part.start, data=piece.data[part], replicated=False))
    return found


def save(root: Path, step: int, by_rank: list[list[Piece]], about: Mapping[str, Any] | None = None) -> Path:
    """A save of several ranks, one after the other."""
    root.mkdir(parents=True, exist_ok=True)
    draft, ranks = root / f".draft-{manifest.folder_name(step)}-1", range(len(by_rank))
    reports = []
    for rank, mine in enumerate(by_rank):
        share = checkpoint.deal(mine, rank, ranks)
        reports.append(checkpoint.write(draft, rank, checkpoint.Snapshot(share).take(share)))
    return checkpoint.commit(root, draft, step, reports, about or {})[0]


def simple(root: Path, step: int, value: float = 1.0, **about: Any) -> Path:
    """A checkpoint of two ranks: four files."""
    return save(root, step, [cut(state(value), rank, 2) for rank in range(2)], about)


def digest(step: int, tensors: State) -> str:
    return checkpoint.state_sha256(step, pieces(tensors), Group(Place.alone(), Precision()))


def restored(path: Path) -> State:
    tensors = state(0.0)
    checkpoint.load(manifest.verify(path), pieces(tensors))
    return tensors


# ---------------------------------------------------------------------------------------------- round trips


def test_a_checkpoint_round_trips(tmp_path: Path) -> None:
    path = save(tmp_path, 7, [pieces(state(0.3))], {"writer_epoch": 2})
    found = manifest.verify(path)
    assert (found.step, found.manifest["writer_epoch"], path.name) == (7, 2, "step-00000007")
    assert digest(7, restored(path)) == digest(7, state(0.3)) != digest(8, state(0.3))


def test_the_digest_of_a_state_is_over_its_names_shapes_and_bytes() -> None:
    """Printed digests stay comparable: names sorted, every bit, the sign of a zero included."""
    expected = hashlib.sha256(b"step 3\n")
    for kind, named in sorted(state(0.5).items()):
        for name, tensor in sorted(named.items()):
            expected.update(f"{kind} {name} torch.float32 {list(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    assert digest(3, state(0.5)) == expected.hexdigest()


def on_ranks(group: Group, root: str, step: int, written: int) -> str:
    """Save as `written` partial ranks would (rank 0 does it), restore into this world's parts, digest these."""
    tensors = state(0.0)
    mine = cut(tensors, group.rank, group.world) if group.world > 1 else pieces(tensors)
    found = None
    if group.rank == 0:
        found = manifest.verify(save(Path(root), step, [cut(state(0.7), rank, written) for rank in range(written)]))
    checkpoint.load(found, mine, group)
    return checkpoint.state_sha256(step, mine, group)


@pytest.mark.parametrize(("written", "world"), [(3, 2), (3, 1), (1, 3), (2, 3)])
def test_any_cut_restores_into_any_other(written: int, world: int, tmp_path: Path) -> None:
    answers = dist.run("tests.test_checkpoint:on_ranks", world, root=str(tmp_path), step=4, written=written)
    assert answers == [digest(4, state(0.7)), *[""] * (world - 1)]


def test_shares_are_even_and_cover_everything_once() -> None:
    tensors = {"model": {f"{i}": torch.zeros(size) for i, size in enumerate((900, 500, 400, 300, 200, 100, 100, 0))}}
    shares = [checkpoint.deal(pieces(tensors), rank, [0, 2, 3]) for rank in (0, 2, 3)]
    names = sorted(piece.name for share in shares for piece in share)
    assert names == sorted(tensors["model"])
    assert sorted(sum(piece.data.numel() for piece in share) for share in shares) == [800, 800, 900]
    own = dataclasses.replace(pieces(tensors)[0], replicated=False)
    assert checkpoint.deal([own], 3, [0, 3]) == [own]


def test_a_snapshot_does_not_change_with_the_state() -> None:
    tensors = state(1.0)
    snapshot = checkpoint.Snapshot(pieces(tensors))
    taken = snapshot.take(pieces(tensors))
    tensors["model"]["a"].fill_(9.0)
    assert taken[0].data.tolist() == [1.0] * 21
    assert snapshot.take(pieces(tensors))[0].data.data_ptr() == taken[0].data.data_ptr()


# -------------------------------------------------------------------------------------------------- damage


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[random.Random(file.name).randrange(len(content))] ^= 1
    file.write_bytes(content)


def unlisted(file: Path) -> None:
    file.with_name("extra.bin").write_bytes(b"")


def swap(file: Path) -> None:
    others = [other for other in sorted(file.parent.iterdir()) if other.suffix == file.suffix and other != file]
    other = others[0] if others else file.with_name("model-00000.safetensors")
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


FILES = ("model-00000.safetensors", "model-00001.safetensors", "optimizer-00001.safetensors", MANIFEST, SEAL)
DAMAGES: dict[str, Callable[[Path], None]] = {
    "flip": flip,
    "truncate": lambda file: os.truncate(file, file.stat().st_size - 1),
    "empty": lambda file: os.truncate(file, 0),
    "missing": lambda file: file.unlink(),
    "unlisted": unlisted,
    "swap": swap,
    "folder": folder,
}


def test_who_looks_for_the_newest_while_a_run_saves_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was the newest goes, as a newer one has come since."""
    whole = manifest.verify

    def late(path: Path) -> manifest.Verified:
        if path.name == "step-00000002":
            simple(tmp_path, 3)
            shutil.rmtree(path)
        return whole(path)

    simple(tmp_path, 2)
    monkeypatch.setattr(manifest, "verify", late)
    found, refused = manifest.newest(tmp_path)
    assert found is not None
    assert (found.step, refused) == (3, [])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_damage_is_refused_by_name(damage: str, name: str, tmp_path: Path) -> None:
    simple(tmp_path, 1)
    path = simple(tmp_path, 2)
    DAMAGES[damage](path / name)
    found, refused = manifest.newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "step-00000002" in refused[0]
    if damage != "swap":
        assert ("extra.bin" if damage == "unlisted" else name.removesuffix(".sha256")) in refused[0]


def test_ten_thousand_flipped_bits_are_all_refused(tmp_path: Path) -> None:
    simple(tmp_path, 1)
    path = simple(tmp_path, 2)
    rng = random.Random(0)
    contents = {file: file.read_bytes() for file in sorted(path.iterdir())}
    places = [(file, place) for file, content in contents.items() for place in range(len(content))]

    def put(file: Path, place: int, byte: int) -> None:  # in place: a file cut and written anew is flushed when closed
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(bytes([byte]))

    for _ in range(10_000):
        file, place = rng.choice(places)
        put(file, place, contents[file][place] ^ (1 << rng.randrange(8)))
        with pytest.raises(Damaged, match="step-00000002"):
            manifest.verify(path)
        if rng.random() < 0.01:
            found, _ = manifest.newest(tmp_path)
            assert found is not None
            assert found.step == 1
        put(file, place, contents[file][place])
    manifest.verify(path)


def sealed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and seal it again, as only somebody with intent would."""
    found = json.loads((path / MANIFEST).read_text())
    raw = json.dumps(change(found)).encode()
    (path / MANIFEST).write_bytes(raw)
    (path / SEAL).write_text(hashlib.sha256(raw).hexdigest())


SHAPES: list[Any] = [
    *([], {}, None, 3, "x", {"format": 2}, {"format": 1, "step": 2}, {"format": None}, {"format": []}),
    *({"step": "2"}, {"step": 3}, {"step": True}, {"step": None}, {"files": []}, {"files": None}, {"files": {"x": 1}}),
    *({"files": {"model-00000.safetensors": {}}}, {"files": {"../../x-00000.safetensors": {"size": 1, "sha256": ""}}}),
    *({"tensors": None}, {"tensors": []}, {"tensors": {"model": 3}}, {"tensors": {"model": {"a": 3}}}, {"tensors": {}}),
    *({"tensors": {"model": {"a": ["7", 3]}}}, {"tensors": {"model": {"a": [-7, -3]}}}, {"val_loss": "low"}),
    *({"identity": 3}, {"files": {}}),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: json.dumps(shape)[:40])
def test_a_manifest_of_the_wrong_shape_is_damage_not_a_crash(shape: Any, tmp_path: Path) -> None:
    path = simple(tmp_path, 2)
    sealed(path, lambda old: {**old, **shape} if isinstance(shape, dict) and "format" not in shape and shape else shape)
    with pytest.raises(Damaged, match="step-00000002"):
        manifest.verify(path)


def test_deep_or_broken_json_is_damage_not_a_crash(tmp_path: Path) -> None:
    path = simple(tmp_path, 2)
    for raw in (b"[" * 100_000, b"\xff\xfe", b"", b"{"):
        (path / MANIFEST).write_bytes(raw)
        (path / SEAL).write_text(hashlib.sha256(raw).hexdigest())
        with pytest.raises(Damaged, match="not a manifest"):
            manifest.verify(path)


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    simple(tmp_path, 2).rename(tmp_path / "step-00000009")
    with pytest.raises(Damaged, match="is of step 2"):
        manifest.verify(tmp_path / "step-00000009")


def test_a_hole_or_an_overlap_is_refused_when_it_is_saved_and_when_it_is_read(tmp_path: Path) -> None:
    """Files and manifest agree to the byte, and yet an element is missing, or there twice."""
    first, second = (cut(state(1.0), rank, 2) for rank in range(2))
    shifted = [piece if piece.replicated else dataclasses.replace(piece, offset=piece.offset - 1) for piece in second]
    for by_rank in ([first], [first, second, second], [first, shifted]):
        with pytest.raises(Damaged, match="incomplete"):
            save(tmp_path, 3, by_rank)
        manifest.tidy(tmp_path)
    assert manifest.candidates(tmp_path) == []
    path = simple(tmp_path, 4)
    (path / "optimizer-00001.safetensors").unlink()
    sealed(
        path,
        lambda old: {**old, "files": {k: v for k, v in old["files"].items() if k[:10] != "optimizer-" or "1" not in k}},
    )
    with pytest.raises(Damaged, match=r"incomplete: optimizer exp_avg\.a"):
        manifest.verify(path)


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    found = manifest.verify(simple(tmp_path, 1))
    all_of_it = state(0.0)["model"]
    for model in (
        {**all_of_it, "d": torch.zeros(3)},
        {**all_of_it, "a": torch.zeros(3, 7)},
        {"a": all_of_it["a"]},
    ):
        with pytest.raises(Damaged, match="another model"):
            checkpoint.load(found, pieces({"model": model}))
    checkpoint.load(found, pieces({"model": all_of_it}))


def test_the_manifest_says_what_it_covers(tmp_path: Path) -> None:
    path = simple(tmp_path, 3, fingerprint={"torch": "x"})
    found = json.loads((path / MANIFEST).read_text())
    assert set(found) == {"format", "step", "files", "tensors", "fingerprint"}
    names = {f"{kind}-0000{rank}.safetensors" for kind in ("model", "optimizer") for rank in (0, 1)}
    assert set(found["files"]) == names
    assert {file.name for file in path.iterdir()} == names | {MANIFEST, SEAL}


# -------------------------------------------------------------------------------------------------- crashes


class Crash(BaseException):
    pass


CALLS = ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir")


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_a_crash_anywhere_in_a_parallel_save_leaves_old_or_new(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop a save of two ranks at each of its calls that touch the disk: the old state or the new is found, whole."""
    outcomes = []
    for call in range(200):
        root = tmp_path / f"{call}"
        simple(root, 2 if again else 1, 1.0)
        count = 0

        def crashing(function: Callable[..., object], limit: int = call) -> Callable[..., object]:
            def wrapped(*args: object, **kwargs: object) -> object:
                nonlocal count
                count += 1
                if count > limit:
                    raise Crash
                return function(*args, **kwargs)

            return wrapped

        finished = False
        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, crashing(getattr(os, name)))
            try:
                simple(root, 2, 2.0)
                finished = True
            except Crash:
                pass
        manifest.tidy(root)
        found, refused = manifest.newest(root)
        assert found is not None
        assert refused == []
        back = restored(found.path)
        values = {*back["model"]["a"].view(-1).tolist(), *(-back["optimizer"]["exp_avg.a"]).view(-1).tolist()}
        assert values in ({1.0}, {2.0})
        outcomes.append(values)
        assert not list(root.glob(".*"))
        shutil.rmtree(root)
        if finished:
            assert values == {2.0}
            break
    assert finished, "every point was tried"
    assert len(outcomes) > 30
    assert outcomes.index({2.0}) > 20


# ------------------------------------------------------------------------------------------------ retention


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({"keep": 2}, {50, 60}),
        ({"keep": 1, "keep_every": 20}, {20, 40, 60}),
        ({"keep": 1, "keep_best": True}, {30, 60}),
        ({"keep": 9}, {10, 20, 30, 40, 50, 60}),
    ],
)
def test_what_is_kept(policy: dict[str, Any], kept: set[int]) -> None:
    found = {10: 3.0, 20: None, 30: 2.0, 40: 2.5, 50: None, 60: 2.0 if "keep_best" not in policy else 2.1}
    assert manifest.retained(found, Checkpoint(**policy)) == kept


def test_retention_counts_only_what_is_trusted(tmp_path: Path) -> None:
    """A damaged checkpoint that is newer than the one gone on from must not push a whole one out."""
    for step in (5, 10, 100_000_000):
        simple(tmp_path, step, val_loss=float(step))
    manifest.prune(tmp_path, Checkpoint(keep=1, keep_best=True), lambda step: step <= 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]
    manifest.prune(tmp_path, Checkpoint(keep=1), lambda step: True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_tidying_clears_drafts_and_brings_back_what_was_being_replaced(tmp_path: Path) -> None:
    simple(tmp_path, 5).rename(tmp_path / ".retired-step-00000005")
    (tmp_path / ".draft-step-00000006-1").mkdir()
    (tmp_path / ".probe-ab").touch()
    manifest.tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
