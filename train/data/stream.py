"""What a step sees: the batch law, applied to data.

    sample ids of a micro-batch = f(seed, step, virtual rank, micro-batch)

That is all there is. No rank, no world size, no position in a file: a loader without state has nothing to save, to
restore or to get wrong, and whoever takes over a virtual rank reads the very tokens that the dead one would have
read. The chain is closed arithmetic from one end to the other:

    (step, virtual rank, micro-batch, row)
      -> the batch: the step, unless batches were left out because of their loss     order.passing
      -> g, the global index of a sample              batch · sequences + (v · k + i) · micro_batch + row
      -> a source and its own count of samples        order.deal
      -> an epoch, a shard, a place in the shard      cumulative counts of the shards before it
      -> a window of the shard                        order.permute, keyed by (seed, source, epoch, shard)
      -> context + 1 tokens from window · context

Shards are used in their order, so a run of a dataset that is still arriving needs only the shards up to g. A window
shares one token with the next: the last target of one is the first input of the other, and so every token but a
shard's first is a target exactly once an epoch (the odd end of a shard, shorter than a window, is left out).
"""

from __future__ import annotations

import gzip
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from train.checks import Refused
from train.config import Train
from train.data.order import SLOTS, Ints, deal, keys, passing, permute, shares
from train.data.prepare import Prepared
from train.data.store import Shard, Store, token_type
from train.data.tokenizer import Tokenizer

IGNORED = -100  # a target that is no target: torch's own convention


class Stream:
    """Training samples. Reading one whose shard is still being prepared waits for it."""

    def __init__(
        self, prepared: Prepared, *, seed: int, context: int, sequences: int, virtual_ranks: int, micro_batch: int
    ) -> None:
        self.seed, self.context, self.sequences, self.rows = seed, context, sequences, micro_batch
        self.virtual_ranks, self.vocab, self.prompts = virtual_ranks, prepared.vocab, prepared.prompts
        self._counted = -1, 0  # a step, and how many of its targets count
        self.micro_batches = sequences // virtual_ranks // micro_batch
        assert self.micro_batches * virtual_ranks * micro_batch == sequences, "batch.* has been checked by config"
        self.left_out = sorted(prepared.left_out)
        self.stores = [Store(folder, "train") for folder in prepared.stores]
        self.slots = shares(prepared.weights)
        if 0 in self.slots:
            raise Refused("data.parts", f"a weight is less than 1/{SLOTS} of the mix: raise it, or leave the part out")
        self.ends = [[0] for _ in self.stores]  # samples an epoch in the shards before each shard, as far as known

    @classmethod
    def of(cls, config: Train, prepared: Prepared) -> Stream:
        batch = config.batch
        shape = {"sequences": batch.sequences, "virtual_ranks": batch.virtual_ranks, "context": config.model.context}
        return cls(prepared, seed=config.seed, micro_batch=int(batch.micro_batch), **shape)

    def micro_batch(self, step: int, virtual_rank: int, micro_batch: int) -> Ints:
        """A micro-batch as it is stored, int64 (rows, context + 1). Raises Refused where the store is damaged."""
        T = self.context
        places = self.places(step, virtual_rank, micro_batch)
        windows = ((self.stores[source].shards[shard], window * T) for source, _, shard, window in places)
        return np.stack([shard.read(first, first + T + 1) for shard, first in windows])

    def sides(self, stored: Any) -> tuple[Any, Any]:
        """Inputs and targets of a micro-batch (torch's tensor), -100 where a target is a prompt's."""
        inputs, targets = stored[:, :-1], stored[:, 1:]
        if not self.prompts:
            return inputs, targets
        return inputs % self.vocab, targets.masked_fill(targets >= self.vocab, IGNORED)

    def counted(self, step: int) -> int:
        """How many targets of a step count, on all virtual ranks; at least 1, as their losses are divided by it."""
        if not self.prompts:
            return self.sequences * self.context
        if self._counted[0] != step:
            parts = (self.micro_batch(step, v, i) for v in range(self.virtual_ranks) for i in range(self.micro_batches))
            self._counted = step, max(1, sum(int((part[:, 1:] < self.vocab).sum()) for part in parts))
        return self._counted[1]

    def places(self, step: int, virtual_rank: int, micro_batch: int) -> list[tuple[int, int, int, int]]:
        """(source, epoch, shard, window in the shard) of each row."""
        assert 0 <= virtual_rank < self.virtual_ranks, f"virtual rank {virtual_rank} of {self.virtual_ranks}"
        assert 0 <= micro_batch < self.micro_batches, f"micro-batch {micro_batch} of {self.micro_batches}"
        batch = passing(step, self.left_out)
        first = batch * self.sequences + (virtual_rank * self.micro_batches + micro_batch) * self.rows
        return [self._place(*deal(g, self.slots, self.seed)) for g in range(first, first + self.rows)]

    def document(self, source: int, shard: int, window: int, offset: int = 0) -> int | None:
        """Which of the shard's documents a window's token lies in; None where it is not known where they end."""
        index = self.stores[source].shards[shard].index()
        return None if index is None else int(np.searchsorted(index[0], window * self.context + offset, side="right"))

    def _place(self, source: int, local: int) -> tuple[int, int, int, int]:
        """The place of a source's own sample index."""
        ends = self.ends[source]
        store = self.stores[source]
        while ends[-1] <= local and store.wait(len(ends) - 1):
            ends.append(ends[-1] + max(0, store.shards[len(ends) - 1].size - 1) // self.context)
        if ends[-1] == 0:
            raise Refused("model.context", f"{store.folder} has no sample of {self.context} + 1 tokens")
        # Where the loop ended early the index lies in the first epoch, whatever the total will be.
        epoch, rest = divmod(local, ends[-1])
        shard = bisect_right(ends, rest) - 1
        key = keys("sample", self.seed, source, epoch, shard)
        return source, epoch, shard, permute(rest - ends[shard], ends[shard + 1] - ends[shard], key)


class Validation:
    """The fixed validation set: whole documents, from the first on, until there are `tokens` of them (0: all).

    Each token is a target exactly once, end-of-document tokens included; the first is predicted from an end of
    document. Where nothing says where documents end (data=bin without a tokenizer), any token may be the last.
    A mix gives each source its share of `tokens` by weight. What is used is held in memory, 2 or 4 bytes a token.
    """

    def __init__(self, prepared: Prepared, *, context: int, tokens: int, micro_batch: int) -> None:
        self.context, self.rows, self.eot, self.vocab = context, micro_batch, prepared.eot, prepared.vocab
        self.tokenizer = Tokenizer.load(prepared.tokenizer)
        self.lossless = self.tokenizer.pieces is not None
        pieces = [np.array([self.eot], token_type(prepared.vocab))]
        self.ends: list[Ints] = []  # of each shard: where those of its documents end that we use
        self.tokens, known = 0, 0
        for folder, weight, count in zip(prepared.stores, prepared.weights, prepared.validation_shards, strict=True):
            store = Store(folder, "validation")
            left = -(-tokens * weight // sum(prepared.weights)) if tokens else float("inf")
            for index in range(count):
                store.wait(index)
                shard = store.shards[index]
                ends, sizes = shard.index() or self._guess(shard)
                if left <= 0 or not ends.size:
                    continue
                used = min(int(np.searchsorted(ends, left)) + 1, ends.size)
                size = int(ends[used - 1])
                shard.verify(0, size)
                pieces.append(shard.tokens[:size])
                self.ends.append(self.tokens + ends[:used])
                self.tokens += size
                left -= size
                known += int(sizes[:used].sum())
        self.ids = np.concatenate(pieces)  # an end of document, and then the tokens, as they are stored
        self.counted = int((self.ids[1:] < self.vocab).sum())
        self.bytes: int | None = known
        if prepared.validation.bytes is None:  # ids of unknown origin are the text that they stand for, if any
            self.bytes = sum(map(len, self.text_bytes())) if self.lossless else None
        self.micro_batches = -(-self.tokens // (context * micro_batch))

    def _guess(self, shard: Shard) -> tuple[Ints, Ints]:
        """Where the documents of a .bin file end."""
        shard.verify(0, shard.size)
        ends = np.flatnonzero(shard.tokens == self.eot) + 1 if self.lossless else np.arange(1, shard.size + 1)
        if shard.size and (not ends.size or ends[-1] < shard.size):
            ends = np.append(ends, shard.size)
        return ends, np.zeros_like(ends)

    def micro_batch(self, index: int) -> tuple[Ints, Ints]:
        """Inputs and targets, int64 (rows, context) each; behind the last token and of prompts, targets are -100."""
        size = self.rows * self.context
        inputs, targets = np.full(size, self.eot, np.int64), np.full(size, IGNORED, np.int64)
        ids = self.ids[index * size : (index + 1) * size + 1]
        inputs[: ids.size - 1] = ids[:-1] % self.vocab
        targets[: ids.size - 1] = np.where(ids[1:] < self.vocab, ids[1:].astype(np.int64), IGNORED)
        return inputs.reshape(self.rows, self.context), targets.reshape(self.rows, self.context)

    def text_bytes(self) -> Iterator[bytes]:
        """The UTF-8 bytes of each of these documents, less its prompt, from its tokens (lossless tokenizers only)."""
        return self._decoded([0, *np.concatenate(self.ends).tolist()])

    def window_bytes(self) -> Iterator[bytes]:
        """The same bytes, cut where every `context` tokens end: what a model of that context sees at a time."""
        return self._decoded([*range(0, self.tokens, self.context), self.tokens])

    def _decoded(self, cuts: list[int]) -> Iterator[bytes]:
        for first, last in pairwise(cuts):
            ids = self.ids[first + 1 : last + 1]
            yield self.tokenizer.decode_bytes(ids[ids < self.vocab].tolist())

    def yardsticks(self) -> dict[str, float | None]:
        """How well a program that learned nothing compresses the same bytes: `gzip -9` in bits per byte.

        Bits per byte compare models with different tokenizers, and with a compressor. It is measured on windows of the
        model's context, where it sees what the model sees, and on whole documents, where it sees more. A window of
        256 tokens is about 800 bytes, of which gzip's own header and trailer, counted here as in any .gz file, are 18:
        0.2 bits per byte of the windows' figure. None where ids stand for no known bytes.
        """
        if not self.lossless or not self.bytes:
            return {"gzip_windows": None, "gzip_documents": None}
        ways = {"gzip_windows": self.window_bytes(), "gzip_documents": self.text_bytes()}
        return {way: 8 * sum(map(_gzip_size, pieces)) / self.bytes for way, pieces in ways.items()}


def _gzip_size(piece: bytes) -> int:
    return len(gzip.compress(piece, compresslevel=9, mtime=0)) if piece else 0
