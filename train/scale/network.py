"""Bandwidth of a collective, from where its members sit.

A ring or a tree over whole nodes enters each node once by every network card that its members own: the bus bandwidth of
a group of which m members share a node is that of m cards, until the switch inside the node is the narrower one. Laid
along the pods of a Clos fabric the same ring crosses each pod's uplinks once, so that oversubscription above the
leaves costs it nothing; `throughput` of a cluster is what congestion leaves of a card.
"""

from __future__ import annotations

import numpy as np

from train.scale.workload import Array

RING_HOP = 5e-6  # seconds a node that a ring passes, assumed: a switched hop and a kernel's hand-over
TENSOR_HOP = 5e-6  # seconds a GPU that a ring inside a node passes, assumed


def bus(members: Array, stride: Array, domain: Array, inside: Array, nic: Array) -> Array:
    """Bytes/s that each of `members` ranks, `stride` apart, sends and receives in a ring.

    `inside` is the bus bandwidth of a domain of `domain` GPUs, `nic` a card's.
    """
    local = members * stride <= domain
    return np.where(local, inside, np.minimum(inside, nic * np.maximum(1.0, domain / stride)))


def nodes(members: Array, stride: Array, domain: Array) -> Array:
    """Domains that such a group spans, at least 1."""
    return np.maximum(1.0, members * stride / domain)


def exact_sum(parameters: float, ranks: int, leaf_bytes: float, nic: float) -> tuple[float, float]:
    """Seconds of the gradient's sum for one rank: the backend's ring, and the exact tree as train/reduce.py sends it.

    Both move 2·(W−1)/W of the gradient. The exact sum's all-to-all is W−1 messages of 1/W of it, each of which pays a
    hop, and a ring pays 2·(W−1) hops as well unless it is laid as a tree, 2·log2 W.
    """
    moved = 2 * (ranks - 1) / ranks * parameters * leaf_bytes / nic
    return moved + 2 * np.log2(max(ranks, 2)) * RING_HOP, moved + 2 * (ranks - 1) * RING_HOP
