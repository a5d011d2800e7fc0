"""The batch law, as arithmetic.

A run has V *virtual ranks*, whatever hardware it has. A step's global batch is V x k micro-batches of fixed
shape; virtual rank v runs its k micro-batches in order, as ordinary gradient accumulation, and what it sees is a
function of (seed, step, v, micro-batch) alone. Its gradient is leaf v of one **canonical binary tree** over
0 … V-1, which splits n leaves at the largest power of two below n:

        [0,8)                      [0,6)
       /     \\                    /     \\
    [0,4)   [4,8)              [0,4)   [4,6)
    /   \\   /   \\             /   \\   /   \\
   ...  ... ...  ...         [0,2)[2,4) 4    5

The step's gradient is the sum at the root, added in the order of the tree. Floating-point addition does not
associate, so the order *is* the result; and as the order is the tree's, it does not matter which rank computed
which leaf, or how many ranks there were. Physical ranks, 1 … V of them, *host* virtual ranks: a rank adds up the
few maximal subtrees of what it hosts, and the rest of the tree is finished between ranks (`train.reduce`).

Everything here is integers: no torch, no ranks of its own, nothing to mock in a test. One recursion, `fold`, says
all: *given the tree and what is at hand, what is the sum?* And `missing` says what is not at hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

T = TypeVar("T")

WINDOW = 8  # virtual ranks by which a cut between two shares may stray from the ideal one


class Node(NamedTuple):
    """The subtree over the virtual ranks `first` … `end - 1`."""

    first: int
    end: int

    @property
    def is_leaf(self) -> bool:
        return self.end - self.first == 1


def root(virtual_ranks: int) -> Node:
    return Node(0, virtual_ranks)


def children(node: Node) -> tuple[Node, Node]:
    """Split at the largest power of two below the number of leaves: 8 -> 4 + 4, 6 -> 4 + 2, 5 -> 4 + 1."""
    leaves = node.end - node.first
    middle = node.first + (1 << ((leaves - 1).bit_length() - 1))
    return Node(node.first, middle), Node(middle, node.end)


def fold(node: Node, at_hand: Callable[[Node], T | None], add: Callable[[T, T], T]) -> T:
    """The sum under `node`, added in the tree's order, left before right.

    `at_hand(node)` gives a subtree's sum where there is one, else None and its children are asked; a leaf must be
    at hand. At most one value a level is alive at a time: log2(V) + 1 of them while a whole tree is folded.
    """
    value = at_hand(node)
    if value is not None:
        return value
    if node.is_leaf:
        raise LookupError(f"virtual rank {node.first} is not at hand")
    left, right = children(node)
    left_sum = fold(left, at_hand, add)
    return add(left_sum, fold(right, at_hand, add))


def maximal(hosted: Collection[int], node: Node) -> list[Node]:
    """The largest subtrees of `node` all of whose leaves are in `hosted`, from left to right."""
    if all(v in hosted for v in range(*node)):
        return [node]
    return [] if node.is_leaf else [part for child in children(node) for part in maximal(hosted, child)]


def missing(have: Collection[Node], node: Node) -> list[int]:
    """The virtual ranks under `node` that no subtree in `have` covers."""
    if node in have:
        return []
    return [node.first] if node.is_leaf else [v for child in children(node) for v in missing(have, child)]


def spine(node: Node, at_hand: Collection[Node] = ()) -> tuple[list[Node], Node]:
    """The last leaf under `node`, or a subtree at hand before it, and the left siblings on the way down to it.

    The sum is l0 + (l1 + (… + that)).
    """
    lefts = []
    while not node.is_leaf and node not in at_hand:
        left, node = children(node)
        lefts.append(left)
    return lefts, node


def shares(virtual_ranks: int, ranks: int, speeds: Sequence[float] = ()) -> list[range]:
    """Which virtual ranks each rank hosts: contiguous, at least one, in proportion to `speeds` (empty: all alike).

    Among all such cuts it takes the one whose slowest rank is done first, then the one with the fewest maximal
    subtrees, which are what is sent between ranks and kept in buffers.
    """
    if not 1 <= ranks <= virtual_ranks:
        raise ValueError(f"{ranks} ranks cannot host {virtual_ranks} virtual ranks")
    speeds = speeds or [1.0] * ranks
    total, whole = sum(speeds), root(virtual_ranks)
    # where the last share ends -> time of the slowest, subtrees, cuts
    best: dict[int, tuple[float, int, tuple[int, ...]]] = {0: (0.0, 0, (0,))}
    for rank in range(ranks):
        most = virtual_ranks - (ranks - 1 - rank)  # those behind need one each
        ideal = round(virtual_ranks * sum(speeds[: rank + 1]) / total)
        least = most if rank == ranks - 1 else min(most, max(rank + 1, ideal - WINDOW))
        best = {
            end: min(
                (max(slowest, (end - first) / speeds[rank]), subtrees + _subtrees(first, end, whole), (*cuts, end))
                for first, (slowest, subtrees, cuts) in best.items()
                if first < end
            )
            for end in range(least, min(most, max(least, ideal + WINDOW)) + 1)
            if min(best) < end
        }
    return [range(first, end) for first, end in pairwise(best[virtual_ranks][2])]


def taken_over(kept: Sequence[Collection[int]], virtual_ranks: int) -> list[list[int]]:
    """Who hosts what for the rest of a step whose ranks have changed: what it has finished, and a share of the rest.

    `kept`: by rank, the virtual ranks whose sums it has. A rank may be left with none.
    """
    rest = missing([Node(v, v + 1) for own in kept for v in own], root(virtual_ranks))
    cuts = [len(rest) * rank // len(kept) for rank in range(len(kept) + 1)]
    return [sorted([*own, *rest[a:b]]) for own, (a, b) in zip(kept, pairwise(cuts), strict=True)]


def _subtrees(first: int, end: int, node: Node) -> int:
    """How many maximal subtrees of `node` the leaves first … end-1 make."""
    if end <= node.first or node.end <= first:
        return 0
    if first <= node.first and node.end <= end:
        return 1
    return sum(_subtrees(first, end, child) for child in children(node))


def checksum(content: bytes, before: int = 0) -> int:
    """63 bits over some bytes and the checksum of what came before them: which tokens a virtual rank has seen."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=before.to_bytes(8, "big")).digest(), "big") >> 1


def micro_batch_seed(seed: int, step: int, virtual_rank: int, micro_batch: int) -> int:
    """The seed of all randomness (dropout) in one micro-batch: 63 bits, a function of these four numbers alone."""
    key = f"{seed}/{step}/{virtual_rank}/{micro_batch}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
