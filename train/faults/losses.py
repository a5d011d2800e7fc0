"""Losses that cannot be right: a spike, told from noise by what the last steps' losses were.

The supervisor looks at them as they are recorded, so one judges for all ranks, and its judgement is a function of the
record: the same for any number of ranks, and after any interruption. No torch.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

WINDOW = 100  # losses that the next one is compared with
FEWEST = 20  # of them; before that, nothing is a spike
# Of the loss: a spread below this is taken for this, or a loss that has settled would make its noise a spike.
FLOOR = 0.005
NORMAL = 1.4826  # standard deviations in the median distance from the median, of a normal distribution


class Losses:
    def __init__(self, spike: float) -> None:
        """`spike`: so many standard deviations above the median are too many; infinite where nobody shall look."""
        self._spike = spike
        self._at: dict[int, float] = {}  # by step, as it was last recorded

    def spikes(self, record: dict[str, Any]) -> bool:
        """Take a `step` event's loss; whether it stands too far above those of the steps before it."""
        step, loss = record["step"], record["loss"]
        if loss is None or math.isinf(self._spike):
            return False  # the ranks have seen what is not finite themselves; or nobody shall look
        self._at[step] = loss
        self._at.pop(step - WINDOW - 1, None)
        before = [self._at[i] for i in range(step - WINDOW, step) if i in self._at]
        if len(before) < FEWEST:
            return False
        middle = statistics.median(before)
        spread = NORMAL * statistics.median(abs(x - middle) for x in before)
        return bool(loss - middle > self._spike * max(spread, FLOOR * abs(middle)))
