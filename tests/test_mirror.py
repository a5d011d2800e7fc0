"""Checkpoints in a bucket: what is there whole is taken, what is torn is passed over, and no error ends a run."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from tests.test_checkpoint import flip, simple
from train import manifest, mirror
from train.checks import Refused
from train.config import Checkpoint
from train.manifest import MANIFEST, SEAL, Damaged
from train.mirror import Mirror, Origin, Remote

SECRET = "not-really-a-secret"


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """An S3 on loopback; returns its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture
def aws(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket's name; the environment has what its clients need."""
    for name, value in environment(s3).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem(use_listings_cache=False)
    files.mkdir("bucket")
    yield "bucket"
    files.rm("bucket", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["folder", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('aws')}/runs/a"
    return f"{'file://' if request.param == 'file' else ''}{tmp_path}/store/a"


def mirrored(root: Path, url: str, *steps: int, newest: int | None = None, **policy: Any) -> list[str]:
    """Copy what is in `root` as after commits of `steps`; returns the warnings."""
    warnings: list[str] = []
    copier = Mirror(root, Checkpoint(store=url, **policy), lambda step: True, lambda text, step: warnings.append(text))
    for step in steps:
        copier.update(step)
    copier.close()
    return warnings


def any_manifest(found: dict[str, Any]) -> None:
    pass


def test_what_is_copied_there_comes_back_whole(url: str, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert Remote(url, "").steps() == []
    assert Origin(url, "resume_from").fetch(tmp_path / "empty", any_manifest) is None
    for step in (1, 2):
        simple(root, step)
    assert mirrored(root, url, 2) == []
    assert Remote(url, "").steps() == [2, 1]
    elsewhere = tmp_path / "elsewhere"
    path = Origin(url, "resume_from").fetch(elsewhere, any_manifest)
    assert path == elsewhere / "step-00000002"
    for file in (root / "step-00000002").iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes()
    assert [item.name for item in elsewhere.iterdir()] == ["step-00000002"]
    assert Origin(url, "resume_from").fetch(elsewhere, any_manifest) is None, "what is here is as new"
    flip(path / "model-00000.safetensors")
    assert Origin(url, "resume_from").fetch(elsewhere, any_manifest) == path, "what is here is damaged"
    manifest.verify(path)


def test_a_seal_that_has_outlived_its_files_is_not_believed(tmp_path: Path) -> None:
    """A disk that lost its power may keep the last small file of a checkpoint and none of the large ones."""
    root, store = tmp_path / "checkpoints", tmp_path / "store"
    simple(root, 1)
    for spoil in (lambda path: os.truncate(path, 9), os.unlink):
        assert mirrored(root, str(store), 1) == []
        spoil(store / "step-00000001" / "model-00000.safetensors")
    assert mirrored(root, str(store), 1) == []
    manifest.verify(store / "step-00000001")


@pytest.mark.parametrize("name", ["model-00001.safetensors", MANIFEST, SEAL])
def test_what_is_torn_or_damaged_there_is_passed_over_by_name(name: str, url: str, tmp_path: Path) -> None:
    root, copy = tmp_path / "checkpoints", tmp_path / "copy"
    for step in (1, 2, 3):
        simple(root, step)
    mirrored(root, url, 3, keep=5)
    remote = Remote(url, "")
    remote._fs.rm_file(remote._at(3, name))
    shutil.copytree(root, copy)
    flip(copy / "step-00000002" / name)
    remote._fs.put_file(str(copy / "step-00000002" / name), remote._at(2, name))
    origin = Origin(url, "resume_from")
    elsewhere = tmp_path / "elsewhere"
    assert origin.fetch(elsewhere, any_manifest) == elsewhere / "step-00000001"
    assert ["step-00000003" in origin.refused[0], "step-00000002" in origin.refused[1]] == [True, True]
    assert all(url in refused and "draft" not in refused for refused in origin.refused)
    assert len(origin.refused) == 2
    assert [item.name for item in elsewhere.iterdir()] == ["step-00000001"]


def test_an_upload_that_ends_anywhere_is_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one over an older checkpoint of the same step; the next save completes it."""
    root, url = tmp_path / "checkpoints", f"{tmp_path}/store"
    simple(root, 1)
    simple(root, 2, 1.0)
    mirrored(root, url, 2, keep=5)
    simple(root, 2, 2.0)
    files = len(list((root / "step-00000002").iterdir()))
    for limit in range(files):
        remote, count = Remote(url, ""), 0
        put = remote._fs.put_file

        def put_file(*args: Any, limit: int = limit, put: Callable[..., Any] = put) -> None:
            nonlocal count
            count += 1
            if count > limit:
                raise KeyboardInterrupt
            put(*args)

        with monkeypatch.context() as patch:
            patch.setattr(remote._fs, "put_file", put_file)
            with pytest.raises(KeyboardInterrupt):
                remote.upload(root / "step-00000002")
        origin = Origin(url, "resume_from")
        path = origin.fetch(tmp_path / f"{limit}", any_manifest)
        assert path is not None
        assert path.name == "step-00000001"
        assert "step-00000002" in origin.refused[0]
    assert mirrored(root, url, 2, keep=5) == []
    path = Origin(url, "resume_from").fetch(tmp_path / "whole", any_manifest)
    assert path is not None
    assert (path / SEAL).read_bytes() == (root / "step-00000002" / SEAL).read_bytes()


def test_the_same_is_kept_there_as_here(url: str, tmp_path: Path) -> None:
    """The last one, every 20th and the best; what a later run of the same name saved is not judged."""
    root, policy = tmp_path / "checkpoints", Checkpoint(keep=1, keep_every=20, keep_best=True)
    losses = {10: 3.0, 20: 2.9, 30: 1.0, 40: 2.0, 50: 2.5}
    for step in (81, 90):
        simple(tmp_path / "other", step)
    mirrored(tmp_path / "other", url, 90)
    for step, loss in losses.items():
        simple(root, step, val_loss=loss)
        manifest.prune(root, policy, lambda step: True)
        assert mirrored(root, url, step, keep=1, keep_every=20, keep_best=True) == []
    assert [manifest.step_of(path.name) for path in manifest.candidates(root)] == [50, 40, 30, 20]
    assert Remote(url, "").steps() == [90, 81, 50, 40, 30, 20]


def test_an_error_is_a_warning_and_what_is_missing_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET_KEY", SECRET)
    root, url = tmp_path / "checkpoints", f"{tmp_path}/store"
    simple(root, 1)
    with monkeypatch.context() as patch:

        def fails(self: Remote, path: Path) -> None:
            raise OSError(f"no route to host for {SECRET}")

        patch.setattr(Remote, "upload", fails)
        (warning,) = set(mirrored(root, url, 1))  # said again where the last look is another one
    assert "no route to host" in warning
    assert SECRET not in warning
    assert Remote(url, "").steps() == []
    simple(root, 2)
    assert mirrored(root, url, 2) == []
    assert Remote(url, "").steps() == [2, 1]


@dataclass
class Held:
    """Uploads, which wait until they may `go`."""

    begun: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    uploads, upload = Held(), Remote.upload

    def slow(self: Remote, path: Path) -> None:
        uploads.begun.set()
        assert uploads.go.wait(60)
        upload(self, path)

    monkeypatch.setattr(Remote, "upload", slow)
    return uploads


def test_a_save_does_not_wait_for_the_mirror(tmp_path: Path, held: Held) -> None:
    root = tmp_path / "checkpoints"
    simple(root, 1)
    copier = Mirror(root, Checkpoint(store=f"{tmp_path}/store"), lambda step: True, lambda text, step: None)
    copier.update(1)
    assert held.begun.wait(60)
    assert copier.uploading == 1
    simple(root, 2)
    copier.update(2)  # returns at once
    held.go.set()
    copier.close()
    assert copier.uploading is None
    assert Remote(f"{tmp_path}/store", "").steps() == [2, 1]


def test_what_was_spared_for_its_upload_goes_at_the_end(tmp_path: Path, held: Held) -> None:
    root = tmp_path / "checkpoints"
    policy = Checkpoint(store=f"{tmp_path}/store", keep=2)
    simple(root, 1)
    copier = Mirror(root, policy, lambda step: True, lambda text, step: None)
    copier.update(1)
    assert held.begun.wait(60)
    simple(root, 2)
    simple(root, 3)
    manifest.prune(root, policy, lambda step: True, spared=copier.uploading)  # as the save of step 3 does
    copier.update(3)
    assert manifest.steps(os.listdir(root)) == [3, 2, 1]
    held.go.set()
    copier.close()
    assert manifest.steps(os.listdir(root)) == Remote(policy.store, "").steps() == [3, 2]


def test_who_waits_for_a_slow_store_gives_signs_of_life(tmp_path: Path, held: Held) -> None:
    """Else the rank that saves would be taken for hung at the end of the run, and be killed."""
    root, beats = tmp_path / "checkpoints", 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        if beats == 2:
            held.go.set()

    simple(root, 1)
    copier = Mirror(root, Checkpoint(store=f"{tmp_path}/store"), lambda step: True, lambda text, step: None)
    copier.update(1)
    copier.close(beat)
    assert Remote(f"{tmp_path}/store", "").steps() == [1]


def test_what_cannot_be_read_or_is_no_url_is_refused_in_one_line(
    aws: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refused, match=r"checkpoint\.store: nope://x is of no kind"):
        Remote("nope://x", "checkpoint.store")
    for bad in ("s3://key:secret@bucket/run", "ftp://me:pw@host/run"):
        with pytest.raises(Refused, match="no credentials"):
            Checkpoint(store=bad)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(Refused, match=r"pip install -e '\.\[gs\]'"):
        Remote("gs://bucket/run", "resume_from")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        with pytest.raises(Refused, match="cannot be read") as refusal:
            next(Origin(f"s3://{aws}/x", "resume_from").manifests())
    assert "\n" not in str(refusal.value)
    monkeypatch.undo()


def test_a_name_that_leads_out_of_the_folder_is_damage(tmp_path: Path) -> None:
    """What is listed in a manifest from elsewhere becomes a path here."""
    raw, seal = manifest.encode(
        {"step": 1, "files": {"../../evil-00000.safetensors": {"size": 1, "sha256": ""}}, "tensors": {}}
    )
    folder = tmp_path / "store/step-00000001"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_bytes(raw)
    (folder / SEAL).write_bytes(seal)
    with pytest.raises(Damaged, match="not a manifest"):
        Remote(f"{tmp_path}/store", "").read(1)
    assert mirror.Origin(f"{tmp_path}/store", "resume_from").fetch(tmp_path / "here", any_manifest) is None
