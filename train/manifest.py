"""Which checkpoints a run has, whether they are whole, and which of them are kept. Knows files, not tensors.

A checkpoint is a folder `step-00000100/` of safetensors files, a manifest with the size and sha256 of each and the
shape of every tensor, and beside it the seal, the sha256 of the manifest's bytes. All of it is verified before anything
is used: safetensors, like every tensor format, loads a flipped bit without a word.

A tensor stands whole under its name, or in parts `name@offset`, 1-D, which must cover it exactly once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from train.config import Checkpoint
from train.data.store import sync

FORMAT = 2
MANIFEST, SEAL = "manifest.json", "manifest.json.sha256"
NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})")
FILE = re.compile(r"([a-z_]+)-\d{5}\.safetensors")
CHUNK = 1 << 20  # bytes read at a time while hashing


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


def steps(names: Iterable[str]) -> list[int]:
    """The steps whose checkpoint folders are among the names, the newest first."""
    return sorted((step for name in names if (step := step_of(name)) is not None), reverse=True)


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders, the newest step first; none of them verified."""
    return [root / folder_name(step) for step in steps(path.name for path in root.glob("step-*"))]


def encode(about: dict[str, Any]) -> tuple[bytes, bytes]:
    """A manifest and its seal."""
    raw = json.dumps({"format": FORMAT, **about}, indent=1).encode()
    return raw, hashlib.sha256(raw).hexdigest().encode()


def decode(raw: bytes, seal: bytes, where: str, step: int | None) -> dict[str, Any]:
    """A manifest that its seal vouches for, of the right shape and of `step`; raises `Damaged`."""
    if hashlib.sha256(raw).hexdigest().encode() != seal:
        raise Damaged(f"{where}: {MANIFEST} does not match its sha256")
    try:
        found = json.loads(raw)
        if found["format"] != FORMAT:
            raise Damaged(f"{where}: format {found['format']} is not {FORMAT}, which this version reads")
        shapes = [shape for kind in found["tensors"].values() for shape in kind.values()]
        if not (
            type(found["step"]) is int
            and all(FILE.fullmatch(name) for name in found["files"])
            and all(type(e["size"]) is int and type(e["sha256"]) is str for e in found["files"].values())
            and all(type(size) is int and size >= 0 for shape in shapes for size in shape)
            and isinstance(found.get("val_loss"), float | None)
            and isinstance(found.get("identity", {}), dict)
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{where}: {MANIFEST} is not a manifest ({type(error).__name__})") from error
    if found["step"] != step:
        raise Damaged(f"{where}: {MANIFEST} is of step {found['step']}")
    return dict(found)


def read(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, its files unseen; raises `Damaged`."""
    try:
        raw, seal = (path / MANIFEST).read_bytes(), (path / SEAL).read_bytes()
    except OSError as error:
        raise Damaged(f"{path}: {Path(str(error.filename)).name} cannot be read ({error.strerror})") from error
    return decode(raw, seal, str(path), step_of(path.name))


def verify(path: Path, progress: Callable[[int], object] = lambda count: None) -> Verified:
    """Read every byte and compare; raises `Damaged` with the file's name. `progress` is told of bytes read."""
    manifest = read(path)
    unlisted = {file.name for file in path.iterdir()} - set(manifest["files"]) - {MANIFEST, SEAL}
    if unlisted:
        raise Damaged(f"{path}: {sorted(unlisted)[0]} is not in the manifest")
    for name, entry in manifest["files"].items():
        digest, size = hashlib.sha256(), 0
        try:
            with (path / name).open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    progress(len(chunk))
        except OSError as error:
            raise Damaged(f"{path}: {name} cannot be read ({error.strerror})") from error
        if size != entry["size"]:
            raise Damaged(f"{path}: {name} has {size} bytes instead of {entry['size']}")
        if digest.hexdigest() != entry["sha256"]:
            raise Damaged(f"{path}: {name} does not match its sha256")
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


def newest(root: Path, among: Callable[[int], bool] = lambda step: True) -> tuple[Verified | None, list[str]]:
    """The newest checkpoint of a step `among` that is whole, and what is wrong with those that were passed over."""
    refused: list[str] = []
    for path in candidates(root):
        try:
            if among(step_of(path.name) or 0):
                return verify(path), refused
        except Damaged as damage:
            if not path.exists():  # a run under way has removed it, and has a newer one
                return newest(root, among)
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


def outlived(
    found: list[int], read: Callable[[int], dict[str, Any]], policy: Checkpoint, trusted: Callable[[int], bool]
) -> set[int]:
    """The steps among `found` that the policy does not keep, and all that are not trusted to be whole."""
    losses: dict[int, float | None] = {}
    for step in filter(trusted, found):
        with contextlib.suppress(Damaged):
            losses[step] = read(step).get("val_loss")
    return set(found) - retained(losses, policy)


def prune(root: Path, policy: Checkpoint, trusted: Callable[[int], bool], spared: int | None = None) -> None:
    """Remove what has been outlived, but for one that is `spared`, this time.

    A folder goes out of sight at once: a crash leaves it whole or leaves a draft.
    """
    found = outlived(steps(os.listdir(root)), lambda step: read(root / folder_name(step)), policy, trusted)
    for step in found - {spared}:
        shutil.rmtree(_aside(root / folder_name(step), ".draft-removed-"), ignore_errors=True)


def publish(draft: Path, path: Path) -> None:
    """Give a finished folder its name, in place of one that has it. `tidy` undoes what a crash in here leaves."""
    sync(draft)
    retired = _aside(path, ".retired-")  # the same step, saved again after a resume
    draft.rename(path)
    sync(path.parent)
    shutil.rmtree(retired, ignore_errors=True)


def _aside(path: Path, prefix: str) -> Path:
    """Rename a folder, if it is there, so that nobody takes it for a checkpoint; returns its new path."""
    aside = path.with_name(prefix + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        path.rename(aside)
    return aside


def tidy(root: Path) -> None:
    """Clear what a crash left behind; to be called while nobody writes."""
    for retired in root.glob(".retired-*"):
        path = root / retired.name.removeprefix(".retired-")
        if not path.exists():
            retired.rename(path)
    for leftover in (*root.glob(".draft-*"), *root.glob(".retired-*"), *root.glob(".probe-*")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
