from __future__ import annotations

import numpy as np
import pytest

from train.data.order import SLOTS, deal, keys, permute, shares


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 1000, 1025])
def test_permute_is_a_bijection_that_the_key_chooses(size: int) -> None:
    first = permute(np.arange(size), size, keys("a", 1))
    assert sorted(first.tolist()) == list(range(size))
    if size > 16:
        assert first.tolist() != list(range(size))
        assert first.tolist() != permute(np.arange(size), size, keys("a", 2)).tolist()


def test_permute_of_one_index_is_that_of_many() -> None:
    whole = permute(np.arange(777), 777, keys(3))
    assert [int(permute(np.array([i]), 777, keys(3))[0]) for i in (0, 5, 776)] == whole[[0, 5, 776]].tolist()


def test_permute_spreads_neighbours() -> None:
    size = 1 << 40  # far more than could be stored
    image = permute(np.arange(4000), size, keys(9))
    assert len(set(image.tolist())) == 4000
    assert abs(float(image.mean()) / size - 0.5) < 0.02  # standard error 0.0046
    assert abs(float(np.corrcoef(np.arange(4000), image)[0, 1])) < 0.07


def test_shares_are_exact_and_the_earlier_wins_a_tie() -> None:
    assert shares([1.0]) == [SLOTS]
    assert shares([3, 1]) == [768, 256]
    assert shares([1, 1, 1]) == [342, 341, 341]


def test_each_block_of_a_mix_has_its_shares_and_each_source_counts_without_gaps() -> None:
    slots = shares([0.5, 0.3, 0.2])
    source, local = deal(np.arange(3 * SLOTS), slots, seed=1)
    for block in range(3):
        here = source[block * SLOTS : (block + 1) * SLOTS]
        assert np.bincount(here).tolist() == slots
        assert len(set(here[:32].tolist())) > 1  # shuffled, not laid out source after source
    for s, count in enumerate(slots):
        assert sorted(local[source == s].tolist()) == list(range(3 * count))
    assert not np.array_equal(source[:SLOTS], source[SLOTS : 2 * SLOTS])
    some = np.array([2000, 7, 1023, 1024])
    assert deal(some, slots, seed=1)[1].tolist() == local[some].tolist()
