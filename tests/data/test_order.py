from __future__ import annotations

import numpy as np
import pytest

from train.data.order import SLOTS, deal, keys, permute, scramble, shares


def image(count: int, size: int, key: tuple[int, ...]) -> list[int]:
    return [permute(index, size, key) for index in range(count)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 1000, 1025])
def test_permute_is_a_bijection_that_the_key_chooses(size: int) -> None:
    first = image(size, size, keys("a", 1))
    assert sorted(first) == list(range(size))
    if size > 16:
        assert first != list(range(size))
        assert first != image(size, size, keys("a", 2))


def test_permute_and_scramble_give_the_values_that_runs_were_recorded_with() -> None:
    assert image(5, 777, keys(3)) == [722, 554, 686, 508, 138]
    assert scramble(1) == 6238072747940578789
    assert scramble(np.array([1], np.uint64)).tolist() == [scramble(1)]


def test_permute_spreads_neighbours() -> None:
    size = 1 << 40  # far more than could be stored
    found = image(4000, size, keys(9))
    assert len(set(found)) == 4000
    assert abs(float(np.mean(found)) / size - 0.5) < 0.02  # standard error 0.0046
    assert abs(float(np.corrcoef(np.arange(4000), found)[0, 1])) < 0.07


def test_shares_are_exact_and_the_earlier_wins_a_tie() -> None:
    assert shares([1.0]) == [SLOTS]
    assert shares([3, 1]) == [768, 256]
    assert shares([1, 1, 1]) == [342, 341, 341]


def test_each_block_of_a_mix_has_its_shares_and_each_source_counts_without_gaps() -> None:
    slots = shares([0.5, 0.3, 0.2])
    source, local = (np.array(side) for side in zip(*(deal(g, slots, seed=1) for g in range(3 * SLOTS)), strict=True))
    for block in range(3):
        here = source[block * SLOTS : (block + 1) * SLOTS]
        assert np.bincount(here).tolist() == slots
        assert len(set(here[:32].tolist())) > 1  # shuffled, not laid out source after source
    for s, count in enumerate(slots):
        assert sorted(local[source == s].tolist()) == list(range(3 * count))
    assert not np.array_equal(source[:SLOTS], source[SLOTS : 2 * SLOTS])
