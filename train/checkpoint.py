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

from train.data.store import sync
from train.flat import Piece
from train.group import Group
from train.manifest import CHUNK, MANIFEST, SEAL, Damaged, Verified, encode, folder_name, index, publish
from train.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def deal(pieces: Iterable[Piece], rank: int, writers: Sequence[int]) -> list[Piece]:
    """The pieces that `rank` writes, as all ranks know: what only it has, and by size its share of the rest."""
    mine, load = [], dict.fromkeys(writers, 0)
    for piece in sorted(pieces, key=lambda piece: (-piece.data.numel(), piece.file, piece.name, piece.offset)):
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

    def holds(self, pieces: Sequence[Piece]) -> bool:
        """Whether there is room for them."""
        return sum(piece.data.numel() for piece in pieces) <= self._buffer.numel()

    def take(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same pieces with their data in the buffer; returns when the copy is done."""
        sizes = [piece.data.numel() for piece in pieces]
        views = torch.split(self._buffer[: sum(sizes)], sizes)
        for piece, view in zip(pieces, views, strict=True):
            view.copy_(piece.data, non_blocking=True)
        if self._buffer.is_pinned():
            torch.cuda.current_stream().synchronize()
        return [replace(piece, data=view) for piece, view in zip(pieces, views, strict=True)]


def write(draft: Path, rank: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Write one rank's files (pieces in the host's memory) into a draft; returns what `commit` must know of them."""
    draft.mkdir(exist_ok=True)
    report: dict[str, Any] = {"files": {}, "tensors": {}}
    for kind in sorted({piece.file for piece in pieces}):
        mine = [piece for piece in pieces if piece.file == kind]
        name = f"{kind}-{rank:05d}.safetensors"
        report["files"][name] = _write_file(draft / name, mine)
        report["tensors"][kind] = {piece.name: list(piece.shape) for piece in mine}
    return report


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
    """Make a checkpoint of a draft to which all have written, in place of one of that step; its path and bytes."""
    manifest: dict[str, Any] = {"step": step, "files": {}, "tensors": {}, **about}
    for report in reports:
        manifest["files"] |= report["files"]
        for kind, named in report["tensors"].items():
            manifest["tensors"].setdefault(kind, {}).update(named)
    index(draft, manifest)  # headers only: no checkpoint is better than one with a hole
    raw, seal = encode(manifest)
    for name, content in ((MANIFEST, raw), (SEAL, seal)):
        (draft / name).write_bytes(content)
        sync(draft / name)
    path = root / folder_name(step)
    publish(draft, path)
    return path, len(raw) + sum(entry["size"] for entry in manifest["files"].values())


@torch.no_grad()
def load(found: Verified | None, pieces: Sequence[Piece], group: Ranks = ALONE) -> None:
    """Bring a verified checkpoint (on rank 0; None elsewhere) into the pieces of all ranks.

    Of the checkpoint's kinds those are read that there are pieces of. Raises `Damaged` where it is another model's.
    """
    here, held = _tensors(pieces, group), {} if found is None else found.manifest["tensors"]
    there = {(kind, name): shape for kind, named in _broadcast(held, group).items() for name, shape in named.items()}
    kinds = {kind for kind, _ in here}
    for kind, name in sorted(here.keys() | there.keys()):
        wanted, stored = here.get((kind, name), "absent"), there.get((kind, name), "absent")
        if kind in kinds and wanted != stored:
            raise Damaged(f"the checkpoint belongs to another model ({kind} {name}: {stored} in it, {wanted} here)")
    files: dict[str, Any] = {}
    if found is not None:
        files = {name: safe_open(found.path / name, framework="pt") for name in found.manifest["files"]}
    for key, shape in sorted(here.items()):
        whole = torch.empty(math.prod(shape), device=group.wire)
        for part in () if found is None else found.parts[key]:
            whole[part.offset : part.offset + part.count] = files[part.file].get_tensor(part.key).view(-1)
        group.broadcast(whole)
        for piece in pieces:
            if (piece.file, piece.name) == key:
                piece.data.copy_(whole[piece.offset : piece.offset + piece.data.numel()])


def state_sha256(step: int, pieces: Sequence[Piece], group: Group) -> str:
    """One digest of weights, optimizer state and step: names, shapes and bytes, sorted by name.

    All ranks call it and rank 0 has the digest (the others ''). Where the state is cut up, one tensor at a time is put
    together: each rank adds its elements' bits to zeros, as integers, which changes no bit.
    """
    digest = hashlib.sha256(f"step {step}\n".encode())
    for (kind, name), shape in sorted(_tensors(pieces, group).items()):
        mine = [piece for piece in pieces if (piece.file, piece.name) == (kind, name)]
        replicated = any(piece.replicated for piece in mine)
        if replicated and group.rank != 0:
            continue
        whole = torch.zeros(math.prod(shape), dtype=torch.int32, device=group.wire)
        for piece in mine:
            whole[piece.offset : piece.offset + piece.data.numel()] = piece.data.view(torch.int32)
        if not replicated:
            whole = group.all_reduce(whole)
        digest.update(f"{kind} {name} torch.float32 {shape}\n".encode())
        digest.update(_raw(whole.cpu()))
    return digest.hexdigest() if group.rank == 0 else ""


def _tensors(pieces: Sequence[Piece], group: Ranks) -> dict[tuple[str, str], list[int]]:
    """The shape of each tensor that any rank has pieces of, by kind and name."""
    mine = [(piece.file, piece.name, list(piece.shape)) for piece in pieces]
    by_rank = [_broadcast(mine, group, rank) for rank in range(group.world)]
    return {(kind, name): shape for found in by_rank for kind, name, shape in found}


def _broadcast(value: Any, group: Ranks, source: int = 0) -> Any:
    """The value of rank `source`, on all ranks, by way of JSON."""
    sent = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = group.broadcast(torch.tensor(len(sent)), source).item()
    buffer = sent if group.rank == source else torch.zeros(size, dtype=torch.uint8)
    return json.loads(bytes(group.broadcast(buffer, source).numpy()))
