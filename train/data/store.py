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

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from train import locks
from train.checks import Refused
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


def seal(path: Path, raw: bytes) -> None:
    """Write a file with its sha256 beside it, the file last, each all at once."""
    for target, content in ((path.with_suffix(".sha256"), hashlib.sha256(raw).hexdigest().encode()), (path, raw)):
        temporary = target.with_name(f".{target.name}")
        temporary.write_bytes(content)
        sync(temporary)
        temporary.rename(target)
    sync(path.parent)


def unseal(path: Path, expected: str | None = None) -> dict[str, Any]:
    """Read JSON that `seal` wrote. Raises Refused if it is missing, damaged or another than the sha256 `expected`."""
    try:
        raw, beside = path.read_bytes(), path.with_suffix(".sha256").read_text()
    except (OSError, UnicodeDecodeError):
        raise _damaged(path, "is missing") from None
    if not hashlib.sha256(raw).hexdigest() == beside == (expected or beside):
        raise _damaged(path, "is damaged or was changed")
    return cast("dict[str, Any]", json.loads(raw))


def _damaged(path: Path, what: str) -> Refused:
    store = next((p for p in path.parents if p.parent.name == "stores"), path.parent)
    return Refused(str(path), f"{what}: delete {store} and run again, and it is prepared anew")


def lock(folder: Path) -> int | None:
    """Take the lock of a store without waiting: a descriptor that holds it until it is closed, or None."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return locks.take(folder.with_suffix(".lock"))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a store, after waiting for however long somebody else keeps it."""
    while (held := lock(folder)) is None:
        time.sleep(0.05)
    try:
        yield
    finally:
        os.close(held)


def why(folder: Path) -> str:
    """What ended the background preparation of a store, in its own words."""
    error = folder / "error.txt"
    return error.read_text().strip() if error.exists() else "it ended without a word"


def blocks(path: Path) -> Iterator[bytes]:
    """A file, cut as its digests cut it."""
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            yield block


def shard_folder(folder: Path, index: int) -> Path:
    """Where a shard of a store lies, once it is there."""
    return folder / f"shard-{index:05d}"


class Shard:
    """One split of a shard: `size` tokens in a file, and where each document ends."""

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        self.part: dict[str, Any] = manifest[split]
        self.path = Path(self.part["file"] or folder / f"{split}.bin")
        self.size: int = self.part["tokens"]
        self.dtype = np.dtype(manifest["dtype"])
        self.checked = np.zeros(len(self.part["blocks"]), dtype=bool)
        self._expect(self.path, self.size * self.dtype.itemsize)
        # An empty file cannot be mapped.
        self.tokens: npt.NDArray[Any] = np.memmap(self.path, self.dtype, "r") if self.size else np.zeros(0, self.dtype)

    def _expect(self, path: Path, size: int) -> None:
        if not path.is_file():
            raise self._bad(path, "is missing")
        if path.stat().st_size != size:
            raise self._bad(path, f"has {path.stat().st_size:,} bytes instead of {size:,}")

    def _bad(self, path: Path, what: str) -> Refused:
        """Our own files are made anew; of a user's file (data=bin) we can only say that it is not what it was."""
        given = Refused(str(path), f"{what} since it was prepared: restart the run")
        return given if self.part["file"] else _damaged(path, what)

    def read(self, start: int, stop: int) -> Ints:
        """Tokens [start, stop) as int64, verified."""
        self.verify(start, stop)
        return self.tokens[start:stop].astype(np.int64)

    def verify(self, start: int, stop: int) -> None:
        """Check the blocks that tokens [start, stop) lie in, each of them once."""
        per_block = BLOCK // self.dtype.itemsize
        for block in range(start // per_block, -(-stop // per_block)):
            if not self.checked[block]:
                found = hashlib.sha256(self.tokens[block * per_block : (block + 1) * per_block].data).hexdigest()
                if found != self.part["blocks"][block]:
                    raise self._bad(self.path, f"is damaged in MiB {block}")
                self.checked[block] = True

    def index(self) -> tuple[Ints, Ints] | None:
        """(ends, bytes), each (documents,): where documents end, in tokens, and their UTF-8 bytes. None: unknown."""
        if self.part["docs_sha256"] is None:
            return None
        path = self.path.with_suffix(".docs")
        self._expect(path, 16 * self.part["documents"])
        raw = path.read_bytes()
        if hashlib.sha256(raw).hexdigest() != self.part["docs_sha256"]:
            raise self._bad(path, "is damaged or was changed")
        ends, sizes = np.frombuffer(raw, dtype="<u8").astype(np.int64).reshape(-1, 2).T
        return ends, sizes


class Store:
    """The shards of one split that are there; `wait(i)` waits for one that is still being prepared.

    It gives up when nobody prepares it, unless there is `waits`, which it calls meanwhile.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder, self.split = Path(folder), split
        self.shards: list[Shard] = []
        self.last = False  # the last shard has been seen
        self.waits: Callable[[], object] | None = None  # of a run, whose supervisor sees to it that shards come
        if (self.folder / "complete.json").exists():
            for digest in unseal(self.folder / "complete.json")["manifests"]:
                self._next(digest)
            if sum(shard.size * shard.dtype.itemsize for shard in self.shards) <= WHOLE:
                for shard in self.shards:
                    shard.verify(0, shard.size)

    def wait(self, index: int) -> bool:
        """Whether there is such a shard, once it can be known. Raises Refused if nobody is preparing it."""
        while index >= len(self.shards) and not self.last:
            folder = shard_folder(self.folder, len(self.shards))
            if folder.exists():
                self._next()
            elif self.waits is not None:
                self.waits()
                time.sleep(0.1)
            elif (free := lock(self.folder)) is None:
                time.sleep(0.1)
            else:
                os.close(free)
                if not folder.exists():  # it may have come, and its writer gone, a moment ago
                    stopped = f"will not come, its preparation has stopped ({why(self.folder)})"
                    raise Refused(str(folder), f"{stopped}: start the run again")
        return index < len(self.shards)

    def _next(self, expected: str | None = None) -> None:
        folder = shard_folder(self.folder, len(self.shards))
        manifest = unseal(folder / "manifest.json", expected)
        self.shards.append(Shard(folder, self.split, manifest))
        self.last = manifest["last"]


class Writer:
    """Writes one shard of a store (both splits) and publishes it all at once."""

    def __init__(self, folder: Path, index: int, dtype: np.dtype[Any]) -> None:
        self.folder, self.index, self.dtype = folder, index, dtype
        self.temporary = folder / f".shard-{index:05d}"
        shutil.rmtree(self.temporary, ignore_errors=True)  # of a writer that died: we hold the lock
        self.temporary.mkdir(parents=True)
        names = [f"{split}.{kind}" for split in SPLITS for kind in ("bin", "docs")]
        self.files = {name: (self.temporary / name).open("wb") for name in names}
        self.counts = {split: {"tokens": 0, "documents": 0, "bytes": 0} for split in SPLITS}
        self.skipped = 0  # documents that are not UTF-8

    def add(self, split: str, tokens: npt.ArrayLike, size: int) -> None:
        """A document: its tokens, the end-of-document token included, and its UTF-8 bytes (0 where it is no text)."""
        array, counts = np.asarray(tokens, dtype=self.dtype), self.counts[split]
        counts["tokens"] += array.size
        counts["documents"] += 1
        counts["bytes"] += size
        self.files[f"{split}.bin"].write(array.tobytes())
        self.files[f"{split}.docs"].write(np.array([counts["tokens"], size], dtype="<u8").tobytes())

    def publish(self, *, last: bool, next_document: tuple[int, int], given: dict[str, Any] | None = None) -> None:
        """Seal the manifest and give the folder the name under which readers look for it.

        `given` are entries, by split, for a user's own files: they take the place of what was written, nothing.
        """
        for name, file in self.files.items():
            file.close()
            sync(self.temporary / name)
        parts = {}
        for split, counts in self.counts.items():
            digests = [hashlib.sha256(block).hexdigest() for block in blocks(self.temporary / f"{split}.bin")]
            documents = hashlib.sha256((self.temporary / f"{split}.docs").read_bytes()).hexdigest()
            parts[split] = {"file": None, **counts, "blocks": digests, "docs_sha256": documents}
        head = {"format": FORMAT, "index": self.index, "last": last, "next": next_document, "skipped": self.skipped}
        manifest = head | {"dtype": self.dtype.str} | parts | (given or {})
        seal(self.temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
        self.temporary.rename(shard_folder(self.folder, self.index))
        sync(self.folder)


def manifests(folder: Path) -> list[dict[str, Any]]:
    """The manifests of the shards that are there, from the first one on."""
    found: list[dict[str, Any]] = []
    while (shard := shard_folder(folder, len(found))).exists():
        found.append(unseal(shard / "manifest.json"))
    return found


def close(folder: Path) -> None:
    """Declare a store complete: from now on a missing or exchanged shard is seen when it is opened."""
    sealed = [path.read_text() for path in sorted(folder.glob("shard-*/manifest.sha256"))]
    seal(folder / "complete.json", json.dumps({"manifests": sealed}, indent=1).encode())
