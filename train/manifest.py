"""Which checkpoints a run has, whether they are whole, and which of them are kept. Knows files, not tensors.

A checkpoint is a folder `step-00000100/` of safetensors files, a manifest with the size and sha256 of each and the
shape of every tensor, and beside it the seal, the sha256 of the manifest's bytes. All of it is verified before anything
is used: safetensors, like every tensor format, loads a flipped bit without a word.

A tensor stands whole under its name, or in parts `name@offset`, 1-D, which must cover it exactly once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from train.config import Checkpoint
from train.data.store import sync

FORMAT = 2
MANIFEST, SEAL = "manifest.json", "manifest.json.sha256"
NAME = re.compile(r"step-(\d{8,})")
FILE = re.compile(r"([a-z_]+)-\d{5}\.safetensors")
CHUNK = 1 << 20  # bytes read at a time while hashing

Tensors = dict[str, dict[str, list[int]]]  # file kind ("model", "optimizer") -> name -> shape


class Damaged(Exception):
    """A checkpoint that must not be used: which file, and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a tensor on disk."""

    file: str
    key: str
    offset: int
    count: int


Parts = dict[tuple[str, str], list[Part]]  # (kind, name) -> its parts in order


@dataclass(frozen=True, slots=True)
class Verified:
    """A checkpoint all of whose bytes are those that were written, and which has every element once."""

    path: Path
    step: int
    manifest: dict[str, Any]
    parts: Parts


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint folder; None where the name is not one's."""
    match = NAME.fullmatch(name)
    return int(match[1]) if match else None


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders, the newest step first; none of them verified."""
    found = [(step, path) for path in root.glob("step-*") if (step := step_of(path.name)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def encode(about: dict[str, Any]) -> tuple[bytes, bytes]:
    """A manifest and its seal."""
    raw = json.dumps({"format": FORMAT, **about}, indent=1).encode()
    return raw, hashlib.sha256(raw).hexdigest().encode()


def decode(raw: bytes, seal: bytes, where: str | Path) -> dict[str, Any]:
    """A manifest that its seal vouches for, and of the right shape; raises `Damaged`."""
    if hashlib.sha256(raw).hexdigest().encode() != seal:
        raise Damaged(f"{where}: {MANIFEST} does not match its sha256")
    try:
        manifest = json.loads(raw)
        form = manifest["format"]
        if form == FORMAT:
            good = type(manifest["step"]) is int and all(
                FILE.fullmatch(name) and type(entry["size"]) is int and type(entry["sha256"]) is str
                for name, entry in manifest["files"].items()
            )
            shapes = [shape for kind in manifest["tensors"].values() for shape in kind.values()]
            good = good and all(type(size) is int and size >= 0 for shape in shapes for size in shape)
            loss = manifest.get("val_loss")
            good = good and (loss is None or type(loss) is float) and isinstance(manifest.get("identity", {}), dict)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{where}: {MANIFEST} is not a manifest ({type(error).__name__})") from error
    if form != FORMAT:
        raise Damaged(f"{where}: format {form} is not {FORMAT}, which this version reads")
    if not good:
        raise Damaged(f"{where}: {MANIFEST} is not a manifest")
    return dict(manifest)


def read(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, its files unseen; raises `Damaged`."""
    try:
        raw, seal = (path / MANIFEST).read_bytes(), (path / SEAL).read_bytes()
    except OSError as error:
        raise Damaged(f"{path}: {Path(str(error.filename)).name} cannot be read ({error.strerror})") from error
    manifest = decode(raw, seal, path)
    if manifest["step"] != step_of(path.name):
        raise Damaged(f"{path}: {MANIFEST} is of step {manifest['step']}")
    return manifest


def verify(path: Path, progress: Callable[[int], object] = lambda count: None) -> Verified:
    """Read every byte and compare; raises `Damaged` with the file's name. `progress` is told of bytes read."""
    manifest = read(path)
    unlisted = {file.name for file in path.iterdir()} - set(manifest["files"]) - {MANIFEST, SEAL}
    if unlisted:
        raise Damaged(f"{path}: {sorted(unlisted)[0]} is not in the manifest")
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise Damaged(f"{path}: {name} is missing")
        try:
            if file.stat().st_size != entry["size"]:
                raise Damaged(f"{path}: {name} has {file.stat().st_size} bytes instead of {entry['size']}")
            if sha256(file, progress) != entry["sha256"]:
                raise Damaged(f"{path}: {name} does not match its sha256")
        except OSError as error:
            raise Damaged(f"{path}: {name} cannot be read ({error.strerror})") from error
    return Verified(path, manifest["step"], manifest, index(path, manifest))


def index(path: Path, manifest: dict[str, Any]) -> Parts:
    """Where each tensor's elements are; raises `Damaged` where one is missing, twice there or unknown."""
    parts: Parts = {(kind, name): [] for kind, named in manifest["tensors"].items() for name in named}
    for file in manifest["files"]:
        kind = file.rsplit("-", 1)[0]
        try:
            with safe_open(path / file, framework="np") as stored:
                for key in stored.keys():  # noqa: SIM118 – not a dict
                    name, at, offset = key.partition("@")
                    part = stored.get_slice(key)
                    shape = part.get_shape()
                    whole = manifest["tensors"].get(kind, {}).get(name)
                    if whole is None or part.get_dtype() != "F32" or (len(shape) != 1 if at else shape != whole):
                        raise Damaged(f"{path}: {file} belongs to another model ({key})")
                    parts[kind, name].append(Part(file, key, int(offset or 0), math.prod(shape)))
        except (OSError, ValueError, SafetensorError) as error:
            raise Damaged(f"{path}: {file}: {error}") from error
    for (kind, name), found in parts.items():
        end = 0
        for part in sorted(found, key=lambda part: part.offset):
            if part.offset != end:
                raise Damaged(f"{path}: incomplete: {kind} {name} from element {min(end, part.offset)}")
            end += part.count
        if end != math.prod(manifest["tensors"][kind][name]):
            raise Damaged(f"{path}: incomplete: {kind} {name} ends at element {end}")
    return parts


def newest(root: Path) -> tuple[Verified | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with the newer ones that were passed over."""
    refused: list[str] = []
    for path in candidates(root):
        try:
            return verify(path), refused
        except Damaged as damage:
            refused.append(str(damage))
    return None, refused


def retained(found: Mapping[int, float | None], policy: Checkpoint) -> set[int]:
    """The steps to keep among `found` (step -> validation loss, where it was evaluated at that step)."""
    kept = set(sorted(found)[-policy.keep :])
    if policy.keep_every:
        kept |= {step for step in found if step % policy.keep_every == 0}
    scores = [(loss, -step) for step, loss in found.items() if loss is not None]
    if policy.keep_best and scores:
        kept.add(-min(scores)[1])
    return kept


def prune(root: Path, policy: Checkpoint, trusted: Callable[[int], bool]) -> None:
    """Remove the checkpoints that the policy does not keep, and all that are not trusted to be whole."""
    found: dict[int, float | None] = {}
    for path in candidates(root):
        try:
            manifest = read(path)
            if trusted(manifest["step"]):
                found[manifest["step"]] = manifest.get("val_loss")
        except Damaged:
            continue
    kept = {folder_name(step) for step in retained(found, policy)}
    for path in candidates(root):
        if path.name not in kept:
            remove(path)


def remove(path: Path) -> None:
    """Take a folder out of sight at once, then delete it: a crash leaves it whole or leaves a draft."""
    draft = path.with_name(f".draft-removed-{path.name}")
    shutil.rmtree(draft, ignore_errors=True)
    path.rename(draft)
    shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, path: Path) -> None:
    """Give a finished folder its name, in place of one that has it. `tidy` undoes what a crash in here leaves."""
    sync(draft)
    retired = path.with_name(f".retired-{path.name}")
    shutil.rmtree(retired, ignore_errors=True)
    if path.exists():  # the same step, saved again after a resume
        path.rename(retired)
    draft.rename(path)
    sync(path.parent)
    shutil.rmtree(retired, ignore_errors=True)


def tidy(root: Path) -> None:
    """Clear what a crash left behind; to be called while nobody writes."""
    for retired in root.glob(".retired-*"):
        path = root / retired.name.removeprefix(".retired-")
        if not path.exists():
            retired.rename(path)
    for leftover in (*root.glob(".draft-*"), *root.glob(".retired-*"), *root.glob(".probe-*")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def sha256(path: Path, progress: Callable[[int], object] = lambda count: None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def write(path: Path, content: bytes) -> None:
    """Write a small file and sync it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        if os.write(descriptor, content) != len(content):
            raise OSError(28, os.strerror(28))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
