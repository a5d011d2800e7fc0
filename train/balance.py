"""Who hosts how much: the handshake at the start, and shares that follow the ranks' speeds.

None of it has a say in the bits, as long as the ranks compute the same ones. That is what the handshake is for: all
ranks compute one same micro-batch, and compare. Where they differ it is said loudly and recorded, and ownership stays
as it is: moving a virtual rank would then change the result.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from train import events
from train.batch import shares
from train.buckets import Reducer
from train.channel import Channel
from train.config import Train
from train.evidence import word
from train.faults.slow import slow
from train.group import Group
from train.loop import Parts, TrainState, micro_batch

WINDOW = 10  # steps of which the median counts
LASTING = 2.0  # seconds of computing, in two windows at least, for which who is named has been slow without a pause
GAIN = 0.1  # what the slowest rank must win for the shares to change: less is noise
TRIALS = 3  # of the handshake's micro-batch; the first pays for warming up


class Balance:
    """The shares of a run, equal on every rank at every step because all decide from the same gathered numbers."""

    def __init__(self, config: Train, group: Group, reducer: Reducer, channel: Channel) -> None:
        self._config, self._group, self._reducer, self._channel = config, group, reducer, channel
        self._follows = config.batch.weights == "auto"
        self._seconds: list[list[float]] = []
        self._slow: dict[int, list[float]] = {}  # members, and the seconds of the windows in which they have been
        self._named: set[int] = set()  # of them, until they are as fast as the others again

    def regrouped(self, state: TrainState, parts: Parts, joined: bool) -> None:
        """The ranks have changed: share out anew; with newcomers among them, shake hands first."""
        self._seconds = []
        weights = self._config.batch.weights
        self._reducer.assign(self._shares(()))  # who caught up with a step may have shared out anew by it, alone
        if joined and self._group.world > 1:
            self._handshake(state, parts)
        if not isinstance(weights, str) and len(weights) == self._group.world > 1:
            self._assign(state.step, self._shares(weights), "batch.weights")

    def _handshake(self, state: TrainState, parts: Parts) -> None:
        """Compute the same micro-batch on all ranks: compare the bits, and take the first measure of their speeds."""
        digest, seconds = _same_micro_batch(state, parts, TRIALS if self._follows else 1)
        rows = self._group.all_gather(torch.tensor([digest, int(seconds * 1e9), self._follows]))
        digests, times = rows[:, 0].tolist(), [nanoseconds / 1e9 for nanoseconds in rows[:, 1].tolist()]
        equal = len(set(digests)) == 1
        self._follows = equal and bool(rows[:, 2].all())  # a newcomer knows nothing of an earlier handshake
        if self._group.rank == 0:
            words = list(map(word, digests))
            self._channel.send(events.Handshake(step=state.step, equal=equal, digests=words, seconds=times))
            if not equal:
                others = [rank for rank, number in enumerate(digests) if number != digests[0]]
                text = (
                    f"ranks {', '.join(map(str, others))} compute other bits than rank 0 on the same micro-batch: the "
                    "result depends on the number of ranks and on who hosts what, which is therefore left as it is"
                )
                self._channel.send(events.Warned(rank=0, text=text))
        if self._follows:
            self._follow(state.step, times, "measured at the start")

    def warm_up(self, state: TrainState, parts: Parts) -> None:
        """Compute a micro-batch alone, so that compilers and caches have done their work before others wait."""
        _same_micro_batch(state, parts, 1)

    def observe(self, step: int, seconds: list[float], leaves: Tensor | None = None) -> None:
        """Take what each rank needed for a leaf in a step: name who is slow, and share out anew where it pays."""
        if 0.0 in seconds or len(seconds) != self._group.world:
            return
        self._seconds.append(seconds)
        if len(self._seconds) == WINDOW:
            medians = [statistics.median(of_rank) for of_rank in zip(*self._seconds, strict=True)]
            loads = list(map(len, self._reducer.hosted))
            took = sum(max(n * s for n, s in zip(loads, row, strict=True)) for row in self._seconds)
            self._seconds = []
            self._name(step, slow(medians), took)
            if self._follows:
                self._follow(step, medians, "measured")

    def _name(self, step: int, slow: dict[int, float], took: float) -> None:
        """A window is short where steps are; and on a busy machine somebody is slow in one of forty by chance."""
        members = self._group.membership.members
        times = {members[rank]: factor for rank, factor in slow.items()}
        self._slow = {member: [*self._slow.get(member, []), took] for member in times}
        lasting = {member for member, spans in self._slow.items() if len(spans) > 1 and sum(spans) >= LASTING}
        for member in sorted(lasting - self._named) if self._group.rank == 0 else ():
            self._channel.send(events.Slow(rank=member, step=step, times=times[member]))
        self._named = lasting

    def _follow(self, step: int, seconds: list[float], why: str) -> None:
        now, better = self._reducer.hosted, self._shares([1 / s for s in seconds])
        slowest = [max(len(own) * s for own, s in zip(cut, seconds, strict=True)) for cut in (now, better)]
        if slowest[1] < (1 - GAIN) * slowest[0]:
            self._assign(step, better, why)

    def _shares(self, speeds: Sequence[float]) -> list[range]:
        return shares(self._config.batch.virtual_ranks, self._group.world, speeds)

    def _assign(self, step: int, hosted: list[range], why: str) -> None:
        self._reducer.assign(hosted)
        if self._group.rank == 0:
            self._channel.send(events.Ownership(step=step, shares=[len(own) for own in hosted], why=why))


def _same_micro_batch(state: TrainState, parts: Parts, trials: int) -> tuple[int, float]:
    """Loss and gradient of virtual rank 0's first micro-batch, as 63 bits; and the seconds of the fastest trial."""
    buffer = state.flat.buffer()
    state.flat.attach(buffer)
    times = []
    for _ in range(trials):
        buffer.tensor.zero_()
        buffer.loss.zero_()
        started = time.perf_counter()
        micro_batch(0, 0, buffer, state, parts)
        loss = float(buffer.loss)  # waits for the device
        times.append(time.perf_counter() - started)
    gradient = buffer.tensor[: state.flat.size].cpu().numpy().data
    content = hashlib.blake2b(gradient, key=loss.hex().encode(), digest_size=8)
    return int.from_bytes(content.digest(), "big") >> 1, min(times)
