"""How a run goes on when its ranks have changed: at its start, after a loss, when a rank has joined or left.

It is always the same: join the newest group; see what each rank has; bring the state of one that has committed the
newest step to all that have not; and give what is missing of the step in flight to new owners. Who has finished leaves
keeps them. Every part may be interrupted by the next change, and then it begins again.

That a rank which dies at any instruction changes no bit needs no more than that: a step is the sum of V leaves along a
fixed tree, whoever computes them, and a rank that has applied it has the state that all would have.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from train import events, optim
from train.balance import Balance
from train.batch import taken_over
from train.buckets import Reducer
from train.channel import Channel
from train.group import Group
from train.keeper import Keeper
from train.loop import Parts, TrainState
from train.ranks import Changed

NOTHING = -1  # the step of a rank that has no state yet


class OtherBits(Exception):
    """A state was received that is not what was sent."""


@dataclass(slots=True)
class Recovery:
    """A rank's part in it."""

    group: Group
    state: TrainState
    parts: Parts
    reducer: Reducer
    keeper: Keeper
    balance: Balance
    channel: Channel
    begin: Callable[[], None]  # for the first group of all: restore a checkpoint, or start
    joined: bool = False  # the first group has been joined already
    whole: bool = False  # this rank has a state
    unshaken: bool = True  # hands are to be shaken: this rank is new, or was interrupted in it

    def regroup(self) -> None:
        """Go on in the newest group; raises Dismissed where this rank is not in it."""
        led, began = self.group.rank == 0, time.perf_counter()
        lost_save = self.whole and self.keeper.saver.part(self._lost)
        while True:
            try:
                self._regroup(led, lost_save, began)
                self.group.settled = self.group.membership
                return
            except Changed:
                continue

    def _regroup(self, led: bool, lost_save: bool, began: float) -> None:
        group, state, reducer, recorder = self.group, self.state, self.reducer, self.parts.recorder
        recorder.flush()  # numbers read late are of these ranks, and ask to leave this group, not the next
        if not self.joined:
            group.join()
        self.joined = False
        membership = group.membership
        self.parts.phase("regroup", state.step)
        reducer.lay_out()
        leads = group.rank == 0
        again = lost_save or (leads and not led)  # what was due may not have been done, or not have been said
        kept, last = reducer.kept(), recorder.last
        mine = [state.step if self.whole else NOTHING, 0 if again else min(state.handled, 2**31)]
        mine += [last.numbers.numel() if last else 0, last.world if last else 0, self.unshaken]
        rows = group.all_gather(torch.tensor([*mine, *(int(v in kept) for v in range(reducer.virtual_ranks))]))
        steps = rows[:, 0].tolist()
        self.unshaken, step = bool(rows[:, 4].any()), max(steps)
        if step == NOTHING:
            self.begin()
            group.barrier()  # nobody has begun unless rank 0 has said so: it may be lost here, and all begin again
        else:
            source = steps.index(step)
            if min(steps) < step:
                self._hand_over(source, step, *rows[source, 2:4].tolist())
            handled = zip(steps, rows[:, 1].tolist(), strict=True)
            state.handled = min(many if at == step else 0 for at, many in handled if at != NOTHING)
        self.whole = True
        self.keeper.saver.regrouped(state.pieces(), state.step)
        self.balance.regrouped(state, self.parts, self.unshaken)
        self.unshaken = False
        in_flight = step != NOTHING and all(at in (step, NOTHING) for at in steps)
        flags = rows[:, 5:].bool().tolist() if in_flight else []
        finished = [{v for v, flag in enumerate(row) if flag} for row in flags]
        if any(finished):
            reducer.take_over(taken_over(finished, reducer.virtual_ranks))
        else:
            reducer.forget()
        recorder.regrouped(membership.recorded if leads and not led and step != NOTHING else None)
        if leads and step != NOTHING:
            count = sum(map(len, finished))
            self.channel.send(
                events.Regroup(
                    step=state.step,
                    epoch=membership.epoch,
                    members=membership.members,
                    world=group.world,
                    why=membership.why if set(group.settled.members) - set(membership.members) else "joined",
                    kept=count,
                    redone=reducer.virtual_ranks - count if count else 0,
                    seconds=time.perf_counter() - began,
                )
            )

    def _lost(self) -> bool:
        """Whether a rank of this group is gone, as far as is known: it has failed, or the next is without that rank."""
        newer = self.group.newer()
        return newer is None or not set(self.group.membership.members) <= set(newer.members)

    def _hand_over(self, source: int, step: int, size: int, world: int) -> None:
        """Bring the state after `step`, and the numbers of that step, from rank `source` to the ranks without it."""
        group, state, recorder = self.group, self.state, self.parts.recorder
        receives = not self.whole or state.step < step
        self.whole = not receives  # until all has arrived
        for piece in state.pieces():
            group.broadcast(piece.data, source)
        last = recorder.last
        assert receives or last is None or last.step == step
        rate = torch.tensor(last.rate if last else 0.0, dtype=torch.float64)
        numbers = last.numbers if last and not receives else torch.zeros(size, dtype=torch.int64)
        group.broadcast(rate, source)
        if size:
            group.broadcast(numbers, source)
        checksum = optim.Stored(state.optimizer, state.flat).checksum()
        if group.all_gather(torch.tensor(checksum))[source] != checksum:
            raise OtherBits(f"the state of step {step} did not arrive as rank {source} sent it")
        if receives:
            self.reducer.forget()
            state.restored(step)
            if size:
                recorder.catch_up(step, rate.item(), numbers, world)
        self.whole = True
