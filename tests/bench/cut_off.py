"""How often gloo does not tell a rank that an exchange of its is cut off, and how often a group never comes to its end.

    make bench-cut-off

Two ranks begin an exchange, and rank 1 a second one, which is never met: at once, or up to 2 ms later, rank 0 leaves
the group, as `Gloo.leave` does it. Rank 1 waits for both, and is freed by the supervisor's word after a second if
nothing else has freed it. Then it leaves as well. In how many rounds the first exchange was cut off, in how many of
these the word alone freed rank 1, and how many groups of each rank were not at their end after `DROPPED`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import torch

from tests import dist
from tests.bench import report
from tests.test_regroup import Member
from train import backends
from train.group import Group
from train.ranks import Changed

ROUNDS = 300
WORD = 1.0  # seconds after which the supervisor says how to go on


def rounds(outer: Group, size: int) -> dict[str, int]:
    """What is counted, as this rank saw it."""
    member, half, chance = Member(outer), size // 2, random.Random(1)
    found = {"cut": 0, "untold": 0, "endless": 0}
    within = backends._within

    def ends(seconds: float, act: Callable[[], object], alive: Callable[[], object]) -> bool:
        ended = within(seconds, act, alive)
        found["endless"] += not ended
        return ended

    backends._within = ends
    for epoch in range(1, ROUNDS + 1):
        member.join(epoch, 0, 1)
        delay, group = chance.choice([0.0, chance.uniform(0, 0.002)]), member.group
        begun = [
            group.exchange(torch.zeros(size), torch.ones(size), [half] * 2, [half] * 2) for _ in range(1 + outer.rank)
        ]
        if outer.rank == 0:
            time.sleep(delay)
            continue
        word = threading.Timer(WORD, member.send, (epoch + 1, 0, 1))
        word.start()
        try:
            for work in begun:
                group.wait(work, "an exchange that is cut off")
        except Changed as change:
            cut = work is begun[0]
            found["cut"] += cut
            found["untold"] += cut and str(change) == f"epoch {epoch + 1}"
        word.cancel()
    return found


def main() -> None:
    rows, dist.TIMEOUT = [], 3.0 * ROUNDS
    for size in (2560, 1 << 20):
        first, second = dist.run("tests.bench.cut_off:rounds", 2, size=size)
        endless = [first["endless"], second["endless"]]
        rows.append({"bytes": 4 * size, "rounds": ROUNDS, **second, "endless": endless})
        print(rows[-1], flush=True)
    report.write("cut_off", "make bench-cut-off", rows=rows)


if __name__ == "__main__":
    main()
