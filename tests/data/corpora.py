"""Tiny corpora for the tests of the data room, made under tmp_path from a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from train.config import Data, SourceKind, Tokenizer, TokenizerKind
from train.data.prepare import Prepared, prepare
from train.data.stream import Stream


def texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """Documents of random words, some of them far outside ASCII."""
    rng = random.Random(seed)
    vocabulary = ["".join(chr(rng.randrange(97, 123)) for _ in range(rng.randrange(2, 8))) for _ in range(200)]
    vocabulary += ["größe", "données", "数据", "🙂", "\r\n", "\t", "\x00"]
    return [" ".join(rng.choices(vocabulary, k=rng.randrange(words // 2, words))) for _ in range(count)]


def folder(path: Path, documents: list[str]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(documents):
        (path / f"{i:04d}.txt").write_bytes(text.encode())
    return path


def config(tmp_path: Path, kind: str, **keys: Any) -> Data:
    """A Data of this kind with raw bytes (or, without text, ids) for tokens and its cache under tmp_path."""
    plain = Tokenizer(kind=TokenizerKind.none, vocab=100) if kind in ("bin", "synthetic") else None
    tokenizer = keys.pop("tokenizer", plain or Tokenizer(kind=TokenizerKind.bytes))
    cache = keys.pop("cache", str(tmp_path / "cache"))
    return Data(kind=SourceKind[kind], tokenizer=tokenizer, cache=cache, **{"validation": 0.2, **keys})


def prepared(data: Data, context: int = 16) -> Prepared:
    result, preparer = prepare(data, seed=5, context=context)
    assert preparer is None
    return result


def stream(corpus: Prepared, sequences: int = 8, ranks: int = 4, rows: int = 1, context: int = 16) -> Stream:
    return Stream(corpus, seed=5, context=context, sequences=sequences, virtual_ranks=ranks, micro_batch=rows)


def jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path
