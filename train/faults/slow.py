"""Which of several ranks, or devices, is slow."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

SLOW = 1.3  # times what the others take


def slow(seconds: Sequence[float]) -> dict[int, float]:
    """The ranks that are slow, with how many times as long as the median rank each takes for the same work.

    `seconds`: of each rank, for a leaf, without its waiting for others: under synchronous training the wall time of a
    step is the same for all and names nobody. Medians over some steps, for a single one says little.
    """
    typical = statistics.median_low(seconds)
    return {rank: mine / typical for rank, mine in enumerate(seconds) if mine > SLOW * typical}
