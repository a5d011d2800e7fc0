"""The law as arithmetic: the tree is one tree whoever hosts its leaves."""

from __future__ import annotations

import itertools
import random

import pytest

from train.batch import (
    Node,
    children,
    fold,
    maximal,
    micro_batch_seed,
    missing,
    root,
    shares,
    spine,
    taken_over,
)
from train.plan import buffers


def order(node: Node) -> str:
    """The sum under a node, written out."""
    return fold(node, lambda n: str(n.first) if n.is_leaf else None, lambda left, right: f"({left}+{right})")


@pytest.mark.parametrize(
    ("virtual_ranks", "written"),
    [
        (1, "0"),
        (2, "(0+1)"),
        (3, "((0+1)+2)"),
        (5, "(((0+1)+(2+3))+4)"),
        (6, "(((0+1)+(2+3))+(4+5))"),
        (8, "(((0+1)+(2+3))+((4+5)+(6+7)))"),
    ],
)
def test_the_canonical_order(virtual_ranks: int, written: str) -> None:
    assert order(root(virtual_ranks)) == written


@pytest.mark.parametrize("virtual_ranks", [1, 2, 3, 5, 7, 8, 12, 13, 32])
def test_the_order_does_not_depend_on_the_ranks(virtual_ranks: int) -> None:
    """Add up what each rank hosts, then what the ranks have: the same expression for every world size."""
    for world in range(1, virtual_ranks + 1):
        at_hand = {
            node: order(node)
            for hosted in shares(virtual_ranks, world)
            for node in maximal(hosted, root(virtual_ranks))
        }
        total = fold(root(virtual_ranks), at_hand.get, lambda left, right: f"({left}+{right})")
        assert total == order(root(virtual_ranks)), world


def test_any_ownership_gives_the_same_order() -> None:
    """Not contiguous shares only: after a loss, a rank may host any leaves."""
    rng = random.Random(0)
    for virtual_ranks in (5, 8, 11):
        for _ in range(50):
            owner = [rng.randrange(3) for _ in range(virtual_ranks)]
            at_hand = {}
            for rank in range(3):
                for node in maximal({v for v in range(virtual_ranks) if owner[v] == rank}, root(virtual_ranks)):
                    at_hand[node] = order(node)
            assert missing(at_hand, root(virtual_ranks)) == []
            total = fold(root(virtual_ranks), at_hand.get, lambda left, right: f"({left}+{right})")
            assert total == order(root(virtual_ranks))


def test_missing_names_what_is_not_at_hand() -> None:
    assert missing([Node(0, 4), Node(6, 7)], root(8)) == [4, 5, 7]
    with pytest.raises(LookupError, match="virtual rank 4"):
        fold(root(8), {Node(0, 4): 1}.get, lambda left, right: left + right)


def test_children_split_at_the_largest_power_of_two() -> None:
    for leaves in range(2, 200):
        left, right = children(Node(10, 10 + leaves))
        assert left.end == right.first
        assert left.end - left.first == max(2**i for i in range(8) if 2**i < leaves)


def test_shares_are_even_and_cover() -> None:
    for virtual_ranks, world in itertools.product(range(1, 20), range(1, 20)):
        if world > virtual_ranks:
            with pytest.raises(ValueError, match="cannot host"):
                shares(virtual_ranks, world)
            continue
        hosted = shares(virtual_ranks, world)
        assert [v for share in hosted for v in share] == list(range(virtual_ranks))
        assert min(map(len, hosted)) >= 1
        assert max(map(len, hosted)) == -(-virtual_ranks // world)


def test_shares_follow_the_speeds_and_snap_to_subtrees() -> None:
    """The slowest rank is done as early as any cut allows, counted out; ties go to the cut with the fewest subtrees."""
    assert [len(own) for own in shares(8, 2, [3, 1])] == [6, 2]
    assert [len(own) for own in shares(8, 3, [1, 1, 2])] == [2, 2, 4]
    assert [len(own) for own in shares(8, 2, [1000, 1])] == [7, 1], "each rank hosts one at least"
    assert [len(own) for own in shares(6, 4)] == [1, 1, 2, 2], "a subtree each"
    rng = random.Random(0)
    for _ in range(40):
        virtual_ranks, world = rng.randint(3, 9), 3
        speeds = [rng.uniform(0.2, 5) for _ in range(world)]
        cuts = itertools.combinations(range(1, virtual_ranks), 2)
        every = [(max(a / speeds[0], (b - a) / speeds[1], (virtual_ranks - b) / speeds[2])) for a, b in cuts]
        found = shares(virtual_ranks, world, speeds)
        assert max(len(own) / speed for own, speed in zip(found, speeds, strict=True)) == min(every)


def test_a_spine_ends_at_the_last_leaf() -> None:
    for leaves in range(1, 40):
        lefts, leaf = spine(Node(0, leaves))
        assert leaf == Node(leaves - 1, leaves)
        assert [v for left in lefts for v in range(*left)] == list(range(leaves - 1))


def test_a_spine_ends_where_something_is_at_hand() -> None:
    """Nothing under it is asked for; what is at hand on the left is a left sibling like any other."""
    assert spine(Node(0, 8), {Node(4, 8)}) == ([Node(0, 4)], Node(4, 8))
    assert spine(Node(0, 6), {Node(0, 4), Node(4, 5)}) == ([Node(0, 4), Node(4, 5)], Node(5, 6))
    assert spine(Node(0, 4), {Node(0, 4)}) == ([], Node(0, 4))
    assert spine(Node(3, 4)) == ([], Node(3, 4))


def test_what_is_finished_stays_and_the_rest_is_shared_out() -> None:
    """Every virtual rank has one owner, its own where it is finished; nobody gets two more than another."""
    assert taken_over([{0, 1}, {4}, set()], 8) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert taken_over([{0, 1, 2}, {3}, set()], 4) == [[0, 1, 2], [3], []], "a rank may be left with none"
    rng = random.Random(3)
    for _ in range(300):
        virtual_ranks, world = rng.randint(1, 20), rng.randint(1, 6)
        kept: list[set[int]] = [set() for _ in range(world)]
        for v in range(virtual_ranks):
            if rng.random() < 0.5:
                kept[rng.randrange(world)].add(v)
        hosted = taken_over(kept, virtual_ranks)
        assert sorted(itertools.chain(*hosted)) == list(range(virtual_ranks))
        assert all(own <= set(got) and got == sorted(got) for own, got in zip(kept, hosted, strict=True))
        more = [len(got) - len(own) for own, got in zip(kept, hosted, strict=True)]
        assert max(more) - min(more) <= 1


def test_aligned_shares_need_a_buffer_a_level() -> None:
    """log2(n) + 1 for n hosted leaves of an aligned share; one where every rank hosts one."""
    assert [buffers(8, range(n)) for n in (1, 2, 4, 8)] == [1, 2, 3, 4]
    assert buffers(32, range(32)) == 6
    assert buffers(8, range(3, 6)) == 3  # 3 | 4 5: the sums of two subtrees, and a leaf at work


def test_micro_batch_seeds_differ() -> None:
    keys = list(itertools.product(range(2), range(5), range(8), range(3)))
    seeds = {micro_batch_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert micro_batch_seed(0, 0, 0, 0) == 8662518681111019217  # written down: a change here changes every run
