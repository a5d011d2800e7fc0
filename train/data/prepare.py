"""From a corpus to stores of tokens: once, and never twice.

Everything that is made is kept under a fingerprint of what it is made from: a tokenizer under the digests of the
documents that trained it, a store under those of its files, its tokenizer and its split. So preparing is a lookup
first; an edited corpus or another vocabulary is another store; two runs of the same corpus share one, and a lock
keeps the second from doing the work of the first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from train import hardware
from train.checks import MALFORMED, Refused
from train.config import Data, Source, SourceKind, TokenizerKind
from train.config import Tokenizer as TokenizerConfig
from train.data import store
from train.data.corpus import File, Progress, documents, drawn, held_out, pin
from train.data.store import digest
from train.data.tokenizer import Tokenizer
from train.data.writing import Job, Preparer, Work, index_bin, quiet, write_store

Manifest = dict[str, Any]  # of a shard

READ = (SourceKind.stdlib, SourceKind.text, SourceKind.hf)  # kinds that hold text
SAMPLE = 32 << 20  # bytes of training documents that a BPE is trained on
NO_TRAINING = "the corpus has no training documents: give it more text, or lower data.validation"


@dataclass(slots=True, kw_only=True)
class Counts:
    tokens: int
    documents: int
    bytes: int | None  # UTF-8 bytes of the documents; None where ids stand for no text that we know


@dataclass(slots=True, kw_only=True)
class Prepared:
    """All that a rank needs to know in order to read the corpus; goes through JSON to get there."""

    stores: list[str]  # a folder for each source
    weights: list[float]
    validation_shards: list[int]  # of each store: the first so many hold the validation set
    digest: str  # of the whole corpus's identity: contents, tokenizer, split, weights
    vocab: int
    eot: int
    tokenizer: str  # path of its tokenizer.json
    complete: bool  # False: shards are still to come, and the training counts are those so far
    skipped: int  # documents left out because they are not UTF-8
    train: Counts
    validation: Counts
    separator: int | None = None  # `eot`, where no document is to attend to another one
    prompts: bool = False  # a stored id from `vocab` on is a prompt's: less `vocab` it is a token, that no loss counts
    left_out: list[int] = field(default_factory=list)  # batches of a run that no step sees: their loss was no good

    @classmethod
    def read(cls, path: Path) -> Prepared:
        """A run's data.json; raises Refused where it is gone, or says something else."""
        try:
            value = json.loads(path.read_text())
            counts = {split: Counts(**value[split]) for split in ("train", "validation")}
            return cls(**{**value, **counts})
        except MALFORMED as error:
            raise Refused(str(path), f"does not say what the run was trained on ({error})") from error


def whole(data: Data, tokenizer: str) -> Prepared:
    """All of a corpus to be scored, in the tokens of this tokenizer.json; of .bin files, val*.bin."""
    data.tokenizer, data.validation = TokenizerConfig(kind=TokenizerKind.file, path=tokenizer), 1.0
    return prepare(data, seed=0, context=0)[0]


def prepare(data: Data, *, seed: int, context: int, progress: Progress = quiet) -> tuple[Prepared, Preparer | None]:
    """Make, or find, the tokens of a corpus.

    Returns what the ranks read it by, and a Preparer where shards are still to come. `seed` chooses synthetic tokens;
    `context` only serves to refuse a corpus that is shorter than one sample (0: that has none). Raises Refused.
    """
    cache = cache_folder(data)
    sources = list(data.parts.values()) or [data]
    pins = [pin(source, cache, progress) if source.kind in READ else [] for source in sources]
    path, tokenizer = _tokenizer(data, sources, pins, cache, progress)
    stores: list[tuple[Path, str]] = []  # and the digest of what each is made from
    works = []
    for source, files in zip(sources, pins, strict=True):
        if source.kind is SourceKind.bin:
            folder, identity = index_bin(source, tokenizer.vocab, cache, progress)
        else:
            random = None if files else [seed, data.synthetic_tokens]
            growing = source.kind is SourceKind.hf
            content = [_identity(source, files), random, growing, data.validation, data.shard_tokens]
            identity = digest(store.FORMAT, path.parent.name, tokenizer.vocab, content)
            folder = cache / "stores" / identity[:24]
            job = Job(
                folder=str(folder),
                tokenizer=str(path),
                files=files,
                field=source.field,
                prompt_field=source.prompt_field,
                validation=data.validation,
                shard_tokens=data.shard_tokens,
                growing=growing,
                seed=seed,
                synthetic_tokens=data.synthetic_tokens,
            )
            process = write_store(job, progress)
            if process is not None or not (folder / "complete.json").exists():
                works.append(Work(job, process))
        stores.append((folder, identity))
    shards = [store.manifests(folder) for folder, _ in stores]
    held = [found[:1] if s.kind is SourceKind.hf else found for s, found in zip(sources, shards, strict=True)]
    for source, found, first in zip(sources, shards, held, strict=True):
        _refuse_too_little(source, found, first, context)
    weights = [source.weight for source in sources]
    known = all(source.kind in READ for source in sources)
    prepared = Prepared(
        stores=[str(folder) for folder, _ in stores],
        weights=weights,
        validation_shards=[len(first) for first in held],
        digest=digest([identity for _, identity in stores], weights, tokenizer.to_str()),
        vocab=tokenizer.vocab,
        eot=tokenizer.eot,
        separator=tokenizer.eot if data.mask_documents else None,
        prompts=any(source.prompt_field for source in sources),
        tokenizer=str(path),
        complete=all(found[-1]["last"] for found in shards),
        skipped=sum(shard["skipped"] for found in shards for shard in found),
        train=_counts("train", shards, known),
        validation=_counts("validation", held, known),
    )
    return prepared, Preparer(works) if works else None


def _counts(split: str, shards: list[list[Manifest]], known: bool) -> Counts:
    parts = [shard[split] for found in shards for shard in found]
    tokens, documents, size = (sum(part[key] for part in parts) for key in ("tokens", "documents", "bytes"))
    return Counts(tokens=tokens, documents=documents, bytes=size if known else None)


def _refuse_too_little(source: Source, shards: list[Manifest], held: list[Manifest], context: int) -> None:
    """Raise if there is not a sample to train on, or no document, in the shards that hold them, to validate on."""
    where = f"data={source.kind.value}"
    sizes = [shard["train"]["tokens"] for shard in shards]
    if context and not any(sizes):
        raise Refused(where, NO_TRAINING)
    if context and shards[-1]["last"] and max(sizes) <= context:
        raise Refused(where, f"its {sum(sizes)} tokens are less than one sample of {context} + 1 (model.context)")
    if not any(shard["validation"]["tokens"] for shard in held):
        larger = "data.shard_tokens" if source.kind is SourceKind.hf else "add documents"
        how = "name a val*.bin" if source.kind is SourceKind.bin else f"raise the share, or {larger}"
        raise Refused("data.validation", f"no document of {where} falls into validation: {how}")


def cache_folder(data: Data) -> Path:
    """Where prepared tokens are kept: data.cache, $XDG_CACHE_HOME/pocket-colossus or ~/.cache/pocket-colossus."""
    folder = Path(data.cache or hardware.cache_folder()).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused("data.cache", f"{folder} cannot be made ({error.strerror}): name another folder") from None
    return folder


def _identity(source: Source, files: list[File]) -> str:
    """Contents in order, and how they are read; not what the files are called or where they lie."""
    contents = [[file.form, file.sha256, file.whole] for file in files]
    return digest(contents, source.field, *filter(None, [source.prompt_field]))


# ----------------------------------------------------------------------------------------------- tokenizer


def _tokenizer(
    data: Data, sources: list[Source], pins: list[list[File]], cache: Path, progress: Progress
) -> tuple[Path, Tokenizer]:
    """The one tokenizer of the corpus, and the file in the cache that holds it."""
    kind, text = data.tokenizer.kind, any(pins)
    if text and kind is TokenizerKind.none:
        raise Refused("data.tokenizer.kind", "none turns no text into tokens: use bytes, bpe or file")
    if not text and kind is TokenizerKind.bpe:
        raise Refused("data.tokenizer.kind", "there is no text to train a bpe on: use none, or file")
    if kind in (TokenizerKind.bpe, TokenizerKind.bytes) and any(s.kind is SourceKind.bin for s in sources):
        theirs = "the ids of .bin files belong to a tokenizer of their own"
        raise Refused("data.tokenizer.kind", f"{theirs}: use none, or file")
    made = None
    if kind is TokenizerKind.bpe:
        what = [[_identity(s, f), s.weight, s.kind is SourceKind.hf] for s, f in zip(sources, pins, strict=True)]
        name = digest(store.FORMAT, "bpe", data.tokenizer.vocab, SAMPLE, data.validation, what)
    else:
        if kind is TokenizerKind.bytes:
            made = Tokenizer.of_bytes()
        elif kind is TokenizerKind.none:
            made = Tokenizer.of_ids(data.tokenizer.vocab)
        else:
            made = Tokenizer.load(data.tokenizer.path)
        name = digest(made.to_str())
    path = cache / "tokenizers" / name[:24] / "tokenizer.json"
    with store.locked(path.parent):
        if not path.exists():
            made = made or Tokenizer.train(_sample(data, sources, pins, progress), data.tokenizer.vocab)
            path.parent.mkdir(parents=True, exist_ok=True)
            store.seal(path, made.to_str().encode())
    return path, Tokenizer.load(path)


def _sample(data: Data, sources: list[Source], pins: list[list[File]], progress: Progress) -> Iterator[str]:
    """Training documents, each source's share by weight; which ones, their own sha256 decides.

    A dataset that is still to be downloaded gives its first documents: a fair sample would have to read it all.
    """
    texts = [(source, files) for source, files in zip(sources, pins, strict=True) if files]
    taken = 0
    for source, files in texts:
        budget = SAMPLE * source.weight / sum(other.weight for other, _ in texts)
        size = sum(file.size for file in files)
        share = 1.0 if source.kind is SourceKind.hf else min(1.0, budget / max(1, size))
        for raw in chain.from_iterable(documents(file, source.field, source.prompt_field) for file in files):
            if not raw or held_out(raw, data.validation) or not drawn(b"sample" + raw, share):
                continue
            yield raw.decode()
            taken += len(raw)
            budget -= len(raw)
            progress("tokenizer", taken, SAMPLE)
            if budget <= 0:
                break
        for file in files:
            file.unchanged()
    if not taken:
        raise Refused("data", NO_TRAINING)
