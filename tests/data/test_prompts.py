"""`data.prompt_field`: what is read and not learned. Its tokens are inputs, and no target anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data.corpora import config, prepared, stream, texts
from train.checks import Refused
from train.data.stream import IGNORED, Validation

PAIRS = list(zip(texts(60, seed=1, words=8), texts(60, seed=2, words=6), strict=True))


def written(path: Path, pairs: list[Any]) -> str:
    path.write_text("".join(json.dumps({"ask": ask, "say": say}) + "\n" for ask, say in pairs))
    return str(path)


def keys(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "field": "say", "prompt_field": "ask", **more}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_targets_are_the_answers_and_inputs_are_everything(tmp_path: Path, form: str) -> None:
    if form == "jsonl":
        data = config(tmp_path, "text", **keys(written(tmp_path / "a.jsonl", PAIRS)))
    else:
        (tmp_path / "set").mkdir()
        columns = {"ask": [a for a, _ in PAIRS], "say": [b for _, b in PAIRS]}
        pq.write_table(pa.table(columns), tmp_path / "set" / "a.parquet")
        data = config(tmp_path, "hf", name=str(tmp_path / "set"), field="say", prompt_field="ask")
    corpus = prepared(data)
    loaded = stream(corpus, sequences=4, ranks=2)
    total = corpus.train.tokens + corpus.validation.tokens
    assert total == sum(len((a + b).encode()) + 1 for a, b in PAIRS)
    assert (corpus.train.bytes or 0) + (corpus.validation.bytes or 0) == sum(len(b.encode()) for _, b in PAIRS)
    known = b"\xff".join(say.encode() for _, say in PAIRS)
    for v in range(2):
        for i in range(loaded.micro_batches):
            stored = loaded.micro_batch(3, v, i)
            inputs, targets = loaded.sides(torch.from_numpy(stored))
            assert int(inputs.max()) < corpus.vocab
            assert ((targets == IGNORED) | (targets == torch.from_numpy(stored[:, 1:] % corpus.vocab))).all()
            for row in targets.tolist():  # what is left in a row are stretches of answers
                runs = bytes(0xFE if token in (IGNORED, corpus.eot) else token for token in row).split(b"\xfe")
                assert all(run in known for run in runs)


def test_the_count_of_a_step_is_that_of_all_virtual_ranks(tmp_path: Path) -> None:
    corpus = prepared(config(tmp_path, "text", **keys(written(tmp_path / "a.jsonl", PAIRS))))
    counts = set()
    for ranks, rows in ((1, 4), (2, 2), (4, 1)):
        loaded = stream(corpus, sequences=4, ranks=ranks, rows=rows)
        places = [(v, i) for v in range(ranks) for i in range(loaded.micro_batches)]
        sides = [loaded.sides(torch.from_numpy(loaded.micro_batch(5, v, i))) for v, i in places]
        by_hand = sum(int((targets != IGNORED).sum()) for _, targets in sides)
        assert loaded.counted(5) == by_hand
        counts.add(by_hand)
    (count,) = counts
    assert 0 < count < 4 * 16


def test_validation_scores_the_answers(tmp_path: Path) -> None:
    corpus = prepared(config(tmp_path, "text", **keys(written(tmp_path / "a.jsonl", PAIRS))))
    validation = Validation(corpus, context=16, tokens=0, micro_batch=2)
    sides = [validation.micro_batch(i) for i in range(validation.micro_batches)]
    targets = np.concatenate([target.flatten() for _, target in sides])
    assert validation.counted == int((targets != IGNORED).sum()) < validation.tokens
    assert validation.bytes == corpus.validation.bytes == len(b"".join(validation.text_bytes()))
    assert all(int(inputs.max()) < corpus.vocab for inputs, _ in sides)
    spoken = bytes(int(token) for token in targets if 0 <= token < 256)
    assert spoken == b"".join(validation.text_bytes()) == b"".join(validation.window_bytes())
    assert set(validation.text_bytes()) <= {say.encode() for _, say in PAIRS}


def test_other_prompts_are_another_corpus_and_none_is_the_one_of_before(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", PAIRS)
    asked = prepared(config(tmp_path, "text", **keys(path)))
    plain = prepared(config(tmp_path, "text", path=path, field="say"))
    assert asked.digest != plain.digest
    assert asked.prompts
    assert not plain.prompts
    loaded = stream(plain)
    assert loaded.counted(0) == 8 * 16
    stored = torch.from_numpy(loaded.micro_batch(0, 0, 0))
    inputs, targets = loaded.sides(stored)
    assert torch.equal(inputs, stored[:, :-1])
    assert torch.equal(targets, stored[:, 1:])


def test_what_has_no_such_field_is_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", PAIRS)
    with pytest.raises(Refused, match=r"a\.jsonl:1.*'question' \(data\.prompt_field\)"):
        prepared(config(tmp_path, "text", **keys(path, prompt_field="question")))
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(Refused, match=r"data\.prompt_field: .*b\.txt has no fields"):
        prepared(config(tmp_path, "text", **keys(str(tmp_path / "b.txt"))))
    with pytest.raises(Refused, match=r"data\.prompt_field: data=synthetic has no fields"):
        config(tmp_path, "synthetic", prompt_field="ask")
