"""Faults on order: a list of injections that a configuration and its seed decide once and for all.

An injection is written `KIND:RANK[+RANK…]@PHASE:STEP[:AMOUNT[:STEPS]]`: `kill:1@reduce:5`, a node of two ranks
`kill:0+1@forward:9`, one of three times the time for 20 steps `slow:2@forward:10:3:20`. That text is its name, in the
plan and in the run's record. STEP is the number of steps committed by then. It strikes the first time, from that step
on, that its rank comes to that phase; so one for a phase that is rare (`checkpoint`, `regroup`) waits for it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from train.checks import Refused, choice, needed, require
from train.config import Faults, Train

# kind -> what AMOUNT is if it is left out: seconds; of `slow` the factor, of `flip` how many bits of the rank's state.
# An hour is forever: somebody has to notice.
KINDS = {"kill": 0, "segv": 0, "stop": 0, "gil": 3600, "hang": 3600, "exception": 0, "exit": 0, "slow": 1.5, "flip": 1}
KINDS |= {"nan": 0, "sdc": 0}
IN_A_LEAF = {"slow": "forward", "nan": "backward", "sdc": "backward"}  # what strikes only while something is computed
PHASES = ("forward", "backward", "reduce", "optimizer", "commit", "evaluation", "checkpoint", "regroup")
SLOW_STEPS = 20  # that a rank is slow for, if it is not said

_FORM = re.compile(r"(\w+):(\d+(?:\+\d+)*)@(\w+):(\d+)(?::(\d+(?:\.\d+)?))?(?::(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    id: str  # its text; of several that are alike the second is `…#2`
    kind: str
    ranks: tuple[int, ...]  # places in the group, all at once
    phase: str
    step: int  # steps committed
    amount: float
    steps: int = SLOW_STEPS


def parse(text: str) -> Injection:
    """An injection from its text; raises Refused."""
    why = f"'{text}' is no fault: write KIND:RANK@PHASE:STEP, as in kill:1@reduce:5"
    kind, ranks, phase, step, amount, steps = needed(_FORM.fullmatch(text), "faults.at", why).groups()
    choice(kind, "faults.at", tuple(KINDS))
    choice(phase, "faults.at", PHASES)
    amount = KINDS[kind] if amount is None else float(amount)
    require(kind != "slow" or amount > 1, "faults.at", f"'{text}' slows nothing: use a factor above 1")
    places = tuple(sorted(set(map(int, ranks.split("+")))))
    steps = SLOW_STEPS if steps is None else int(steps)
    return Injection(id=text, kind=kind, ranks=places, phase=phase, step=int(step), amount=amount, steps=steps)


def plan(config: Train) -> tuple[Injection, ...]:
    """All injections of a run, by step. Raises Refused.

    Where the number of ranks is still `auto`, it is taken for the most that there can be.
    """
    faults, devices = config.faults, config.devices
    world = devices * config.least_nodes if isinstance(devices, int) else config.batch.virtual_ranks
    for key, names in (("kinds", KINDS), ("phases", PHASES)):
        for name in getattr(faults, key):
            choice(name, f"faults.{key}", tuple(names))
    texts = list(faults.at)
    if faults.count or faults.table:
        require(world > 1, "faults", "need two ranks or more, of which one stays: use devices=2, or faults.at=[…]")
        require(bool(faults.phases), "faults.phases", "name the phases in which drawn faults strike")
        require(faults.node >= 1, "faults.node", "must be at least 1")
    if faults.count:
        require(bool(faults.kinds), "faults.kinds", "name the kinds of which faults.count are drawn")
        texts += _spread(faults, config.steps, world)
    texts += _drawn(faults, config.steps, world) if faults.table else []
    planned = [parse(text) for text in texts]
    for one in planned:
        there = f"'{one.id}' is for a rank that is none of the {world}, 0 … {world - 1}"
        require(max(one.ranks) < world, "faults.at", there)
        late = f"'{one.id}' never comes: after {config.steps} steps nothing is computed"
        require(one.step < config.steps or one.phase in PHASES[5:], "faults.at", late)
    return tuple(sorted(_named(planned), key=lambda one: one.step))


def _named(planned: Iterable[Injection]) -> Iterator[Injection]:
    times: dict[str, int] = {}
    for one in planned:
        times[one.id] = times.get(one.id, 0) + 1
        yield one if times[one.id] == 1 else replace(one, id=f"{one.id}#{times[one.id]}")


def _spread(faults: Faults, steps: int, world: int) -> list[str]:
    """`count` of them at even distances; kinds, phases and ranks each as evenly as the count allows."""
    rng = random.Random(faults.seed)
    rows = zip(*(_dealt(x, faults.count, rng) for x in (faults.kinds, faults.phases, range(world))), strict=True)
    texts = []
    for i, (kind, phase, rank) in enumerate(rows):
        step = (2 * i + 1) * steps // (2 * faults.count)
        # The last one has no later recovery to strike in, and of two ranks one is left, which a recovery needs.
        never = phase == "regroup" and (world == 2 or i == faults.count - 1)
        texts.append(f"{kind}:{rank}@{IN_A_LEAF.get(kind, 'forward' if never else phase)}:{step}")
    return texts


def _dealt(cards: Iterable[Any], count: int, rng: random.Random) -> Iterator[Any]:
    """`count` cards: whole decks, each shuffled."""
    deck = list(cards)
    decks = (card for _ in range(count) for card in rng.sample(deck, len(deck)))
    return islice(decks, count)


def _drawn(faults: Faults, steps: int, world: int) -> list[str]:
    """A Poisson process for each cause of the table, independent of the others'."""
    texts = []
    try:
        scale = faults.gpus / faults.table["gpus"] * faults.days / faults.table["days"]
        for cause, row in faults.table["causes"].items():
            rng, rate, kinds = random.Random(f"{faults.seed} {cause}"), row["count"] * scale, row["inject"]
            block = min(faults.node, world - 1) if row.get("node") else 1
            time = rng.expovariate(rate) if kinds and rate else 1.0  # in run lengths
            while time < 1:
                kind, phase, first = rng.choice(kinds), rng.choice(faults.phases), rng.randrange(world)
                ranks = "+".join(str((first + i) % world) for i in range(block))
                texts.append(f"{kind}:{ranks}@{IN_A_LEAF.get(kind, phase)}:{int(time * steps)}")
                time += rng.expovariate(rate)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        why = "a table has gpus, days and causes, each with count and inject"
        raise Refused("faults.table", f"{why} ({type(error).__name__}: {error})") from error
    return texts
