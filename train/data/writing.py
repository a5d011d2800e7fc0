"""The writing of stores: from a job, by whichever process, in the foreground or behind.

A shard appears all at once and says where in the corpus the next one begins, so work that was interrupted goes on
where it stopped, and two processes that write the same store one after the other write one.

A dataset too large to wait for is prepared in the background. The lock passes to the child with its open file, so
there is no moment at which nobody holds it, and it is free when the child is gone, however it went: that is how those
who wait for a shard know whether it will come.

A store's validation set must not grow while training is evaluated on it: for `hf` it is the held-out documents of
the first shard. Those of later shards are dropped, and so are never trained on either.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from train.checks import Refused
from train.config import Source
from train.data import store
from train.data.corpus import Document, File, Progress, documents, held_out
from train.data.order import keys, scramble
from train.data.store import digest
from train.data.tokenizer import Tokenizer
from train.events import Warned

BATCH_BYTES, BATCH_DOCUMENTS = 1 << 20, 512  # tokenized at once: bounds memory, and keeps the cores busy
RANDOM_DOCUMENT = 1024  # tokens, the end-of-document token included
PAUSE, TRIES = 5.0, 5  # seconds after a failure, four times as many after the next; so many in a row are hopeless


def quiet(stage: str, done: int, total: int) -> None:
    """Progress that nobody looks at: `done` of `total` bytes of a stage (digest, tokenizer, tokenize, wait)."""


@dataclass(slots=True, kw_only=True)
class Job:
    """What it takes to write one store, in whichever process."""

    folder: str
    tokenizer: str
    files: list[File]  # none: random tokens
    field: str
    prompt_field: str
    validation: float
    shard_tokens: int
    growing: bool  # hf: start when the first shard is ready
    seed: int
    synthetic_tokens: int


@dataclass(slots=True)
class Work:
    """A store of which shards are still to come, and who writes them."""

    job: Job
    process: subprocess.Popen[bytes] | None  # of ours; None: another run's, or nobody for a while
    failures: int = 0  # since there was a new shard
    shards: int = 0  # at the last of them
    due: float = 0.0  # when it may be begun again


class Preparer:
    """The background processes that write the shards still to come. They end by themselves when their parent does."""

    def __init__(self, works: list[Work]) -> None:
        self.works = works

    def poll(self, warn: Callable[[dict[str, Any]], object]) -> str | None:
        """See that all shards are written, also those that another run has left; one line where there is no hope."""
        for work in self.works:
            folder, failed = Path(work.job.folder), ""
            if (folder / "complete.json").exists():
                continue
            try:
                if work.process is None and time.monotonic() > work.due and (held := store.lock(folder)) is not None:
                    with os.fdopen(held):
                        work.process = _background(work.job, held)
                elif work.process is not None and work.process.poll():
                    work.process.communicate()
                    failed = store.why(folder)
            except OSError as error:  # a full disk, or too many processes
                failed = str(error)
            if failed:
                shards = len(list(folder.glob("shard-*")))
                work.failures, work.shards = work.failures + 1 if shards == work.shards else 1, shards
                pause = PAUSE * 4 ** (work.failures - 1)
                work.process, work.due = None, time.monotonic() + pause
                failed = f"preparing {folder} has failed: {failed}"
                if work.failures >= TRIES:
                    return failed
                warn(Warned(rank=0, text=f"{failed}; begun again in {pause:g} s").record())
        return None

    def stop(self) -> None:
        for process in (work.process for work in self.works if work.process is not None):
            process.kill()  # whatever it was writing is not yet a shard
            process.communicate()


def write_store(job: Job, progress: Progress) -> subprocess.Popen[bytes] | None:
    """Write a store, or find it; where it is `growing`, return when its first shard is there."""
    folder, patience = Path(job.folder), 20
    while not (folder / "complete.json").exists():
        held = store.lock(folder)
        if held is None:
            # Those who wait for a shard try the lock for an instant: only a lock that stays taken has an owner.
            patience -= 1
            if job.growing and patience < 0 and (folder / "shard-00000").exists():
                return None
            progress("wait", 0, 0)
            time.sleep(0.05)
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not write_shards(job, job.growing, progress):
                return _background(job, held)
        finally:
            os.close(held)
    return None


def _background(job: Job, held: int) -> subprocess.Popen[bytes]:
    (Path(job.folder) / "error.txt").unlink(missing_ok=True)
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-c", "from train.data.writing import background; background()"],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=(held,),  # and with it the lock
        start_new_session=True,  # Ctrl-C is for the parent to interpret
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
    process.stdin.flush()  # and left open, for as long as we live
    return process


def background() -> None:
    """The life of the background process: write the shards that are missing, unless the parent dies first."""
    value = json.loads(sys.stdin.readline())
    job = Job(**{**value, "files": [File(**file) for file in value["files"]]})

    def follow() -> None:
        os.read(sys.stdin.fileno(), 1)  # returns when the parent's end is closed
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    try:
        write_shards(job, False, quiet)
    except Exception as error:
        (Path(job.folder) / "error.txt").write_text(" ".join(f"{type(error).__name__}: {error}".split()))
        sys.exit(1)


Place = tuple[int, int]  # in the corpus: a file, a document of it
Item = tuple[Place, str | None, Any, int]  # place, split (None: not UTF-8), tokens, UTF-8 bytes without the prompt


def write_shards(job: Job, first_only: bool, progress: Progress) -> bool:
    """Write the shards of a store that are missing, or but the first; whether it is complete. The lock is held."""
    folder = Path(job.folder)
    have = store.manifests(folder)
    if not have or not have[-1]["last"]:
        if have and first_only:
            return False
        tokenizer = Tokenizer.load(job.tokenizer)
        start: Place = tuple(have[-1]["next"]) if have else (0, 0)
        ids = tokenizer.vocab * (2 if job.prompt_field else 1)
        writer = store.Writer(folder, len(have), store.token_type(ids))
        for place, split, tokens, size in (_tokenized if job.files else _random)(job, tokenizer, start, progress):
            if split is None:
                writer.skipped += 1
            elif split == "train":
                written = writer.counts[split]["tokens"]
                if written and written + len(tokens) > job.shard_tokens:
                    writer.publish(last=False, next_document=place)
                    if first_only:
                        return False
                    writer = store.Writer(folder, writer.index + 1, writer.dtype)
                writer.add(split, tokens, size)
            elif not (job.growing and writer.index):
                writer.add(split, tokens, size)
        writer.publish(last=True, next_document=(len(job.files), 0))
    store.close(folder)
    return True


def _tokenized(job: Job, tokenizer: Tokenizer, start: Place, progress: Progress) -> Iterator[Item]:
    """Documents from `start` on, each with its end-of-document token. Those of prompts are stored as id + vocab."""
    total, done = sum(file.size for file in job.files), sum(file.size for file in job.files[: start[0]])
    for batch in _batches(job, start):
        done += sum(len(raw or b"") for _, raw in batch)
        progress("tokenize", min(done, total), total)  # packed files hold more than their size
        known = [raw for _, raw in batch if raw is not None]
        ids = tokenizer.encode_batch([raw[raw.prompt :].decode() for raw in known])
        prompts = tokenizer.encode_batch([raw[: raw.prompt].decode() for raw in known if raw.prompt])
        for place, raw in batch:
            if raw is None:
                yield place, None, [], 0
            else:
                split = "validation" if held_out(raw, job.validation) else "train"
                prompt = [token + tokenizer.vocab for token in prompts.pop(0)] if raw.prompt else []
                yield place, split, [*prompt, *ids.pop(0), tokenizer.eot], len(raw) - raw.prompt
    progress("tokenize", total, total)


def _batches(job: Job, start: Place) -> Iterator[list[tuple[Place, Document | None]]]:
    """The places and bytes of documents from `start` on, without empty ones, in batches of bounded size."""
    batch: list[tuple[Place, Document | None]] = []
    size = 0
    for f in range(start[0], len(job.files)):
        skip = start[1] if f == start[0] else 0
        for d, raw in islice(enumerate(documents(job.files[f], job.field, job.prompt_field)), skip, None):
            if raw != b"":
                batch.append(((f, d), raw))
                size += len(raw or b"")
            if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
                job.files[f].unchanged()
                yield batch
                batch, size = [], 0
    yield batch


def _random(job: Job, tokenizer: Tokenizer, start: Place, progress: Progress) -> Iterator[Item]:
    """`synthetic_tokens` random training tokens, and validation's share of them besides, which comes first."""
    key, place = keys("synthetic", job.seed)[0], 0
    held = max(RANDOM_DOCUMENT, round(job.validation * job.synthetic_tokens))
    for split, total in (("validation", held), ("train", job.synthetic_tokens)):
        for at in range(0, total, RANDOM_DOCUMENT):
            if place >= start[1]:
                first = place * RANDOM_DOCUMENT
                index = np.arange(first, first + min(RANDOM_DOCUMENT, total - at), dtype=np.uint64)
                tokens = scramble(scramble(index) ^ key) % (tokenizer.vocab - 1)  # any id but eot
                tokens[-1] = tokenizer.eot
                yield (0, place), split, tokens, 0
            place += 1
        progress("tokenize", total, total)


NO_FILE: dict[str, Any] = {
    "file": None,
    "tokens": 0,
    "documents": 0,
    "bytes": 0,
    "blocks": [],
    "docs_sha256": None,
    "top": 0,
}


def index_bin(source: Source, vocab: int, cache: Path, progress: Progress) -> tuple[Path, str]:
    """Digest .bin files in place: the store holds manifests only. Read again when a size or a time has changed."""
    given = [Path(path).expanduser().resolve() for path in source.paths()]
    paths = [file for path in given for file in (sorted(path.glob("*.bin")) if path.is_dir() else [path])]
    if not paths:
        raise Refused("data.path", f"no .bin file in {', '.join(source.paths())}")
    stamps = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    folder = cache / "stores" / digest(store.FORMAT, "bin", stamps)[:24]
    with store.locked(folder):
        if not (folder / "complete.json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted one has left
            splits = {
                "train": [path for path in paths if not path.name.startswith("val")],
                "validation": [path for path in paths if path.name.startswith("val")],
            }
            count = max(map(len, splits.values()))
            for i in range(count):
                parts = {name: _scan(f[i], progress) if i < len(f) else NO_FILE for name, f in splits.items()}
                writer = store.Writer(folder, i, np.dtype("<u2"))
                writer.publish(last=i + 1 == count, next_document=(0, 0), given=parts)
            store.close(folder)
    found = [manifest[split] for manifest in store.manifests(folder) for split in store.SPLITS]
    for part in found:
        if (top := part["top"]) >= vocab:
            raise Refused(part["file"], f"holds token {top}, but data.tokenizer.vocab={vocab} ends at {vocab - 1}")
    return folder, digest("bin", [part["blocks"] for part in found])


def _scan(path: Path, progress: Progress) -> dict[str, Any]:
    """A .bin file as a part of a shard: its size, the digest of each block, its largest token."""
    size, digests, top = path.stat().st_size, [], 0
    if size % 2:
        raise Refused(str(path), f"has {size} bytes, an odd number: it holds no uint16 tokens")
    for block in store.blocks(path):
        digests.append(hashlib.sha256(block).hexdigest())
        top = max(top, int(np.frombuffer(block, "<u2").max()))
        progress("digest", min(size, len(digests) * store.BLOCK), size)
    return NO_FILE | {"file": str(path), "tokens": size // 2, "blocks": digests, "top": top}
