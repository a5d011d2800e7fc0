"""The tensor side of a checkpoint: what each rank writes of the state, and how it comes back onto any number of ranks.

The state is a set of pieces (`train.flat.Piece`), whichever way it is cut. Each writing rank writes one file per kind:
the pieces that only it has, and its share of those that all have. Reading knows nothing of who wrote: a tensor is put
together from its parts on rank 0, sent to all, and each rank takes what overlaps its own pieces, one tensor at a time.

    step-00000100/
      model-00000.safetensors …      parameters by name, float32; a part of one as name@offset
      optimizer-00000.safetensors …  moments by name: exp_avg.<parameter>, exp_avg_sq.<parameter>
      manifest.json                  step, files, shapes, fingerprint, identity, digests (train.manifest)
      manifest.json.sha256           of the manifest's bytes
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from train.flat import Piece
from train.group import Group
from train.manifest import CHUNK, MANIFEST, SEAL, Damaged, Verified, encode, folder_name, index, publish
from train.manifest import write as write_small


def deal(pieces: Iterable[Piece], rank: int, writers: Sequence[int]) -> list[Piece]:
    """The pieces that `rank` writes: those that only it has, and of the others its share by size.

    A pure function of what all ranks know, so that they agree without a word.
    """
    pieces = sorted(pieces, key=lambda piece: (-piece.data.numel(), piece.file, piece.name, piece.offset))
    load = dict.fromkeys(writers, 0)
    mine = []
    for piece in pieces:
        writer = rank
        if piece.replicated:
            writer = min(writers, key=load.__getitem__)
            load[writer] += piece.data.numel()
        if writer == rank:
            mine.append(piece)
    return sorted(mine, key=lambda piece: (piece.file, piece.name, piece.offset))


class Snapshot:
    """Copies of pieces in the host's memory, in one buffer that is used again for every save."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        pinned = any(piece.data.is_cuda for piece in pieces)
        self._buffer = torch.empty(sum(piece.data.numel() for piece in pieces), pin_memory=pinned)
        self._buffer.zero_()  # its pages exist from here on: the first save need not wait for them

    def take(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same pieces with their data in the buffer; returns when the copy is done."""
        sizes = [piece.data.numel() for piece in pieces]
        copies = [
            replace(piece, data=view) for piece, view in zip(pieces, torch.split(self._buffer, sizes), strict=True)
        ]
        for piece, copied in zip(pieces, copies, strict=True):
            copied.data.copy_(piece.data, non_blocking=True)
        if self._buffer.is_pinned():
            torch.cuda.current_stream().synchronize()
        return copies


def write(draft: Path, rank: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Write one rank's files (pieces in the host's memory) into a draft; returns what `commit` must know of them."""
    draft.mkdir(exist_ok=True)
    files: dict[str, Any] = {}
    tensors: dict[str, dict[str, list[int]]] = {}
    for kind in sorted({piece.file for piece in pieces}):
        mine = [piece for piece in pieces if piece.file == kind]
        name = f"{kind}-{rank:05d}.safetensors"
        files[name] = _write_file(draft / name, mine)
        tensors[kind] = {piece.name: list(piece.shape) for piece in mine}
    return {"files": files, "tensors": tensors}


def _write_file(path: Path, pieces: Sequence[Piece]) -> dict[str, Any]:
    """A safetensors file, hashed while it is written: neither holds the interpreter lock, and nothing is read back."""
    header, end = {}, 0
    for piece in pieces:
        begin, end = end, end + 4 * piece.data.numel()
        whole = piece.data.numel() == piece.shape.numel()
        key, shape = (piece.name, piece.shape) if whole else (f"{piece.name}@{piece.offset}", piece.data.shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for content in (memoryview(struct.pack("<Q", len(head)) + head), *(_raw(piece.data) for piece in pieces)):
            for start in range(0, len(content), CHUNK):
                chunk = content[start : start + CHUNK]
                digest.update(chunk)
                size += len(chunk)
                while chunk:
                    chunk = chunk[os.write(descriptor, chunk) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": digest.hexdigest()}


def _raw(data: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in the host's memory."""
    return memoryview(data.numpy().view("uint8").data)


def commit(
    root: Path, draft: Path, step: int, reports: Iterable[Mapping[str, Any]], about: Mapping[str, Any]
) -> tuple[Path, int]:
    """Make a checkpoint of a draft to which all writers have written; returns its path and bytes.

    `about` goes into the manifest as it is. A checkpoint of the same step is replaced.
    """
    files: dict[str, Any] = {}
    tensors: dict[str, dict[str, list[int]]] = {}
    for report in reports:
        files |= report["files"]
        for kind, named in report["tensors"].items():
            tensors.setdefault(kind, {}).update(named)
    manifest = {"step": step, "files": files, "tensors": tensors, **about}
    index(draft, manifest)  # headers only: no checkpoint is better than one with a hole
    raw, seal = encode(manifest)
    write_small(draft / MANIFEST, raw)
    write_small(draft / SEAL, seal)
    path = root / folder_name(step)
    publish(draft, path)
    return path, len(raw) + sum(entry["size"] for entry in files.values())


@torch.no_grad()
def load(found: Verified | None, pieces: Sequence[Piece], group: Group | None = None) -> None:
    """Bring a verified checkpoint (on rank 0; None elsewhere) into the pieces of all ranks.

    Of the checkpoint's kinds those are read that rank 0 has pieces of. Raises `Damaged` where it is another model's.
    """
    plan: dict[str, Any] = {}
    if found is not None:
        kinds = {piece.file for piece in pieces}
        plan = {kind: named for kind, named in found.manifest["tensors"].items() if kind in kinds}
    plan = json.loads(_broadcast(json.dumps(plan).encode(), group))
    own = 0
    for piece in pieces:
        shape = plan.get(piece.file, {}).get(piece.name)
        if shape != list(piece.shape):
            there = "is not in it" if shape is None else f"is {tuple(shape)} instead of {tuple(piece.shape)}"
            raise Damaged(f"the checkpoint belongs to another model ({piece.file} {piece.name} {there})")
        own += piece.data.numel() if found is not None or not piece.replicated else 0
    count = torch.tensor(own)
    if group is not None:
        count = group.all_reduce(count)
    if count.item() != sum(math.prod(shape) for named in plan.values() for shape in named.values()):
        raise Damaged("the checkpoint belongs to another model (it holds more than this one has)")
    with contextlib.ExitStack() as stack:
        names = found.manifest["files"] if found is not None else ()
        files = {name: stack.enter_context(safe_open(found.path / name, framework="pt")) for name in names}  # type: ignore[union-attr]
        for kind, named in sorted(plan.items()):
            for name, shape in sorted(named.items()):
                whole = torch.empty(math.prod(shape), device="cpu" if group is None else group.wire)
                for part in found.parts[kind, name] if found is not None else ():
                    whole[part.offset : part.offset + part.count] = files[part.file].get_tensor(part.key).view(-1)
                if group is not None:
                    group.broadcast(whole)
                for piece in pieces:
                    if (piece.file, piece.name) == (kind, name):
                        piece.data.copy_(whole[piece.offset : piece.offset + piece.data.numel()])


def state_sha256(step: int, pieces: Sequence[Piece], group: Group) -> str:
    """One digest of weights, optimizer state and step: names, shapes and bytes, sorted by name.

    All ranks call it and rank 0 has the digest (the others ''). Where the state is cut up, one tensor at a time is put
    together: each rank adds its elements' bits to zeros, as integers, which changes no bit.
    """
    digest = hashlib.sha256(f"step {step}\n".encode())
    mine = [(piece.file, piece.name, list(piece.shape), piece.replicated) for piece in pieces]
    table: dict[tuple[str, str], tuple[list[int], bool]] = {}
    for rank in range(group.world):
        for file, name, shape, replicated in json.loads(_broadcast(json.dumps(mine).encode(), group, rank)):
            table[file, name] = (shape, replicated and table.get((file, name), (shape, True))[1])
    for (file, name), (shape, replicated) in sorted(table.items()):
        if replicated and group.rank != 0:
            continue
        whole = torch.zeros(math.prod(shape), dtype=torch.int32, device=group.wire)
        for piece in pieces:
            if (piece.file, piece.name) == (file, name) and (group.rank == 0 or not piece.replicated):
                whole[piece.offset : piece.offset + piece.data.numel()] = piece.data.view(torch.int32)
        if not replicated:
            whole = group.all_reduce(whole)
        digest.update(f"{file} {name} torch.float32 {shape}\n".encode())
        digest.update(_raw(whole.cpu()))
    return digest.hexdigest() if group.rank == 0 else ""


def _broadcast(content: bytes, group: Group | None, source: int = 0) -> bytes:
    if group is None or group.world == 1:
        return content
    size = group.broadcast(torch.tensor(len(content)), source).item()
    buffer = torch.zeros(size, dtype=torch.uint8)
    if group.rank == source:
        buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return bytes(group.broadcast(buffer, source).numpy())
