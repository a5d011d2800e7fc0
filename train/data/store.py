"""Tokens on disk, memory-mapped, every one of them verified before it is used.

A store is a folder of shards, and a shard a folder that appears all at once (written under another name, flushed,
renamed). Its manifest holds the sha256 of every MiB of tokens; a MiB is checked when it is first touched, so opening
a store of a terabyte costs nothing and yet no flipped bit reaches the model. The manifest's own sha256 stands beside
it. The last shard says that it is the last: until it is there, the store is still growing, and whoever needs a later
shard waits for it, for as long as somebody holds the lock that belongs to writing one.

    <store>.lock                    held by whoever is preparing
    <store>/shard-00000/            manifest.json + .sha256, <split>.bin (tokens, uint16 or uint32),
                                    <split>.docs (uint64 pairs: end of document in tokens, its UTF-8 bytes)
    <store>/complete.json + .sha256 written after the last shard: the sha256 of all manifests
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from train.config import Refused
from train.data.order import Ints

FORMAT = 1
BLOCK = 1 << 20  # bytes under one digest; a sha256 of so many takes about a millisecond
SPLITS = ("train", "validation")
WHOLE = 1 << 30  # bytes: stores up to this are verified whole when they are opened


def token_type(vocab: int) -> np.dtype[Any]:
    """The smallest little-endian type that holds every id."""
    return np.dtype("<u2" if vocab <= 1 << 16 else "<u4")


def digest(*values: Any) -> str:
    """The sha256 of anything that JSON can spell: what stores and tokenizers are named by."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(path: Path, value: dict[str, Any]) -> None:
    """Write JSON with its sha256 beside it, the JSON last, each all at once."""
    raw = json.dumps(value, indent=1).encode()
    for target, content in ((path.with_suffix(".sha256"), hashlib.sha256(raw).hexdigest().encode()), (path, raw)):
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.write_bytes(content)
        sync(temporary)
        temporary.rename(target)
    sync(path.parent)


def unseal(path: Path) -> dict[str, Any]:
    """Read what `seal` wrote. Raises Refused naming the file if it is missing, damaged or changed."""
    try:
        raw, sealed = path.read_bytes(), path.with_suffix(".sha256").read_text()
    except (OSError, UnicodeDecodeError):
        raise _damaged(path, "is missing") from None
    if hashlib.sha256(raw).hexdigest() != sealed:
        raise _damaged(path, "is damaged or was changed")
    return cast("dict[str, Any]", json.loads(raw))


def _damaged(path: Path, what: str) -> Refused:
    store = next((p for p in path.parents if p.parent.name == "stores"), path.parent)
    return Refused(str(path), f"{what}: delete {store} and run again, and it is prepared anew")


def lock(folder: Path) -> int | None:
    """Take the lock of a store without waiting: a descriptor that holds it until it is closed, or None."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def wait(folder: Path) -> int:
    """Take the lock of a store, however long its holder keeps it."""
    while (held := lock(folder)) is None:
        time.sleep(0.05)
    return held


class Shard:
    """One split of a shard: `size` tokens in a file, and where each document ends."""

    def __init__(self, path: Path, part: dict[str, Any], dtype: np.dtype[Any], own: bool) -> None:
        self.path, self.part, self.dtype, self.own = path, part, dtype, own
        self.size: int = part["tokens"]
        self.documents: int = part["documents"]
        self.checked = np.zeros(len(part["blocks"]), dtype=bool)
        self._expect(path, self.size * dtype.itemsize)
        mapped = np.memmap(path, dtype=dtype, mode="r") if self.size else np.zeros(0, dtype)
        self.tokens: npt.NDArray[Any] = mapped

    def _expect(self, path: Path, size: int) -> None:
        if not path.is_file():
            raise self._bad(path, "is missing")
        if path.stat().st_size != size:
            raise self._bad(path, f"has {path.stat().st_size:,} bytes instead of {size:,}")

    def _bad(self, path: Path, what: str) -> Refused:
        """Our own files are made anew; of a user's file (data=bin) we can only say that it is not what it was."""
        return (
            _damaged(path, what) if self.own else Refused(str(path), f"{what} since it was prepared: restart the run")
        )

    def read(self, start: int, stop: int) -> Ints:
        """Tokens [start, stop) as int64, after every block that they lie in has been verified once."""
        width = self.dtype.itemsize
        for block in range(start * width // BLOCK, -(-stop * width // BLOCK)):
            if not self.checked[block]:
                self._check(block)
        return self.tokens[start:stop].astype(np.int64)

    def _check(self, block: int) -> None:
        count = BLOCK // self.dtype.itemsize
        found = hashlib.sha256(self.tokens[block * count : (block + 1) * count].data).hexdigest()
        if found != self.part["blocks"][block]:
            raise self._bad(self.path, f"is damaged in MiB {block}")
        self.checked[block] = True

    def verify(self) -> None:
        """Check every block that has not been checked yet."""
        for block in np.flatnonzero(~self.checked):
            self._check(int(block))

    def index(self) -> tuple[Ints, Ints] | None:
        """(ends, bytes), each (documents,): where documents end, in tokens, and their UTF-8 bytes. None: unknown."""
        if self.part["docs_sha256"] is None:
            return None
        path = self.path.with_suffix(".docs")
        self._expect(path, 16 * self.documents)
        raw = path.read_bytes()
        if hashlib.sha256(raw).hexdigest() != self.part["docs_sha256"]:
            raise self._bad(path, "is damaged or was changed")
        pairs = np.frombuffer(raw, dtype="<u8").astype(np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]


class Store:
    """The shards of one split. `shard(i)` waits for a shard that is still being prepared."""

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder, self.split = Path(folder), split
        self.shards: list[Shard] = []
        self.complete = False  # the last shard has been seen
        self.manifests: list[str] | None = None
        if (self.folder / "complete.json").exists():
            self.manifests = unseal(self.folder / "complete.json")["manifests"]
            while not self.complete:
                self.shard(len(self.shards))
            if sum(shard.size * shard.dtype.itemsize for shard in self.shards) <= WHOLE:
                self.verify()

    def shard(self, index: int) -> Shard | None:
        """The shard, once it is there; None behind the last one. Raises Refused if nobody is preparing it."""
        while index >= len(self.shards) and not self.complete:
            self._next()
        return self.shards[index] if index < len(self.shards) else None

    def _next(self) -> None:
        folder = self.folder / f"shard-{len(self.shards):05d}"
        while not folder.exists():
            if self.manifests is not None:
                raise _damaged(folder, "is missing")
            self._alive(folder)
            time.sleep(0.1)
        manifest = unseal(folder / "manifest.json")
        if self.manifests is not None:
            raw = (folder / "manifest.json").read_bytes()
            if self.manifests[len(self.shards)] != hashlib.sha256(raw).hexdigest():
                raise _damaged(folder / "manifest.json", "is damaged or was changed")
        if manifest["format"] != FORMAT or manifest["index"] != len(self.shards):
            raise _damaged(folder / "manifest.json", "belongs to another store")
        part = manifest[self.split]
        path = Path(part["file"]) if part["file"] else folder / f"{self.split}.bin"
        self.shards.append(Shard(path, part, np.dtype(manifest["dtype"]), own=not part["file"]))
        self.complete = manifest["last"]

    def _alive(self, folder: Path) -> None:
        """Raise if the shard is not there and nobody is at work on it."""
        descriptor = lock(self.folder)
        if descriptor is None:
            return
        os.close(descriptor)
        if not folder.exists():  # it may have come, and its writer gone, a moment ago
            error = self.folder / "error.txt"
            why = error.read_text().strip() if error.exists() else "it ended without a word"
            raise Refused(str(folder), f"will not come, its preparation has stopped ({why}): start the run again")

    def verify(self) -> None:
        """Check every block of the shards that are there."""
        for shard in self.shards:
            shard.verify()


class Part:
    """One split of a shard while it is written: tokens, documents and the digests of its blocks."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any]) -> None:
        self.dtype, self.tokens, self.bytes, self.documents = dtype, 0, 0, 0
        self.paths = folder / f"{split}.bin", folder / f"{split}.docs"
        self.data, self.docs = (path.open("wb") for path in self.paths)
        self.blocks: list[str] = []
        self.block, self.filled = hashlib.sha256(), 0
        self.docs_hash = hashlib.sha256()

    def add(self, tokens: npt.ArrayLike, size: int) -> None:
        """A document: its tokens, the end-of-document token included, and its UTF-8 bytes (0 where it is no text)."""
        array = np.asarray(tokens, dtype=self.dtype)
        view = memoryview(array.tobytes())
        self.data.write(view)
        while view:
            room = BLOCK - self.filled
            self.block.update(view[:room])
            self.filled += len(view[:room])
            view = view[room:]
            if self.filled == BLOCK:
                self._close_block()
        self.tokens += array.size
        self.bytes += size
        self.documents += 1
        entry = np.array([self.tokens, size], dtype="<u8").tobytes()
        self.docs.write(entry)
        self.docs_hash.update(entry)

    def _close_block(self) -> None:
        self.blocks.append(self.block.hexdigest())
        self.block, self.filled = hashlib.sha256(), 0

    def finish(self) -> dict[str, Any]:
        if self.filled:
            self._close_block()
        for stream in (self.data, self.docs):
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        counts = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}
        return {"file": None, **counts, "blocks": self.blocks, "docs_sha256": self.docs_hash.hexdigest()}


class Writer:
    """Writes one shard of a store (both splits) and publishes it all at once."""

    def __init__(self, folder: Path, index: int, dtype: np.dtype[Any]) -> None:
        self.folder, self.index, self.dtype = folder, index, dtype
        self.temporary = folder / f".shard-{index:05d}"
        shutil.rmtree(self.temporary, ignore_errors=True)  # of a writer that died: we hold the lock
        self.temporary.mkdir(parents=True)
        self.train, self.validation = (Part(self.temporary, split, dtype) for split in SPLITS)
        self.skipped = 0  # documents that are not UTF-8

    def publish(self, *, last: bool, next_document: tuple[int, int]) -> None:
        parts = {"train": self.train.finish(), "validation": self.validation.finish()}
        head = {"format": FORMAT, "index": self.index, "last": last, "next": next_document, "skipped": self.skipped}
        place(self.temporary, self.folder, {**head, "dtype": self.dtype.str, **parts})


def place(temporary: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Seal a shard's manifest and give its folder the name under which readers look for it."""
    seal(temporary / "manifest.json", manifest)
    temporary.rename(folder / f"shard-{manifest['index']:05d}")
    sync(folder)


def manifests(folder: Path) -> list[dict[str, Any]]:
    """The manifests of the shards that are there, from the first one on."""
    found: list[dict[str, Any]] = []
    while (folder / f"shard-{len(found):05d}").exists():
        found.append(unseal(folder / f"shard-{len(found):05d}" / "manifest.json"))
    return found


def close(folder: Path) -> None:
    """Declare a store complete: from now on a missing or exchanged shard is seen when it is opened."""
    paths = sorted(folder.glob("shard-*/manifest.json"))
    seal(folder / "complete.json", {"manifests": [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]})
