"""The order of samples, as arithmetic.

A shuffled epoch is usually a stored permutation and a position in it: state that must be saved, restored and
agreed upon. Here the permutation is a formula. A Feistel network is a bijection of [0, 4^h) whatever its round
function is; walking its cycles until the value falls below n makes it a bijection of [0, n) (Black and Rogaway,
"Ciphers with arbitrary finite domains", CT-RSA 2002). The domain is less than 4 n, so a walk takes under four
steps on average, and any sample's place costs the same wherever it lies and whatever came before it.

A mix of corpora is dealt in blocks of 1,024 slots. A source owns the same number of slots in each block, so how
many of its samples lie in earlier blocks is one multiplication, and nothing needs to be counted. (Within a block its
samples come in any order, so one epoch of a source may end, and the next begin, inside the same block.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

ROUNDS = 6
SLOTS = 1024  # of a block of the mix: a weight is met to a thousandth


def keys(*parts: int | str) -> Words:
    """The round keys that belong to these numbers and words, shape (ROUNDS,)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def scramble(x: Words) -> Words:
    """splitmix64's finalizer (Steele et al., OOPSLA 2014): each bit of the result depends on all bits of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: Ints, size: int, key: Words) -> Ints:
    """Where a permutation of [0, size), chosen by `key`, sends each of `index` (any shape (n,), values below size)."""
    if size <= 1:
        return index.copy()
    bits = ((size - 1).bit_length() + 1) // 2
    half, mask = np.uint64(bits), np.uint64((1 << bits) - 1)
    x = index.astype(np.uint64)
    walking = np.arange(x.size)
    while walking.size:
        left, right = x[walking] >> half, x[walking] & mask
        for k in key:
            left, right = right, left ^ (scramble(right ^ k) & mask)
        x[walking] = (left << half) | right
        walking = walking[x[walking] >= size]
    return x.astype(np.int64)


def shares(weights: Sequence[float]) -> list[int]:
    """How many of the SLOTS of a block each weight gets, by largest remainder (the earlier one wins a tie)."""
    exact = [weight / sum(weights) * SLOTS for weight in weights]
    slots = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (slots[i] - exact[i], i))
    for i in by_remainder[: SLOTS - sum(slots)]:
        slots[i] += 1
    return slots


def deal(g: Ints, slots: Sequence[int], seed: int) -> tuple[Ints, Ints]:
    """Global sample indices (n,) -> which source each is from, and its index among that source's samples."""
    if len(slots) == 1:
        return np.zeros_like(g), g
    ends = np.cumsum(slots)
    block, slot = np.divmod(g, SLOTS)
    for b in np.unique(block):
        here = block == b
        slot[here] = permute(slot[here], SLOTS, keys("mix", seed, int(b)))
    source = np.searchsorted(ends, slot, side="right")
    count = np.asarray(slots)[source]
    return source, block * count + slot - (ends[source] - count)
