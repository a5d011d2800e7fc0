"""Checkpoints that are whole or not there.

A checkpoint is a folder: safetensors files and one manifest with the size and sha256 of each. It is written under
another name, synced to the disk and renamed, so a crash leaves the old one, the new one, or both, never a mix. The
manifest's own sha256 stands beside it. Nothing is loaded before all of it is verified: safetensors, like every tensor
format, loads a flipped bit without a word.

    step-00000100/
      model.safetensors          parameters by name, float32
      optimizer.safetensors      moments by name: exp_avg.<parameter>, exp_avg_sq.<parameter>
      manifest.json              step, files, fingerprint, digests
      manifest.json.sha256       of the manifest's bytes
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.data.store import sync

FORMAT = 1
MANIFEST, SEAL = "manifest.json", "manifest.json.sha256"
NAME = re.compile(r"step-(\d{8,})")
CHUNK = 1 << 20  # bytes read at a time while hashing


class Damaged(Exception):
    """A checkpoint that must not be used: which file, and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A checkpoint all of whose bytes are those that were written."""

    path: Path
    step: int
    manifest: dict[str, Any]


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def save(root: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], about: dict[str, Any]) -> tuple[Path, int]:
    """Write `files` (file name without ending -> tensors by name) as the checkpoint of `step`; returns path, bytes.

    `about` goes into the manifest as it is. A checkpoint of the same step is replaced.
    """
    root.mkdir(parents=True, exist_ok=True)
    path, draft = root / folder_name(step), root / f".draft-{folder_name(step)}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    listed: dict[str, dict[str, Any]] = {}
    for name, tensors in files.items():
        file = draft / f"{name}.safetensors"
        save_file({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}, file)
        listed[file.name] = {"size": file.stat().st_size, "sha256": sha256(file)}
        sync(file)
    manifest = json.dumps({"format": FORMAT, "step": step, "files": listed, **about}, indent=1).encode()
    _write(draft / MANIFEST, manifest)
    _write(draft / SEAL, hashlib.sha256(manifest).hexdigest().encode())
    sync(draft)
    if path.exists():  # the same step, saved again after a resume
        retired = root / f".retired-{folder_name(step)}"
        shutil.rmtree(retired, ignore_errors=True)
        path.rename(retired)
    draft.rename(path)
    sync(root)
    for leftover in root.glob(".retired-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return path, len(manifest) + sum(entry["size"] for entry in listed.values())


def retain(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and drafts that a crash left behind."""
    for path in candidates(root)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
    for draft in root.glob(".draft-*"):
        shutil.rmtree(draft, ignore_errors=True)


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders, the newest step first; none of them verified."""
    found = [(int(match[1]), path) for path in root.glob("step-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def verify(path: Path) -> Verified:
    """Read every byte and compare; raises `Damaged` with the file's name."""
    try:
        manifest_bytes, seal = (path / MANIFEST).read_bytes(), (path / SEAL).read_bytes()
    except OSError as error:
        raise Damaged(f"{path}: {Path(str(error.filename)).name} cannot be read ({error.strerror})") from error
    if hashlib.sha256(manifest_bytes).hexdigest().encode() != seal:
        raise Damaged(f"{path}: {MANIFEST} does not match its sha256")
    manifest = json.loads(manifest_bytes)
    if manifest["format"] != FORMAT:
        raise Damaged(f"{path}: format {manifest['format']} is not {FORMAT}, which this version reads")
    unlisted = {file.name for file in path.iterdir()} - set(manifest["files"]) - {MANIFEST, SEAL}
    if unlisted:
        raise Damaged(f"{path}: {sorted(unlisted)[0]} is not in the manifest")
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise Damaged(f"{path}: {name} is missing")
        if file.stat().st_size != entry["size"]:
            raise Damaged(f"{path}: {name} has {file.stat().st_size} bytes instead of {entry['size']}")
        if sha256(file) != entry["sha256"]:
            raise Damaged(f"{path}: {name} does not match its sha256")
    return Verified(path, manifest["step"], manifest)


def newest(root: Path) -> tuple[Verified | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with the newer ones that were passed over."""
    refused: list[str] = []
    for path in candidates(root):
        try:
            return verify(path), refused
        except Damaged as damage:
            refused.append(str(damage))
    return None, refused


def load(checkpoint: Verified, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy a verified checkpoint into the tensors of `files`, which must name exactly what it holds."""
    for name, tensors in files.items():
        try:
            with safe_open(checkpoint.path / f"{name}.safetensors", framework="pt") as stored:
                different = set(stored.keys()) ^ set(tensors)
                if different:
                    raise Damaged(f"{checkpoint.path}: {name} belongs to another model ({sorted(different)[0]})")
                for key, tensor in tensors.items():
                    value = stored.get_tensor(key)
                    if value.shape != tensor.shape:
                        shapes = f"{tuple(value.shape)} instead of {tuple(tensor.shape)}"
                        raise Damaged(f"{checkpoint.path}: {name} belongs to another model ({key} is {shapes})")
                    tensor.detach().copy_(value)
        except SafetensorError as error:
            raise Damaged(f"{checkpoint.path}: {name}.safetensors: {error}") from error


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def state_sha256(step: int, files: Mapping[str, Mapping[str, Tensor]]) -> str:
    """One digest of weights, optimizer state and step: names, shapes and bytes, sorted by name."""
    digest = hashlib.sha256(f"step {step}\n".encode())
    for group, tensors in sorted(files.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{group} {name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().contiguous().cpu().numpy().data)
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
