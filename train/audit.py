"""Whether what a rank computed is what comes out: a share of the virtual ranks' gradients, computed again elsewhere.

A device that now and then multiplies wrongly leaves no trace: every rank adds what it says. The law makes it a question
with an answer: virtual rank v's gradient in a step has the same bits whoever computes it. So each is drawn with the
probability `recovery.audit`, by a formula; a rank that did not host it computes it too, before the optimizer changes
the parameters, and compares the checksums when the step's numbers have arrived. Where they differ one of two ranks is
wrong. The step is in all states by then, so all ranks start again from the last checkpoint, which is older: numbers
arrive before anything is saved. Who is wrong again and again, whoever checks, is left out by the supervisor.

The share is the probability that a single wrong gradient is found, and about what it costs.
"""

from __future__ import annotations

import random

from torch import Tensor

from train import events
from train.batch import micro_batch_seed
from train.buckets import Reducer
from train.channel import Channel
from train.config import Train
from train.evidence import word
from train.group import Group
from train.loop import Parts, TrainState, virtual_rank


class Miscomputed(Exception):
    """Two ranks do not compute the same bits."""

    fault = "miscomputed"


class Audit:
    """A rank's part: what it computes again, and what comes out."""

    def __init__(
        self, config: Train, state: TrainState, parts: Parts, reducer: Reducer, group: Group, channel: Channel, nth: int
    ) -> None:
        """`parts` are what a step is made of; `phase` below goes into its own. `nth`: which start of the run it is."""
        self._config, self._state, self._parts, self._nth = config, state, parts, nth
        self._reducer, self._group, self._channel = reducer, group, channel
        self._found: dict[tuple[int, int], tuple[int, int]] = {}  # (step, v) -> its checksum here, who computed it

    def phase(self, name: str, step: int) -> None:
        """What the loop calls: what it called before and, when the sum is there, the audit."""
        self._parts.phase(name, step)
        if name == "optimizer":
            for v in drawn(self._config, step):
                self._again(v, step)

    def compare(self, step: int, seconds: list[float], leaves: Tensor) -> None:
        """`leaves`: (V, 2) int64, the checksums of tokens and gradient of each virtual rank of a committed step.

        Raises Miscomputed where this rank computed one of them too, and found something else.
        """
        for (at, v), (mine, host) in sorted(self._found.items()):
            if at == step - 1 and (theirs := int(leaves[v, 1])) != mine:
                members = self._group.membership.members
                suspects = [members[host], members[self._group.rank]]
                self._channel.send(events.Audited(step=step, virtual_rank=v, suspects=suspects))
                raise Miscomputed(
                    f"virtual rank {v}'s gradient in step {step} is {word(theirs)} from rank {suspects[0]} "
                    f"and {word(mine)} from rank {suspects[1]}"
                )
        self._found = {(at, v): found for (at, v), found in self._found.items() if at >= step}

    def _again(self, v: int, step: int) -> None:
        host = next(rank for rank, own in enumerate(self._reducer.computed) if v in own)
        world = self._group.world
        turn = random.Random(f"{self._nth} {step} {v}").randrange(max(1, world - 1))
        if self._group.rank != (host + 1 + turn) % world:
            return
        flat = self._state.flat
        buffer = flat.buffer()
        flat.attach(buffer)
        virtual_rank(v, buffer, self._state, self._parts)
        self._found[step, v] = int(flat.checksum(buffer.tensor, 0).sum()), host


def drawn(config: Train, step: int) -> list[int]:
    """The virtual ranks whose gradients are audited in a step: each with the probability `recovery.audit`."""
    seeds = ((v, micro_batch_seed(config.seed, step, v, -1)) for v in range(config.batch.virtual_ranks))
    return [v for v, seed in seeds if seed < config.recovery.audit * 2**63]
