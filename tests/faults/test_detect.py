"""The guard: what it takes, when it looks, and that no changed bit escapes it."""

from __future__ import annotations

import random
import statistics
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from train import optim
from train.balance import WINDOW
from train.config import Optimizer, OptimizerKind
from train.faults.detect import CHECKED, Corrupted, Guard
from train.faults.inject import flip
from train.faults.slow import slow
from train.flat import Flat

STEP = ("forward", "backward", "reduce", "optimizer", "commit")


def held(state: optim.Stored) -> list[tuple[int, torch.Tensor]]:
    return state.parameters() + state.moments()


def stored() -> optim.Stored:
    torch.manual_seed(1)
    flat = Flat(nn.Sequential(nn.Linear(37, 53), nn.LayerNorm(53), nn.Linear(53, 11)), 3)
    optimizer = optim.build(Optimizer(kind=OptimizerKind.adamw), flat)
    for _, tensor in held(optim.Stored(optimizer, flat)):
        tensor.copy_(torch.randn(tensor.shape))
    return optim.Stored(optimizer, flat)


@pytest.mark.parametrize("bits", [1, 2, 7])
def test_no_changed_bit_escapes_the_checksum(bits: int) -> None:
    """Weights and both moments. One bit: always. Several could cancel out; of 500 tries none did."""
    state = stored()
    before, copies = state.checksum(), [(tensor, tensor.clone()) for _, tensor in held(state)]
    assert len(copies) == 1 + 2 * 2, "parameters; two moments of matrices and of vectors"
    for seed in range(500):
        flip([tensor for tensor, _ in copies], bits, str(seed))
        changed = any(not torch.equal(now.view(torch.int32), was.view(torch.int32)) for now, was in copies)
        assert changed == (state.checksum() != before)
        for now, was in copies:
            now.copy_(was)
    assert state.checksum() == before


PLACES = [(phase, step) for step in range(3) for phase in STEP]
PLACES[5:5] = [("evaluation", 1), ("checkpoint", 1), ("regroup", 1)]


@pytest.mark.parametrize("what", ["parameters", "moments"])
@pytest.mark.parametrize("strikes", range(len(PLACES) - 1))
def test_a_flip_is_found_before_it_counts(strikes: int, what: str) -> None:
    """Wherever it strikes in a run's life, it is found at the next phase from which anything would leave the rank.

    No gradient is made from moments: there they may be wrong until the optimizer reads them.
    """
    memory = {"parameters": 0, "moments": 0}

    def phase(name: str, step: int) -> None:
        if (name, step) == PLACES[strikes]:
            memory[what] ^= 1 << random.Random(strikes).randrange(64)

    guard, found = Guard(phase, lambda: memory["parameters"], lambda: memory["moments"]), None
    for name, step in PLACES:
        try:
            guard(name, step)
        except Corrupted:
            found = (name, step)
            break
        if name == "optimizer":
            memory = {name: bits + 1000 for name, bits in memory.items()}  # the update itself
    looks = [name for name in CHECKED if what == "parameters" or name != "reduce"]
    assert found == next((place for place in PLACES[strikes:] if place[0] in looks), None)


def test_a_state_that_was_brought_is_no_corruption() -> None:
    """A regroup may bring a newer state, or begin to and be interrupted: it is not compared with the old one."""
    memory = SimpleNamespace(bits=1)
    guard = Guard(lambda name, step: None, lambda: memory.bits, lambda: 0)
    for name in STEP:
        guard(name, 0)
    guard("regroup", 1)
    memory.bits = 2  # half of it has arrived
    guard("regroup", 1)
    memory.bits = 3
    for name in STEP:
        guard(name, 2)
    memory.bits = 4
    with pytest.raises(Corrupted, match=r"before reduce: checksums 0000000000000003 .*, now 0000000000000004"):
        guard("reduce", 3)


@pytest.mark.parametrize("times", [1.5, 3.0])
def test_who_is_slow_is_named_and_nobody_else(times: float) -> None:
    """Precision and recall over 4,000 windows of 4 ranks, in every other one of which one rank is slow: the times of a
    leaf spread log-normally by 15 % from step to step, as they do on a machine that is shared."""
    rng, right, wrong, missed = random.Random(1), 0, 0, 0
    for trial in range(4000):
        culprit = trial // 2 % 4 if trial % 2 else None
        of_ranks = [
            statistics.median(rng.lognormvariate(0, 0.15) * (times if rank == culprit else 1) for _ in range(WINDOW))
            for rank in range(4)
        ]
        named = slow(of_ranks)
        right += culprit in named
        missed += culprit is not None and culprit not in named
        wrong += len(named.keys() - {culprit})
    assert right / (right + wrong) >= 0.95
    assert right / (right + missed) >= 0.95
    assert slow([1.0, 1.0, 2.0]) == {2: 2.0}
    assert slow([1.0, 2.0]) == {1: 2.0}
    assert slow([1.0]) == {}
