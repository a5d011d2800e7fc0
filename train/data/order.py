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
import struct
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Word = TypeVar("Word", int, npt.NDArray[Any])  # a number below 2^64, or an array of uint64

ROUNDS = 6
SLOTS = 1024  # of a block of the mix: a weight is met to a thousandth


def keys(*parts: int | str) -> tuple[int, ...]:
    """The round keys that belong to these numbers and words."""
    return struct.unpack(f"<{ROUNDS}Q", hashlib.blake2b(repr(parts).encode(), digest_size=8 * ROUNDS).digest())


def passing(index: int, left_out: Sequence[int]) -> int:
    """The number at `index` of 0, 1, 2 … without those in `left_out`, which are in order."""
    for number in left_out:
        if number > index:
            break
        index += 1
    return index


def scramble(x: Word) -> Word:
    """splitmix64's finalizer (Steele et al., OOPSLA 2014): each bit of the result depends on all 64 bits of x."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    x = x ^ (x >> 31)
    return x


def permute(index: int, size: int, key: Sequence[int]) -> int:
    """Where a permutation of [0, size), chosen by `key`, sends `index`."""
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for k in key:
            left, right = right, left ^ (scramble(right ^ k) & mask)
        index = left << half | right
        if index < size:
            return index


def shares(weights: Sequence[float]) -> list[int]:
    """How many of the SLOTS of a block each weight gets, by largest remainder (the earlier one wins a tie)."""
    exact = [weight / sum(weights) * SLOTS for weight in weights]
    slots = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (slots[i] - exact[i], i))
    for i in by_remainder[: SLOTS - sum(slots)]:
        slots[i] += 1
    return slots


def deal(g: int, slots: Sequence[int], seed: int) -> tuple[int, int]:
    """A global sample index -> which source it is from, and its index among that source's samples."""
    if len(slots) == 1:
        return 0, g
    block, slot = divmod(g, SLOTS)
    slot = permute(slot, SLOTS, keys("mix", seed, block))
    ends = list(accumulate(slots))
    source = bisect_right(ends, slot)
    return source, block * slots[source] + slot - (ends[source] - slots[source])
