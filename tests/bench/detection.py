"""How many wrong numbers are found, and how soon: `make bench-detection`, beside what train/faults/README.md computes.

Wrong arithmetic, share by share of `recovery.audit`, on four ranks with eight virtual ranks. Which gradients are
audited, by whom, and the comparison are `train/audit.py`'s own; the gradients are small and come from a formula instead
of a model. Measured are

    single      one gradient in each step is wrong, a random one, once: the share of these that is found
    persistent  all that one rank computes is wrong, as host and as auditor: steps until the first find; then all go
                back to a checkpoint and compute again, as the supervisor has them do, until a place is left out by
                `slots.doubtful`: finds until then, and how often it was the right one

Stored bits: some are turned over in the weights and moments of a small model; how many of these times the checksum of
the state, which the guard compares, is another one.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tests.bench import report
from train import audit, optim
from train.config import Optimizer, OptimizerKind
from train.faults.inject import flip
from train.flat import Flat
from train.slots import Slot, Spot, doubtful

RANKS, VIRTUAL = 4, 8
CHECKPOINT = 10  # steps between two that are gone back to
MOST = 60  # finds after which a run has named nobody
SHARES = (0.001, 0.01, 0.1, 1.0)


class Ranks:
    """The audits of all ranks of a run whose gradients are a formula."""

    def __init__(self, share: float, seed: int) -> None:
        self.flat, self.step = Flat(nn.Linear(16, 64)), 0
        self.wrong: set[tuple[int, int]] = set()  # which rank computes which virtual rank's wrongly
        self.hosted = [range(rank * VIRTUAL // RANKS, (rank + 1) * VIRTUAL // RANKS) for rank in range(RANKS)]
        recovery, batch = SimpleNamespace(audit=share), SimpleNamespace(virtual_ranks=VIRTUAL)
        self.config: Any = SimpleNamespace(seed=seed, recovery=recovery, batch=batch)
        self.suspected: list[list[int]] = []
        self.begin(0)

    def begin(self, start: int) -> None:
        """All ranks anew, for the so-many-th time."""
        self.audits = [self._audit(rank, start) for rank in range(RANKS)]

    def _audit(self, rank: int, start: int) -> audit.Audit:
        membership = SimpleNamespace(members=list(range(RANKS)))
        parts: Any = SimpleNamespace(phase=lambda name, step: None, rank=rank)
        state: Any = SimpleNamespace(flat=self.flat)
        reducer: Any = SimpleNamespace(computed=self.hosted)
        group: Any = SimpleNamespace(rank=rank, world=RANKS, membership=membership)
        channel: Any = SimpleNamespace(send=lambda event: self.suspected.append(event.suspects))
        return audit.Audit(self.config, state, parts, reducer, group, channel, start)

    def gradient(self, v: int, tensor: Tensor, rank: int) -> None:
        """As `rank` computes it; wrong ones are so by a plausible amount, of one element."""
        tensor.fill_(self.step + v / VIRTUAL)
        if (rank, v) in self.wrong:
            tensor[7] += 0.01

    def take(self, step: int) -> bool:
        """One step of all ranks; whether any of them finds that two do not agree."""
        self.step, self.suspected = step, []
        leaves, tensor = torch.zeros(VIRTUAL, 2, dtype=torch.int64), torch.zeros(self.flat.length)
        for rank, hosted in enumerate(self.hosted):
            for v in set(hosted) & set(audit.drawn(self.config, step)):
                self.gradient(v, tensor, rank)
                leaves[v, 1] = self.flat.checksum(tensor, 0).sum()
        with patch("train.audit.virtual_rank", lambda v, buffer, _, parts: self.gradient(v, buffer.tensor, parts.rank)):
            for one in self.audits:
                one.phase("optimizer", step)
        found = 0
        for one in self.audits:
            try:
                one.compare(step + 1, [], leaves)
            except audit.Miscomputed:
                found += 1
        return found > 0


def single(share: float, steps: int) -> float:
    """The share of single wrong gradients, one in each step, that is found."""
    ranks, rng, found = Ranks(share, seed=0), random.Random(0), 0
    for step in range(steps):
        v = rng.randrange(VIRTUAL)
        ranks.wrong = {(v * RANKS // VIRTUAL, v)}
        found += ranks.take(step)
    return found / steps


def persistent(share: float, seed: int) -> tuple[int, int, bool | None]:
    """Steps to the first find, finds to the end, and whether the sick rank was left out; None: nobody was."""
    sick, ranks, first = seed % RANKS, Ranks(share, seed), 0
    ranks.wrong = {(sick, v) for v in range(VIRTUAL)}
    slots: dict[Spot, Slot] = {(0, rank): Slot() for rank in range(RANKS)}
    step = 0
    for finds in range(1, MOST + 1):
        while not ranks.take(step):
            step += 1
        first = first or step + 1
        for suspects in ranks.suspected:
            for member in suspects:
                slots[0, member].doubts += 1
        if (spot := doubtful(slots)) is not None:
            return first, finds, spot[1] == sick
        step = step // CHECKPOINT * CHECKPOINT
        ranks.begin(finds)
    return first, MOST, None


def expected(share: float) -> float:
    """Steps to the first find of a rank that is always wrong: its own gradients, audited by others, or theirs by it."""
    own = VIRTUAL // RANKS
    return 1 / (1 - (1 - share) ** own * (1 - share / (RANKS - 1)) ** (VIRTUAL - own))


def flips(bits: int, times: int) -> int:
    """How many of so many times the checksum of a state is another one when so many of its bits are turned over."""
    torch.manual_seed(1)
    flat = Flat(nn.Sequential(nn.Linear(37, 53), nn.LayerNorm(53), nn.Linear(53, 11)), 3)
    state = optim.Stored(optim.build(Optimizer(kind=OptimizerKind.adamw), flat), flat)
    tensors = [tensor for _, tensor in state.parameters() + state.moments()]
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape))
    before, found = state.checksum(), 0
    for seed in range(times):
        for _ in range(2):  # there and back: the same seed turns the same bits over
            flip(tensors, bits, str(seed))
            found += state.checksum() != before
    assert state.checksum() == before
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000, help="with a wrong gradient each, at most")
    parser.add_argument("--trials", type=int, default=100, help="runs with a rank that is always wrong")
    parser.add_argument("--flips", type=int, default=10_000, help="states in which bits are turned over")
    options = parser.parse_args()
    audits: list[dict[str, Any]] = []
    for share in SHARES:
        steps = min(options.steps, round(2000 / share))
        trials = [persistent(share, seed) for seed in range(options.trials)]
        firsts, finds, right = zip(*trials, strict=True)
        row: dict[str, Any] = {"share": share, "single": {"wrong": steps, "found": single(share, steps)}}
        row["persistent"] = {"trials": len(trials), "left_out_rightly": right.count(True)}
        row["persistent"] |= {"left_out_wrongly": right.count(False), "finds": statistics.mean(finds)}
        row["persistent"] |= {"steps_expected": expected(share), "steps_to_first_find": statistics.mean(firsts)}
        row["persistent"]["standard_error"] = statistics.stdev(firsts) / math.sqrt(len(firsts))
        audits.append(row)
        print(row, flush=True)
    stored = [{"bits": bits, "times": options.flips, "found": flips(bits, options.flips)} for bits in (1, 2, 7, 64)]
    print(stored)
    given = f" ARGS='{' '.join(sys.argv[1:])}'" if len(sys.argv) > 1 else ""
    command = f"make bench-detection{given}"
    report.write("detection", command, ranks=RANKS, virtual_ranks=VIRTUAL, audits=audits, stored=stored)
    return int(any(row["found"] < row["times"] for row in stored))


if __name__ == "__main__":
    sys.exit(main())
