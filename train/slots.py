"""The places for ranks on the nodes, and what has happened at each: who died here, who was suspected here.

A replacement takes a place over, and its device. Where processes keep dying the machine is to blame, not the process.
"""

from __future__ import annotations

from dataclasses import dataclass, field

QUICK = 20  # steps: who dies again within so many is suspected of a reason of its own,
SOON = 60.0  # and within so many seconds: where steps are long, others' reasons may take several lives in few of them
LIVES = 3  # deaths in so short a time after which a place is left empty
DOUBTS = 3  # audits without agreement after which a place is left empty, if no other place has as many
BACK_OFF = 1.0  # seconds before the second replacement; twice as many before each further one

Spot = tuple[int, int]  # where a slot is: on which node, and which of those there


@dataclass(slots=True)
class Slot:
    """A place for a rank."""

    deaths: list[tuple[int, float]] = field(default_factory=list)  # the last recorded step at each, and the time
    due: float = 0.0  # when a replacement may be forked, on the monotonic clock
    doubts: int = 0  # audits that its ranks took part in and that did not agree
    left_out: bool = False  # for good

    def lately(self, step: int, now: float) -> int:
        """How many have died here in the last few steps before `step`, and in the last seconds."""
        return sum(step - before < QUICK and now - time < SOON for before, time in self.deaths)

    def died(self, step: int, now: float) -> bool:
        """Another one has, after `step`; whether that makes too many."""
        self.deaths.append((step, now))
        recent = self.lately(step, now)
        self.due = now + (BACK_OFF * 2 ** (min(recent, LIVES) - 2) if recent > 1 else 0)  # all may start again often
        return recent == LIVES

    def takes(self, step: int, now: float) -> bool:
        """Whether another process may be tried here."""
        return not self.left_out and self.lately(step, now) < LIVES and now >= self.due


def doubtful(slots: dict[Spot, Slot]) -> Spot | None:
    """The place that is to be left out from now on: it took part in more disagreements than any other."""
    worst, second = [*sorted((slot.doubts for slot in slots.values()), reverse=True), 0][:2]
    if worst < DOUBTS or worst == second:
        return None
    return next((n for n, slot in slots.items() if slot.doubts == worst and not slot.left_out), None)
