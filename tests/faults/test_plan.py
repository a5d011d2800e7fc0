"""The plan of faults: the same for the same seed, even or at a table's rates, and checked before anything starts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from train import compose
from train.checks import Refused
from train.config import Train
from train.faults.plan import KINDS, PHASES, Injection, parse, plan
from train.folder import identity


def config(*overrides: str) -> Train:
    found = compose.config("train", list(overrides))
    assert isinstance(found, Train)
    return found


def test_an_injection_is_its_text() -> None:
    assert parse("kill:1@reduce:5") == Injection(
        id="kill:1@reduce:5", kind="kill", ranks=(1,), phase="reduce", step=5, amount=0
    )
    slow = parse("slow:2+0@forward:10:3:7")
    assert (slow.ranks, slow.amount, slow.steps) == ((0, 2), 3.0, 7)
    assert parse("hang:0@backward:1:2.5").amount == 2.5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("faults.at=[kill]", ["faults.at", "'kill'", "kill:1@reduce:5"]),
        ("faults.at=[kil:1@reduce:5]", ["kil", "kill, segv"]),
        ("faults.at=[kill:1@reduec:5]", ["reduec", "forward, backward"]),
        ("faults.at=[kill:4@reduce:5]", ["none of the 4"]),
        ("faults.at=[kill:1@reduce:560]", ["560 steps"]),
        ("faults.at=[slow:1@forward:5:1]", ["factor above 1"]),
        ("faults.kinds=[die]", ["faults.kinds", "die"]),
        ("faults.phases=[night]", ["faults.phases", "night"]),
        ("faults.count=3", ["faults.phases"]),
        ("faults=nope", ["faults", "drill, llama3, none"]),
    ],
)
def test_a_mistake_is_named_in_one_line(override: str, words: list[str]) -> None:
    with pytest.raises(Refused) as caught:
        config("devices=4", override)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_no_drawn_fault_takes_the_only_rank() -> None:
    with pytest.raises(Refused, match="two ranks"):
        config("devices=1", "faults=drill")
    assert plan(config("devices=1", "faults.at=[kill:0@reduce:5]"))


def test_none_is_none_and_faults_have_no_say_in_what_a_run_is() -> None:
    assert plan(config("devices=4")) == ()
    assert identity(config("faults=drill")) == identity(config())


def test_a_drill_is_even_over_kinds_ranks_phases_and_steps() -> None:
    planned = plan(config("devices=4", "faults=drill", "steps=240", "faults.count=40"))
    assert Counter(one.kind for one in planned) == dict.fromkeys(set(KINDS) - {"sdc"}, 4), (
        "which nobody sees without an audit"
    )
    assert Counter(one.ranks for one in planned) == {(rank,): 10 for rank in range(4)}
    assert {one.phase for one in planned} == set(PHASES)
    steps = [one.step for one in planned]
    assert {b - a for a, b in pairwise(steps)} == {6}
    assert planned[-1].phase != "regroup"
    assert all(one.phase == "forward" for one in planned if one.kind == "slow")
    assert all(one.phase != "regroup" for one in plan(config("devices=2", "faults=drill")))


def test_the_seed_decides() -> None:
    for faults in ("drill", "llama3"):
        one, same, other = (plan(config("devices=4", f"faults={faults}", f"faults.seed={seed}")) for seed in (1, 1, 2))
        assert one == same != other
        assert len({injection.id for injection in one}) == len(one)


def test_the_tables_are_drawn_at_their_rates() -> None:
    """Of a Poisson process with mean 460 nearly all draws lie within five standard deviations."""
    job = config("devices=4", "faults=llama3", "steps=1000")
    table = job.faults.table
    assert sum(row["count"] for row in table["causes"].values()) == 419 + 47
    mean = sum(row["count"] for row in table["causes"].values() if row["inject"])
    assert abs(len(plan(job)) - mean) < 5 * mean**0.5
    many = plan(config("devices=4", "faults=colossus_100k", "steps=1000"))
    mean *= 100_000 / 16_384
    assert abs(len(many) - mean) < 5 * mean**0.5
    halves = Counter(one.step < 500 for one in many)
    assert abs(halves[True] - halves[False]) < 5 * len(many) ** 0.5
    half = replace(job, faults=replace(job.faults, days=27))
    assert len(plan(half)) < 0.7 * len(plan(job))


def test_a_fault_of_a_node_takes_several_ranks_and_never_all() -> None:
    for world, node in ((4, 3), (3, 3), (2, 2)):
        settings = ("batch.virtual_ranks=8", f"faults.node={node}", f"devices={world}")
        sizes = {len(one.ranks) for one in plan(config("faults=llama3", *settings))}
        assert max(sizes) == min(node, world - 1)


def test_two_that_are_alike_have_names_of_their_own() -> None:
    planned = plan(config("devices=2", "faults.at=[kill:1@reduce:5,kill:1@reduce:5]"))
    assert [one.id for one in planned] == ["kill:1@reduce:5", "kill:1@reduce:5#2"]


def test_a_table_of_ones_own_is_checked() -> None:
    job = config("faults=llama3", "devices=2")
    broken = replace(job, faults=replace(job.faults, table={"gpus": 1, "days": 1, "causes": {"x": {}}}))
    with pytest.raises(Refused, match=r"faults\.table.*count"):
        plan(broken)
