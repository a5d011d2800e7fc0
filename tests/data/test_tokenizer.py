from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.data.corpora import texts
from train.checks import Refused
from train.data.tokenizer import END, Tokenizer


def scripts(count: int) -> list[str]:
    """Arbitrary Unicode, surrogates (which are no characters) excepted."""
    rng = random.Random(1)
    ranges = [(0, 128), (128, 0x800), (0x800, 0xD800), (0xE000, 0x110000)]
    return ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train(texts(100), 400)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_any_text_comes_back(kind: str, bpe: Tokenizer, tmp_path: Path) -> None:
    tokenizer = bpe if kind == "bpe" else Tokenizer.of_bytes()
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.vocab, loaded.eot) == (tokenizer.vocab, tokenizer.eot)
    assert loaded.pieces is not None
    samples = [*scripts(200), *texts(20, seed=9), f"quoted {END} here", " a\r\n\n b "]
    for text, ids in zip(samples, loaded.encode_batch(samples), strict=True):
        assert ids == tokenizer.encode(text)
        assert loaded.decode(ids) == text
        assert loaded.decode_bytes(ids) == text.encode()
        assert loaded.eot not in ids
        assert max(ids) < loaded.vocab
    assert loaded.decode([*loaded.encode("a"), loaded.eot]) == "a"


def test_bpe_is_deterministic_and_compresses(bpe: Tokenizer) -> None:
    assert Tokenizer.train(iter(texts(100)), 400).to_str() == bpe.to_str()
    assert bpe.vocab == 400
    text = texts(1, seed=0)[0]
    assert len(bpe.encode(text)) < 0.7 * len(text.encode())


def test_ids_without_text_are_shown() -> None:
    tokenizer = Tokenizer.of_ids(50257)
    assert (tokenizer.eot, tokenizer.decode([3, 50256])) == (50256, "3 50256")
    with pytest.raises(Refused, match=r"tokenizer\.kind"):
        tokenizer.encode("x")


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    for name in ("broken.json", "missing.json"):
        with pytest.raises(Refused, match=name):
            Tokenizer.load(tmp_path / name)
