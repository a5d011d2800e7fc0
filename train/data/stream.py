"""What a step sees: the batch law, applied to data.

    sample ids of a micro-batch = f(seed, step, virtual rank, micro-batch)

That is all there is. No rank, no world size, no position in a file: a loader without state has nothing to save, to
restore or to get wrong, and whoever takes over a virtual rank reads the very tokens that the dead one would have
read. The chain is closed arithmetic from one end to the other:

    (step, virtual rank, micro-batch, row)
      -> g, the global index of a sample              step · sequences + (v · k + i) · micro_batch + row
      -> a source and its own count of samples        order.deal
      -> an epoch, a shard, a place in the shard      cumulative counts of the shards before it
      -> a window of the shard                        order.permute, keyed by (seed, source, epoch, shard)
      -> context + 1 tokens from window · context

Shards are used in their order, so a run of a dataset that is still arriving needs only the shards up to g. A window
shares one token with the next: the last target of one is the first input of the other, and so every token but a
shard's first is a target exactly once an epoch (the odd end of a shard, shorter than a window, is left out).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np

from train.config import Refused
from train.data.order import SLOTS, Ints, deal, keys, permute, shares
from train.data.prepare import Prepared
from train.data.store import Shard, Store
from train.data.tokenizer import Tokenizer

IGNORED = -100  # a target that is no target: torch's own convention


class Stream:
    """Training samples. Reading one whose shard is still being prepared waits for it."""

    def __init__(
        self, prepared: Prepared, *, seed: int, context: int, sequences: int, virtual_ranks: int, micro_batch: int
    ) -> None:
        self.seed, self.context, self.sequences, self.rows = seed, context, sequences, micro_batch
        self.virtual_ranks = virtual_ranks
        self.micro_batches = sequences // virtual_ranks // micro_batch
        assert self.micro_batches * virtual_ranks * micro_batch == sequences, "batch.* has been checked by config"
        self.stores = [Store(folder, "train") for folder in prepared.stores]
        self.slots = shares(prepared.weights)
        if 0 in self.slots:
            raise Refused("data.parts", f"a weight is less than 1/{SLOTS} of the mix: raise it, or leave the part out")
        self.ends = [[0] for _ in self.stores]  # samples an epoch in the shards before each shard, as far as known

    def micro_batch(self, step: int, virtual_rank: int, micro_batch: int) -> Ints:
        """Tokens of a micro-batch, int64 (rows, context + 1). Raises Refused where the store is damaged."""
        T = self.context
        return np.stack(
            [
                self._shard(source, shard).read(window * T, window * T + T + 1)
                for source, _, shard, window in self.places(step, virtual_rank, micro_batch)
            ]
        )

    def places(self, step: int, virtual_rank: int, micro_batch: int) -> list[tuple[int, int, int, int]]:
        """(source, epoch, shard, window in the shard) of each row."""
        assert 0 <= virtual_rank < self.virtual_ranks, f"virtual rank {virtual_rank} of {self.virtual_ranks}"
        assert 0 <= micro_batch < self.micro_batches, f"micro-batch {micro_batch} of {self.micro_batches}"
        first = step * self.sequences + (virtual_rank * self.micro_batches + micro_batch) * self.rows
        return [self._place(*deal(g, self.slots, self.seed)) for g in range(first, first + self.rows)]

    def document(self, source: int, shard: int, window: int, offset: int = 0) -> int | None:
        """Which of the shard's documents a window's token lies in; None where it is not known where they end."""
        index = self._shard(source, shard).index()
        return None if index is None else int(np.searchsorted(index[0], window * self.context + offset, side="right"))

    def _place(self, source: int, local: int) -> tuple[int, int, int, int]:
        """The place of a source's own sample index."""
        ends = self.ends[source]
        while ends[-1] <= local and (arrived := self.stores[source].shard(len(ends) - 1)) is not None:
            ends.append(ends[-1] + max(0, arrived.size - 1) // self.context)
        if ends[-1] == 0:
            raise Refused("model.context", f"{self.stores[source].folder} has no sample of {self.context} + 1 tokens")
        # Where the loop ended early the index lies in the first epoch, whatever the total will be.
        epoch, rest = divmod(local, ends[-1])
        shard = bisect_right(ends, rest) - 1
        key = keys("sample", self.seed, source, epoch, shard)
        return source, epoch, shard, permute(rest - ends[shard], ends[shard + 1] - ends[shard], key)

    def _shard(self, source: int, index: int) -> Shard:
        shard = self.stores[source].shard(index)
        assert shard is not None
        return shard


class Validation:
    """The fixed validation set: whole documents, from the first on, until there are `tokens` of them (0: all).

    Each token is a target exactly once, end-of-document tokens included; the first is predicted from an end of
    document. Where nothing says where documents end (data=bin without a tokenizer), any token may be the last.
    A mix gives each source its share of `tokens` by weight.
    """

    def __init__(self, prepared: Prepared, *, context: int, tokens: int, micro_batch: int) -> None:
        self.context, self.rows, self.eot = context, micro_batch, prepared.eot
        self.tokenizer = Tokenizer.load(prepared.tokenizer)
        self.lossless = self.tokenizer.pieces is not None
        self.segments: list[tuple[Shard, Ints]] = []  # a shard, and where those of its documents end that we use
        self.tokens, known = 0, 0
        for i, folder in enumerate(prepared.stores):
            store = Store(folder, "validation")
            left = -(-tokens * prepared.weights[i] // sum(prepared.weights)) if tokens else float("inf")
            for index in range(prepared.validation_shards[i]):
                shard = store.shard(index)
                assert shard is not None
                ends, sizes = self._documents(shard)
                if left <= 0 or not ends.size:
                    continue
                count = ends.size if ends[-1] < left else int(np.searchsorted(ends, left)) + 1
                self.segments.append((shard, ends[:count]))
                left -= int(ends[count - 1])
                self.tokens += int(ends[count - 1])
                known += int(sizes[:count].sum())
        self.starts = np.cumsum([0, *(int(ends[-1]) for _, ends in self.segments)])
        self.bytes: int | None = known
        if prepared.validation.bytes is None:  # ids of unknown origin are the text that they stand for, if any
            self.bytes = sum(map(len, self.text_bytes())) if self.lossless else None
        self.micro_batches = -(-self.tokens // (context * micro_batch))

    def _documents(self, shard: Shard) -> tuple[Ints, Ints]:
        index = shard.index()
        if index is not None:
            return index
        shard.verify(0, shard.size)
        ends = np.flatnonzero(shard.tokens == self.eot) + 1 if self.lossless else np.arange(1, shard.size + 1)
        if shard.size and (not ends.size or ends[-1] < shard.size):
            ends = np.append(ends, shard.size)
        return ends.astype(np.int64), np.zeros(ends.size, np.int64)

    def micro_batch(self, index: int) -> tuple[Ints, Ints]:
        """Inputs and targets, int64 (rows, context) each; behind the last token, targets are -100."""
        shape = (self.rows, self.context)
        size = self.rows * self.context
        first, last = index * size, min((index + 1) * size, self.tokens)
        inputs, targets = np.full(size, self.eot, np.int64), np.full(size, IGNORED, np.int64)
        tokens = self._read(first - 1, last) if first else np.concatenate([[self.eot], self._read(0, last)])
        inputs[: last - first], targets[: last - first] = tokens[:-1], tokens[1:]
        return inputs.reshape(shape), targets.reshape(shape)

    def _read(self, first: int, last: int) -> Ints:
        """Tokens [first, last) of all segments together."""
        pieces = [
            shard.read(max(first - start, 0), min(last - start, size))
            for (shard, ends), start in zip(self.segments, self.starts.tolist(), strict=False)
            if (size := int(ends[-1])) > first - start and start < last
        ]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    def text_bytes(self) -> Iterator[bytes]:
        """The UTF-8 bytes of each of these documents, decoded from its tokens."""
        for shard, ends in self.segments:
            start = 0
            for end in ends.tolist():
                yield self._decode(shard.read(start, end))
                start = end

    def window_bytes(self) -> Iterator[bytes]:
        """The same bytes, cut where every `context` tokens end: what a model of that context sees at a time."""
        for first in range(0, self.tokens, self.context):
            yield self._decode(self._read(first, min(first + self.context, self.tokens)))

    def _decode(self, tokens: Ints) -> bytes:
        if not self.lossless:
            raise Refused(
                "data.tokenizer", "changes text, so its bytes cannot be had back: use bytes or a byte-level BPE"
            )
        return self.tokenizer.decode_bytes(tokens.tolist())
