"""The parent of the ranks: starts them, watches them, records what they report, and passes on what the user wants.

It never imports torch. While the data is prepared, a forkserver imports torch and lightning once; ranks are forked from
it. This process is the only writer of `events.jsonl`. The first SIGINT, SIGTERM or SIGUSR1, here or at any rank, or
`stop_after`, makes the ranks agree on a step, save and stop; the second one here ends them at once.

It alone says which processes are the ranks of the run, on this node, which is node 0, and on others, where agents do
as it says. When one is lost it tells the others, who go on without it, or with a spare that stands by, and forks
another, which joins them when it is ready. Where no rank can go on, all start again from the last checkpoint; where
that leads nowhere, the run ends, with the cause in one line; nothing is left behind.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from multiprocessing.connection import wait
from typing import Any

from train import events, folder
from train.channel import MARK, RECORDED, STOP, Requests
from train.checks import DONE, FAILED, REFUSED, STOPPED, seconds
from train.config import Train
from train.console import Console
from train.data.writing import Preparer
from train.faults.losses import Losses
from train.fleet import Fleet
from train.processes import Rank
from train.remote import RemoteRank, There
from train.slots import BACK_OFF, LIVES, QUICK, Slot, Spot, doubtful
from train.summary import summarize

MOURNING = 1.0  # seconds in which the others may say what a dead rank did to them, before it is named
GOES_ON = -1  # no exit code: the ranks that are left take over
POISON = ("not finite", "miscomputed")  # faults that every rank's state has part in, when one of them is seen
TRIES = 6  # times that a step's loss may be no good, before the run fails


class Supervisor:
    def __init__(
        self,
        config: Train,
        run: folder.RunFolder,
        console: Console,
        fleet: Fleet,
        preparer: Preparer | None,
        requests: Requests,
    ) -> None:
        self._config, self._run, self._console = config, run, console
        self._fleet, self._preparer, self._requests = fleet, preparer, requests
        self._ranks: list[Rank | RemoteRank] = []
        self._log = events.EventLog(run.events_path)
        self._heeded = False  # what was asked of this process
        self._asked = self._stopped = False  # the ranks
        limit = seconds(config.stop_after)
        self._deadline = None if limit is None else time.monotonic() + limit
        self._members: list[int] = []  # who shall belong together
        self._present: list[int] = []  # who does, as far as they have said
        self._ending = False  # a rank has come to the end of the run
        self._slots: dict[Spot, Slot] = {}
        self._next_member = self._epoch = self._writer_epoch = 0
        self._last = {"step": 0, "digests": 0}  # of these events, the last step that has one
        self._causes: Counter[tuple[Any, ...]] = Counter()  # of faults that were survived, and how often
        self._fresh: set[tuple[Any, ...]] = set()  # of those since the ranks last went on: one may take several ranks
        self._futile = self._furthest = 0  # restarts of all ranks since the last new step; that step
        self._losses = Losses(config.recovery.spike or float("inf"))
        self._wrong: int | None = None  # the step, counted from 1, whose loss cannot be right
        self._rolled: Counter[int] = Counter()  # how often each such step has been gone back from
        self._heals = config.heals
        for record in run.events() if config.recovery.spike else ():  # an interruption has no say in what is a spike
            if record["kind"] == "step":
                self._losses.spikes(record)
            elif record["kind"] == "rollback":
                self._rolled[record["step"]] += 1

    def run(self, resume: bool) -> int:
        """Start the ranks, watch them to their end, write the summary."""
        try:
            self._start(resume)
            while (code := self._watch()) is None:
                self._end_all()
                self._start(self._run.checkpointed(), again=True)
        finally:
            self._end_all()
            self._console.close()
        if code in (DONE, STOPPED):
            records = list(self._run.events())
            summary = summarize(records)
            try:
                folder.replace(self._run.path / "summary.json", json.dumps(summary, indent=1))
            except OSError as error:
                self._console.say(f"summary.json could not be written ({error.strerror})")
            self._console.summary(self._config, self._run.path, summary, records)
        self._log.close()
        return code

    def _start(self, resume: bool, again: bool = False) -> None:
        """All ranks anew, from the newest checkpoint or from the beginning."""
        self._fleet.meet()
        self._lay_out()
        for there in self._fleet.others.values():
            there.brief(self._run.events())
        used = [spot for spot, slot in self._slots.items() if not slot.left_out][: self._most]
        self.record(events.Launch(world=len(used), again=again))
        self._writer_epoch = 1 + sum(record["kind"] == "start" for record in self._run.events())
        self._next_member, self._last = 0, dict.fromkeys(self._last, 0)
        for spot in used:
            self._fork(spot, resume, joins=False)
        self._members = self._present = list(range(len(used)))
        self._ending = False
        self._publish("start")

    def _lay_out(self) -> None:
        """Places for ranks on all nodes, and for spares: who finds no virtual rank to host is one."""
        self._most = min(self._fleet.devices, self._config.batch.virtual_ranks)
        spots = self._fleet.spots(self._config.recovery.spares)
        self._slots = {spot: self._slots.get(spot, Slot()) for spot in spots}

    def _fork(self, spot: Spot, resume: bool, joins: bool) -> None:
        (node, slot), member = spot, self._next_member
        self._next_member += 1
        order = {"member": member, "writer_epoch": self._writer_epoch, "resume": resume, "joins": joins}
        self._ranks.append(self._fleet.at(node).fork(slot, {**order, "left_out": self._run.left_out()}))

    def _admit(self, why: str = "joined") -> None:
        """Make members of those who stand by, as far as there is work for them; tell all, if there is any change."""
        chosen = [rank for rank in self._ranks if rank.stands_by][: max(0, self._most - len(self._members))]
        for rank in chosen:
            rank.stands_by, rank.named = False, True
        self._members = [*self._members, *(rank.member for rank in chosen)]
        node = {rank.member: rank.spot[0] for rank in self._ranks}
        self._members.sort(key=lambda member: node.get(member, 0))  # rank 0 saves: where the run's folder is, if it can
        if chosen or why != "joined":
            self._publish(why)

    def _publish(self, why: str) -> None:
        """Tell the ranks who belongs together from now on."""
        self._epoch += 1
        alive = {rank.member: rank.spot[0] for rank in self._ranks}
        if why in ("joined", "resized") and not alive.keys() >= set(self._present):
            why = "lost"  # and they have not gone on without it: nobody may wait for the end of a step
        first = next(rank for rank in self._ranks if rank.member == self._members[0])
        membership = {
            "epoch": self._epoch,
            "members": self._members,
            "host": self._fleet.at(first.spot[0]).host,
            "port": first.port,
            "hosts": [alive.get(member, 0) for member in self._members],
            "recorded": self._last["step"],
            "boundary": why in ("joined", "resized"),
            "why": why,
        }
        for rank in self._ranks:
            if rank.named:
                rank.tell(json.dumps(membership).encode())

    def _end_all(self) -> None:
        for rank in self._ranks:
            rank.end()
        self._ranks = []

    def _watch(self) -> int | None:
        """Until the run is over; returns its exit code. None: all ranks must be started again."""
        while True:
            sources = [source for rank in self._ranks for source in rank.sources()]
            wait([*self._fleet.sources(), *sources], timeout=0.2)
            for there in self._fleet.meet():
                self._console.say(f"node {there.index} has {'gone' if there.link.lost else 'come'}")
                self._lay_out()
                there.brief(self._run.events())
            dead = [rank for rank in self._ranks if not rank.alive]
            self._hear()
            if len(self._requests.names) > 1:
                self._console.say(f"stopped at once ({self._requests.names[1]}); the last checkpoint stands")
                return FAILED
            self._ask_to_stop()
            if self._preparer is not None and (error := self._preparer.poll(self._record)):
                self._console.error(f"the data: {error}")
                return FAILED
            self._end_silence()
            if self._wrong is not None and not (self._asked or self._ending):
                return self._roll_back(self._wrong)
            lost = [rank for rank in dead if not rank.left]
            if lost and not self._heals:
                lost = [self._culprit(lost)]
            self._ranks = [rank for rank in self._ranks if rank not in dead]
            if lost and (verdict := self._bury(lost)) is not GOES_ON:
                return verdict
            if self._ending and not any(rank.member in self._present for rank in self._ranks):
                return STOPPED if self._stopped else DONE
            self._resize()
            self._replace()

    def _end_silence(self) -> None:
        """A rank that gives no sign of life any more says where it is stuck, and is killed: the others wait for it."""
        for rank in self._ranks:
            if rank.fault is None and (found := rank.silent()):
                cause = f"no sign of life for {found[0]:.1f} s: killed; where it was stuck is at the end of its log"
                at = {str(one.member): one.flight() for one in self._ranks}
                said = events.Fault(fault="hang", phase=found[1], rank=rank.member, step=None, cause=cause, flight=at)
                rank.fault = said.record()
                self._record(rank.fault)
                rank.dump()
                rank.kill()

    def _hear(self) -> None:
        """Take in all that the ranks have sent. Where one asks whether that is on the disk, make it so and answer."""
        for rank in self._ranks:
            for word in rank.words():
                if word == MARK:
                    self._log.sync()
                    rank.tell(RECORDED)
                    continue
                record = json.loads(word)
                if rank.spot[0]:
                    record["time"] = time.time()  # clocks differ
                self._record(record, rank)

    def record(self, event: events.Event) -> None:
        self._record(event.record())

    def _record(self, record: dict[str, Any], rank: Rank | RemoteRank | None = None) -> None:
        kind = record["kind"]
        if kind in self._last:
            if record["step"] <= self._last[kind]:
                return  # it was said by who was rank 0 before
            self._last[kind] = record["step"]
            if record["step"] > self._furthest:  # one that is only done again may lead to the same end
                self._futile, self._furthest = 0, record["step"]
        if kind == "step" and self._losses.spikes(record):
            self._wrong = record["step"]
        elif rank is not None and kind == "left":
            rank.left = True
            self._stopped = self._stopped or record["stopped"]
            self._ending = self._ending or rank.member in self._members
            self._members = [member for member in self._members if member != rank.member]
        elif rank is not None and kind == "fault":
            rank.fault = record
        elif rank is not None and kind == "ready":
            rank.stands_by = True
            if not self._ending:
                self._admit()
        elif rank is not None and kind == "asked":
            self._pass_on_stop()  # it may be lost before the others have heard of it
        elif kind == "audit":
            self._suspect(record["suspects"])
        elif kind == "injected":
            for there in self._fleet.others.values():
                there.brief([record])
        elif kind in ("regroup", "start"):
            self._present = record.get("members", self._present)
            self._causes, self._fresh = self._causes + Counter(self._fresh), set()
        self._log.append(record)
        self._console.event(record)

    def _ask_to_stop(self) -> None:
        for there in self._fleet.others.values():
            if there.asked:
                self._let_go(there)
        late = self._deadline is not None and time.monotonic() > self._deadline
        if self._heeded or not (self._requests.names or late):
            return
        self._heeded = True
        by = self._requests.names[0] if self._requests.names else f"stop_after={self._config.stop_after}"
        self.record(events.Asked(rank=None, by=by))
        self._pass_on_stop()

    def _let_go(self, there: There) -> None:
        """A node was asked to stop: it may, if enough others stay; else all do."""
        if not any(rank.member in self._members and rank.spot[0] != there.index for rank in self._ranks):
            return  # the others are being replaced just now
        self.record(events.Asked(rank=None, by=f"{there.asked} on node {there.index}"))
        there.asked = ""
        if self._heals and self._fleet.can_spare(there.index, self._config.least_nodes):
            there.leaves = True
            self._settle()
        elif not self._asked:
            self._pass_on_stop()

    def _pass_on_stop(self) -> None:
        self._asked = True
        for rank in self._ranks:
            rank.tell(STOP)

    def _bury(self, lost: list[Rank | RemoteRank]) -> int | None:
        """What becomes of the run now that these ranks are gone: GOES_ON, None for a new start, or an exit code."""
        faults: list[dict[str, Any]] = []
        for rank in lost:
            if rank.fault is None:
                said = events.Fault(fault="lost", phase="a step", rank=rank.member, step=None, cause=rank.died_of())
                rank.fault = said.record()
                self._record(rank.fault)
            faults.append(rank.fault)
        causes = [tuple(fault[key] for key in ("fault", "phase", "step", "cause")) for fault in faults]
        for fault, cause in zip(faults, causes, strict=True):
            if fault["fault"] == "not finite" and self._config.recovery.spike and not self._asked:
                return self._roll_back(fault["step"] + 1)
            times = 2 * TRIES if fault["fault"] == "miscomputed" else 1  # with three ranks it is left out before
            again = fault["step"] is not None and self._causes[cause] >= times
            if fault["fault"] in ("refused", "not saved") or again:  # not bad luck
                return self._fail(fault)
        self._fresh |= set(causes)
        for rank, fault in zip(lost, faults, strict=True):
            if fault["fault"] == "miscomputed":
                continue  # who says so may well be healthy
            slot = self._slots.get(rank.spot, Slot())  # none, where its place has gone as well
            if slot.died(self._last["step"], time.monotonic()):
                text = f"its place is left empty: {LIVES} processes died there within {QUICK} steps"
                self.record(events.Warned(rank=rank.member, text=text))
        left = [member for member in self._members if any(rank.member == member for rank in self._ranks)]
        poisoned = any(fault["fault"] in POISON for fault in faults)
        if left == self._members and self._heals:
            return GOES_ON  # a newcomer, or one that was on its way out
        if self._heals and not poisoned and set(left) & set(self._present):  # somebody who stays has the state
            self._members = left
            self._admit("lost")
            return GOES_ON
        if self._futile >= self._config.recovery.restarts or self._asked:
            return self._fail(faults[0])
        self._futile += all(fault["fault"] != "miscomputed" for fault in faults)  # whose tries are counted above
        self._console.say("no rank can go on: all start again from the last checkpoint")
        return None

    def _suspect(self, members: list[int]) -> None:
        """One of these computes wrongly. Who is there each time, whoever checks, has its place left empty for good."""
        for rank in self._ranks:
            if rank.member in members and rank.spot in self._slots:  # not on its way out, after a resize
                self._slots[rank.spot].doubts += 1
        if self._heals and (spot := doubtful(self._slots)) is not None:
            self._slots[spot].left_out = True
            text = f"its place is left empty: it took part in {self._slots[spot].doubts} audits that did not agree"
            self.record(events.Warned(rank=spot[1], text=text))

    def _roll_back(self, step: int) -> int | None:
        """All ranks start again from before `step`; the second time without its batch, then with twice as many out."""
        self._wrong, times = None, self._rolled[step]
        self._rolled[step] += 1
        width = min(2 ** (times - 1) if times else 0, step)
        if times >= TRIES:
            cause = f"the loss of step {step} is no good, though it was gone back from {times} times"
            return self._fail(events.Fault(fault="loss", phase="the loss", rank=0, step=step, cause=cause).record())
        self._end_all()
        self._run.go_back(step - max(width, 1), width)
        self.record(events.RolledBack(step=step, left_out=self._run.left_out()))
        return None

    def _resize(self) -> None:
        """Heed `colossus resize`: who is too many leaves at the end of a step, who is missing is forked."""
        devices = folder.wished(self._run.path) if self._heals else None
        if devices is None or not any(rank.member in self._members and rank.spot[1] < devices for rank in self._ranks):
            return  # or all of those are being replaced just now
        (self._run.path / folder.WISH).unlink(missing_ok=True)
        self._fleet.here.devices = devices
        self._settle()

    def _settle(self) -> None:
        """There are other places than there were: who has none leaves at the end of a step."""
        self._lay_out()
        before, staying = self._members, {rank.member for rank in self._ranks if rank.spot in self._slots}
        for rank in self._ranks:
            if rank.member not in staying and rank.member not in before:
                rank.kill()  # it was not a rank yet
        self._members = [member for member in before if member in staying][: self._most]
        self._admit("resized" if self._members != before else "joined")

    def _replace(self) -> None:
        """Fork a process for each place that has none, unless too many have died there."""
        if not self._heals or self._asked or self._ending:
            return
        for spot, slot in self._slots.items():
            if slot.takes(self._last["step"], time.monotonic()) and all(rank.spot != spot for rank in self._ranks):
                try:
                    self._fork(spot, resume=self._run.checkpointed(), joins=True)
                except OSError as error:  # a full disk, or too many processes
                    slot.due = time.monotonic() + 10 * BACK_OFF
                    self._console.say(f"nobody takes a lost rank's place for now: {error.strerror}")

    def _culprit(self, lost: list[Rank | RemoteRank]) -> Rank | RemoteRank:
        """The rank from whose fault the others follow: one killed from outside, else the first that spoke."""
        until = time.monotonic() + MOURNING
        while time.monotonic() < until and not any(rank.killed for rank in self._ranks):
            self._hear()
            if any(rank.fault for rank in self._ranks):  # one that is killed closes its sockets before it has ended
                until = min(until, time.monotonic() + 0.5 * any(r.alive and not r.fault for r in self._ranks))
            time.sleep(0.02)
        self._hear()
        killed = [rank for rank in self._ranks if rank.killed]
        said = sorted((r for r in self._ranks if r.fault), key=lambda rank: rank.fault["time"])  # type: ignore[index]
        return (killed or said or lost)[0]

    def _fail(self, fault: dict[str, Any]) -> int:
        """Say why the run ends."""
        at = f" at step {fault['step']}" if fault["step"] is not None else ""
        log = self._run.path / "logs" / f"rank-{fault['rank']}.log"
        why = f"rank {fault['rank']} failed{at} in {fault['phase']}: {fault['cause']} (see {log})"
        code, why = (REFUSED, fault["cause"]) if fault["fault"] == "refused" else (FAILED, why)
        self._console.error(why)
        self._fleet.verdict = code, why
        return code
