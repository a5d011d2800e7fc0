"""Where the time of a run went, from its events alone, across restarts; and how fast it recovered from faults on order.

The time from the first event to the last is gone through once. Every second of it belongs to one part, for every rank
that was wanted: those that were there spent it on that part, the others were missing. So the parts add up to all the
rank-seconds there were, whatever the events are. Work that turns out to be lost moves from `steps` to `redone`: a
restart went on from an earlier step, or leaves of the step in flight went with a rank.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]

PARTS = (
    *("steps", "redone"),  # those that count; what was computed again or in vain
    "detection",  # from a fault on order until somebody noticed: when another one began nobody knows
    "regrouping",  # from there until the ranks went on
    "restore",
    "checkpoint",  # what the steps waited for
    "warm_up",  # the handshake, and what the first step takes longer than a usual one: compiling, allocating
    "evaluation",
    "start_up",
    "missing",  # ranks that were wanted and not there
    "idle",  # nobody was there: between a stop and the next start
    "other",  # gaps, last words
)


def ledger(records: Iterable[Record]) -> dict[str, Any]:
    """wall_s; rank_s, that of all wanted ranks together; share, of the steps that count; seconds, by part.

    The seconds are the parts' shares of rank_s times wall_s: they add up to wall_s.
    """
    found = sorted(records, key=lambda record: record["time"])
    if not found:
        return {"wall_s": 0.0, "rank_s": 0.0, "share": 0.0, "seconds": dict.fromkeys(PARTS, 0.0)}
    sweep = _Sweep(found)
    for record in found:
        if take := getattr(sweep, f"on_{record['kind']}", None):
            take(record, record["time"])
    sweep.go_on(found[-1]["time"])
    sweep.lose(1.0)
    rank_s, wall = sum(sweep.parts.values()), found[-1]["time"] - found[0]["time"]
    seconds = {part: wall * spent / rank_s if rank_s else 0.0 for part, spent in sweep.parts.items()}
    return {"wall_s": wall, "rank_s": rank_s, "share": seconds["steps"] / wall if wall else 0.0, "seconds": seconds}


class _Sweep:
    def __init__(self, records: list[Record]) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)  # rank-seconds
        self._part = "start_up"  # what is going on; or "running"
        self._now: float = records[0]["time"]
        self._wanted = self._present = next((r["world"] for r in records if r["kind"] in ("launch", "start")), 1)
        self._launched, self._lost, self._members = False, set[int](), set(range(self._wanted))
        self._step, self._fresh = 0, True  # the last one; there was none since the start
        self._useful: dict[int, float] = {}  # step -> rank-seconds
        self._flight = 0.0  # rank-seconds in the step that a fault struck
        self._usual: float = statistics.median([r["seconds"] for r in records if r["kind"] == "step"] or [0.0])
        self._stalls = {r["step"]: r["seconds"] for r in records if r["kind"] == "checkpoint"}
        self._noticed = {(one["id"], one["rank"]) for one in recoveries(records) if one["detection_s"] is not None}

    def _spend(self, until: float, part: str) -> float:
        seconds = max(0.0, until - self._now)
        self._now = max(self._now, until)
        self.parts[part] += seconds * self._present
        self.parts["missing"] += seconds * (self._wanted - self._present)
        return seconds * self._present

    def go_on(self, until: float, flight: bool = False) -> None:
        """With what is going on; between steps, first with what the last one's checkpoint is known to have taken."""
        if self._part != "running":
            self._spend(until, self._part)
            return
        stall = min(self._stalls.get(self._step, 0.0), max(0.0, until - self._now))
        self._stalls[self._step] = self._stalls.get(self._step, 0.0) - stall
        self._spend(self._now + stall, "checkpoint")
        spent = self._spend(until, "steps" if flight else "other")
        self._flight += spent if flight else 0.0

    def lose(self, share: float) -> None:
        """So much of the step in flight."""
        self._redo(self._flight * share)
        self._flight -= self._flight * share

    def _redo(self, spent: float) -> None:
        self.parts["steps"] -= spent
        self.parts["redone"] += spent

    def _back_to(self, step: int) -> None:
        for later in range(step + 1, self._step + 1):
            self._redo(self._useful.pop(later, 0.0))
        self._step = step

    def _seat(self, present: int, wanted: int) -> None:
        self._present, self._wanted = present, max(wanted, present)
        self._lost.clear()

    def on_launch(self, record: Record, time: float) -> None:
        if not record["again"]:
            self._seat(self._wanted, self._wanted)
            self._part = "idle"  # whatever the last one was about when it ended
        self.go_on(time, flight=True)
        self._seat(record["world"], record["world"])
        self._part, self._launched, self._members = "start_up", True, set(range(record["world"]))

    def on_restore(self, record: Record, time: float) -> None:
        self.go_on(time, flight=True)
        self._part = "restore"

    def on_start(self, record: Record, time: float) -> None:
        self._part = "start_up" if self._part == "running" else self._part
        self.go_on(time)
        self.lose(1.0)
        self._back_to(record["step"])
        self._seat(record["world"], self._wanted if self._launched else record["world"])
        self._part, self._fresh, self._launched = "warm_up", True, False

    def on_step(self, record: Record, time: float) -> None:
        begin = max(self._now, time - record["seconds"])
        self.go_on(begin)
        if self._fresh:
            self._spend(max(begin, time - self._usual), "warm_up")
        self._back_to(record["step"] - 1)
        self._step, self._fresh = record["step"], False
        self._useful[self._step] = self._spend(time, "steps") + self._flight
        self._flight = 0.0
        if self._part not in ("detection", "regrouping"):  # one that was committed while a rank was dying
            self._part = "running"

    def on_eval(self, record: Record, time: float) -> None:
        self.go_on(max(self._now, time - record["seconds"]))
        self._spend(time, "evaluation")

    def on_injected(self, record: Record, time: float) -> None:
        if (record["id"], record["rank"]) in self._noticed:
            self.go_on(time, flight=True)
            self._part = "detection"

    def on_fault(self, record: Record, time: float) -> None:
        if record["rank"] not in self._members:
            return  # nobody waits for one that stood by, or was not ready yet
        self.go_on(time, flight=True)
        if self._part != "idle":
            self._part = "regrouping"
            self._present -= record["rank"] not in self._lost and self._present > 0
            self._lost.add(record["rank"])

    def on_regroup(self, record: Record, time: float) -> None:
        if self._part == "running":  # nobody was lost: at a step's end some joined or left
            self.go_on(max(self._now, time - record["seconds"]), flight=True)
            self._part = "regrouping"
        self.go_on(time)
        self._members = set(record["members"])
        leaves = record["kept"] + record["redone"]
        self.lose(record["redone"] / leaves if leaves else 0.0)
        self._back_to(min(self._step, record["step"]))
        self._seat(record["world"], record["world"] if record["why"] == "resized" else self._wanted)
        self._part = "warm_up" if self._fresh else "running"

    def on_end(self, record: Record, time: float) -> None:
        self.go_on(time)
        self._seat(self._wanted, self._wanted)
        self._part = "idle"


def recoveries(records: Iterable[Record]) -> list[Record]:
    """Each fault on order that struck: id, fault, rank, member, phase, step, time, and what came of it.

    detection_s until it was noticed and recovery_s from there until the ranks went on, None where they did not; by:
    regroup or restart; survived: a later step was committed after that, or the run came to its end.
    """
    found: list[Record] = []
    open_: dict[int, Record] = {}  # member -> the last that struck it
    waiting: list[Record] = []  # for a later step
    for record in sorted(records, key=lambda record: record["time"]):
        kind, time = record["kind"], record["time"]
        if kind == "injected":
            one = {key: value for key, value in record.items() if key != "kind"}
            one |= {"detection_s": None, "recovery_s": None, "by": None, "survived": False}
            found.append(one)
            waiting.append(one)
            open_[record["member"]] = one
        elif kind == "fault" and (one := open_.pop(_struck(open_, record), {})):
            waiting += [one] if one["survived"] else []
            one |= {"detection_s": time - one["time"], "survived": False}
        elif kind == "start" or (kind == "regroup" and record["why"] == "lost"):
            for one in waiting:
                if one["detection_s"] is not None and one["by"] is None:
                    one["recovery_s"] = time - one["time"] - one["detection_s"]
                    one["by"] = "restart" if kind == "start" else "regroup"
        elif kind == "end" or kind == "step":
            for one in waiting:
                past = kind == "end" or record["step"] > one["step"]
                one["survived"] = past and (one["detection_s"] is None or one["by"] is not None)
            waiting = [one for one in waiting if not one["survived"]]
    return found


def _struck(faults: dict[int, Record], record: Record) -> int:
    """Which member's of `faults` it tells of: of a number that is none all ranks tell, and one of them has made it."""
    poisoned = (member for member, one in faults.items() if one["fault"] in ("nan", "flip"))
    return next(poisoned, -1) if record["fault"] == "not finite" else int(record["rank"])


def by_kind(found: Iterable[Record]) -> dict[str, Any]:
    """Of each kind of fault: n, survived, and p50 and p99 of the seconds of detection and recovery."""
    kinds: dict[str, list[Record]] = {}
    for one in found:
        kinds.setdefault(one["fault"], []).append(one)
    table = {}
    for kind, ones in sorted(kinds.items()):
        times = {key: [one[key] for one in ones if one[key] is not None] for key in ("detection_s", "recovery_s")}
        row = {key: {"p50": quantile(v, 0.5), "p99": quantile(v, 0.99)} for key, v in times.items()}
        table[kind] = {"n": len(ones), "survived": sum(one["survived"] for one in ones), **row}
    return table


def quantile(values: list[float], q: float) -> float | None:
    """The smallest value that is not below a share q of them."""
    return sorted(values)[math.ceil(q * len(values)) - 1] if values else None
