"""Bandwidth of a collective, from where its members sit.

A ring or a tree over whole nodes enters each node once by every network card that its members own: the bus bandwidth of
a group of which m members share a node is that of m cards, until the switch inside the node is the narrower one. Laid
along the pods of a Clos fabric the same ring crosses each pod's uplinks once, so that oversubscription above the
leaves costs it nothing; `throughput` of a cluster is what congestion leaves of a card.
"""

from __future__ import annotations

import math

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


def exact_sum(parameters: float, ranks: int, nic: float, bus: float, domain: int, pod: int = 64) -> dict[str, float]:
    """Seconds for one rank's fp32 gradient: a tree as NCCL lays it, the exact sum flat, and laid along nodes and pods.

    All move 2·(n−1)/n of what they sum at each level. Flat, as train/reduce.py sends it, the exact sum is an all-to-all
    and a gather of W−1 messages each, and each pays a hop. But a node of `domain` ranks hosts an aligned subtree of the
    batch, and so does a pod of `pod` nodes: finished inside first, by the same tree and hence to the same bits, only
    1/domain of the gradient leaves a node by a card, in (domain−1) + (pod−1) + (pods−1) messages.
    """
    size, inside = 4.0 * parameters, min(domain, ranks)
    nodes = max(1, -(-ranks // inside))
    within = min(pod, nodes)
    pods = max(1, -(-nodes // within))

    def moved(members: int, amount: float, speed: float) -> float:
        return 2 * (members - 1) / members * amount / speed + 2 * (members - 1) * RING_HOP

    wire = 2 * (ranks - 1) / ranks * size / nic
    parts = moved(inside, size, bus), moved(within, size / inside, nic), moved(pods, size / inside / within, nic)
    return {
        "tree": wire + 2 * math.log2(max(ranks, 2)) * RING_HOP,
        "exact_flat": wire + 2 * (ranks - 1) * RING_HOP,
        "exact_by_pods": sum(parts),
        "messages_flat": 2.0 * (ranks - 1),
        "messages_by_pods": 2.0 * (inside + within + pods - 3),
    }
