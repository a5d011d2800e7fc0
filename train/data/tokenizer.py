"""Text to token ids and back.

Three kinds behind one class: raw bytes, a tokenizer.json of the `tokenizers` library (our own byte-level BPE, or
anybody's), and none, where ids stand for no text. What they share is what the rest of the room needs: how large
the vocabulary is, which id ends a document, and, where the tokenizer is lossless, the bytes that each id stands
for, by which any run of tokens, even one that begins inside a character, is text again.

A document that quotes `<|endoftext|>` is text like any other: special tokens are never recognized in text, so
only this harness puts an end-of-document token anywhere, and documents stay apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from train.checks import Refused, needed
from train.config import TokenizerKind

END = "<|endoftext|>"
ENDS = (END, "<|end_of_text|>", "<|endofdocument|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>")  # GPT-2, Llama, …


class Tokenizer:
    """`vocab` ids, of which `eot` ends a document. `pieces[id]` are the bytes of an id, None where unknown."""

    def __init__(self, kind: TokenizerKind, vocab: int, eot: int, library: tokenizers.Tokenizer | None = None) -> None:
        self.kind, self.vocab, self.eot, self.library = kind, vocab, eot, library
        self.pieces: list[bytes] | None = None
        if kind is TokenizerKind.bytes:
            self.pieces = [bytes([i]) for i in range(256)] + [b""]
        elif library is not None:
            self.pieces = _pieces(json.loads(library.to_str()), vocab, eot)

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """256 bytes, and 256 to end a document."""
        return cls(TokenizerKind.bytes, 257, 256)

    @classmethod
    def of_ids(cls, vocab: int) -> Tokenizer:
        """Ids without text. The last one is taken to end documents, as in GPT-2's vocabulary."""
        return cls(TokenizerKind.none, vocab, vocab - 1)

    @classmethod
    def train(cls, documents: Iterable[str], vocab: int) -> Tokenizer:
        """Byte-level BPE (Radford et al. 2019) of at most `vocab` ids; the same documents give the same merges."""
        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[END],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        library.train_from_iterator(documents, trainer)
        return cls._of(library, "data.tokenizer")

    @classmethod
    def _of(cls, library: tokenizers.Tokenizer, where: str) -> Tokenizer:
        end = next((library.token_to_id(name) for name in ENDS if library.token_to_id(name) is not None), None)
        end = needed(end, where, f"has no end-of-document token: one of {', '.join(ENDS)} is needed")
        library.encode_special_tokens = True  # that is: as the text that they are
        library.no_truncation()
        library.no_padding()
        vocab = 1 + max(library.get_vocab(with_added_tokens=True).values())  # ids may have holes
        return cls(TokenizerKind.file, vocab, end, library)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what `to_str` gave, or any tokenizer.json. Raises Refused naming the file."""
        path = Path(path).expanduser()
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise Refused(str(path), f"cannot be read ({error.strerror}): name a tokenizer.json") from None
        seal = path.with_suffix(".sha256")
        if seal.exists() and seal.read_text() != hashlib.sha256(raw).hexdigest():
            raise Refused(str(path), f"is damaged: delete {path.parent} and run again")
        try:
            spec = json.loads(raw)
            if "pocket_colossus" in spec:
                return cls(TokenizerKind(spec["pocket_colossus"]), spec["vocab"], spec["eot"])
            library = tokenizers.Tokenizer.from_str(raw.decode())
        except Exception as error:  # the library raises bare Exception
            raise Refused(str(path), f"is no tokenizer.json: {error}") from None
        return cls._of(library, str(path))

    def to_str(self) -> str:
        """The tokenizer.json, as text."""
        if self.library is not None:
            return str(self.library.to_str())
        return json.dumps({"pocket_colossus": self.kind.value, "vocab": self.vocab, "eot": self.eot})

    def published(self) -> tokenizers.Tokenizer | None:
        """The same ids in a tokenizer.json of the library, for other programs; None where ids stand for no text."""
        if self.kind is not TokenizerKind.bytes:
            return self.library
        library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=_alphabet(), merges=[]))
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = tokenizers.decoders.ByteLevel()
        library.add_special_tokens([END])
        return library

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end-of-document token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        if self.library is not None:
            return [e.ids for e in self.library.encode_batch_fast(texts, add_special_tokens=False)]
        if self.kind is TokenizerKind.bytes:
            return [list(text.encode()) for text in texts]
        raise Refused("data.tokenizer.kind", "none turns no text into tokens: use bytes, bpe or file")

    def decode(self, ids: Iterable[int]) -> str:
        """Text again, where a character that is cut becomes U+FFFD; without a tokenizer, the ids themselves."""
        if self.pieces is not None:
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        if self.library is not None:
            return str(self.library.decode([int(i) for i in ids]))
        return " ".join(str(i) for i in ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of a run of tokens (lossless tokenizers only); an end of document is no bytes.

        Nor is an id above the vocabulary, which a model may know (`model.vocab`).
        """
        assert self.pieces is not None, "only a lossless tokenizer has bytes"
        return b"".join([self.pieces[i] for i in ids if i < self.vocab])


def _pieces(spec: dict[str, Any], vocab: int, eot: int) -> list[bytes] | None:
    """The bytes of each id of a byte-level tokenizer.json; None where it changes or drops text."""
    pre = spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    lossless = (
        not spec.get("normalizer")
        and (spec.get("decoder") or {}).get("type") == "ByteLevel"
        and any(step.get("type") == "ByteLevel" and not step.get("add_prefix_space") for step in steps)
        and all(step.get("behavior", "Isolated") != "Removed" for step in steps)
        and not any(added["lstrip"] or added["rstrip"] for added in spec["added_tokens"])
    )
    if not lossless:
        return None
    byte = _alphabet()
    pieces = [b""] * vocab
    added = {entry["content"]: entry["id"] for entry in spec["added_tokens"]}
    for token, index in spec["model"]["vocab"].items():
        if token not in added:
            if any(character not in byte for character in token):
                return None
            pieces[index] = bytes([byte[character] for character in token])
    for token, index in added.items():
        pieces[index] = b"" if index == eot else token.encode()
    return pieces


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the rest follow from U+0100 on."""
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    printable = {character: ord(character) for character in characters if ord(character) < 0x100}
    others = sorted(set(range(256)) - set(printable.values()))
    return printable | dict(zip(characters[len(printable) :], others, strict=True))
