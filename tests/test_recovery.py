"""A rank that is lost – killed, crashed, hung, alone or with others – changes no bit.

Rows 1, 4, 13, 16 and 17 of the usual matrix of faults. They strike on order (`faults.at`), at named phases of named
steps; every run is compared, loss by loss and in its final state, with one that nothing happened to. What else must be
as it was: each step once in the record, no process left. There are always enough ranks for all faults of a run, since
how soon a replacement comes is the machine's affair; and where it matters how far a save or another rank has come when
a fault strikes, the fault waits for that (`answers`).
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import Precision

from tests.running import Running, at_step
from tests.test_resume import ENDLESS, numbers, ranks
from tests.test_train import summary, train
from train import cli, compose, events, folder, nodes, plan, pulse, slots, supervisor
from train.channel import RECORDED, Requests
from train.config import Checkpoint, Train
from train.console import Console
from train.fleet import Fleet
from train.folder import RunFolder
from train.group import Group, Place
from train.processes import Here, Rank
from train.saver import NotSaved, Saver
from train.telemetry import Recorder

Record = dict[str, Any]
LONG = ("steps=30", "eval.every=10", "checkpoint.every=10")
SLOW = "forward:0:40:1000000"  # most of the time is waited for processes to start: let it be few steps, for the twin
MEMBER = {"named": True, "stands_by": False}


class Twins:
    """Fault-free runs on one rank, made when they are first asked for."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, ...], tuple[dict[int, str], dict[str, Any]]] = {}

    def of(self, tiny: list[str], *more: str) -> tuple[dict[int, str], dict[str, Any]]:
        if more not in self._made:
            code, folder = train(tiny, *more, "name=twin", "devices=1")
            assert code == 0
            self._made[more] = numbers(folder), summary(folder)
        return self._made[more]


@pytest.fixture(scope="module")
def twins() -> Twins:
    return Twins()


def watching(config: Train, run: RunFolder, console: Console | None = None) -> supervisor.Supervisor:
    """A supervisor on the only node, before it has started anything."""
    here = Here(nodes.here(1), config, run.path, run.events_path, None, int(config.devices))  # type: ignore[arg-type]
    watch = supervisor.Supervisor(config, run, console or Console(), Fleet(here, 1, {}), None, Requests())
    watch._lay_out()
    return watch


def saved(watch: supervisor.Supervisor, rank: Rank, strikes: dict[int, Record]) -> bool:
    """Whether all is saved that was due before the step in which a fault is about to strike."""
    every = watch._config.checkpoint.every
    due = (strikes[rank.member]["step"] - 1) // every * every if rank.member in strikes else 0
    return due <= 0 or bool(of_kind(list(watch._run.events()), "checkpoint", step=due))


def answers(
    monkeypatch: pytest.MonkeyPatch, may: Callable[[supervisor.Supervisor, Rank, dict[int, Record]], bool] = saved
) -> None:
    """Let faults on order strike, and saves begin, when `may` holds: not as soon as disks and processes happen to be.

    Before either a rank asks whether all is on record; until it is answered it only gives signs of life. `may` is given
    who asks, and of each member that a fault is about to strike what the record says of it.
    """
    hear, tell = supervisor.Supervisor._hear, Rank.tell
    asking: list[Rank] = []
    struck = Counter[int]()

    def told(rank: Rank, message: bytes) -> None:
        if message == RECORDED:
            asking.append(rank)
        else:
            tell(rank, message)

    def heard(watch: supervisor.Supervisor) -> None:
        hear(watch)
        asking[:] = [rank for rank in asking if rank.alive]
        found = of_kind(list(watch._run.events()), "injected") if asking else []
        ordered = {rank.member: [one for one in found if one["member"] == rank.member] for rank in asking}
        strikes = {member: its[-1] for member, its in ordered.items() if len(its) > struck[member]}
        for rank in [rank for rank in asking if may(watch, rank, strikes)]:
            asking.remove(rank)
            struck[rank.member] += rank.member in strikes
            tell(rank, RECORDED)

    monkeypatch.setattr(supervisor.Supervisor, "_hear", heard)
    monkeypatch.setattr(Rank, "tell", told)


def records(folder: Path) -> list[Record]:
    return list(events.read(folder / "events.jsonl"))


def of_kind(found: list[Record], kind: str, **fields: Any) -> list[Record]:
    return [r for r in found if r["kind"] == kind and all(r[key] == value for key, value in fields.items())]


def survived(folder: Path, tiny: list[str], twins: Twins, *more: str) -> list[Record]:
    """The run's record, once it is shown to be, to the bit, that of its twin."""
    losses, end = twins.of(tiny, *more)
    assert numbers(folder) == losses
    for key in ("state_sha256", "steps", "tokens", "val_bpb", "stopped"):
        assert summary(folder)[key] == end[key], key
    assert ranks() == []
    return records(folder)


def equals_one_rank(running: Running, overrides: list[str], *more: str, ask: Running | None = None) -> None:
    """Stop a run that has no end, and show that one rank alone comes to the same losses and the same state there.

    It is asked once, there or on another node: a process that has come to its end no longer heeds a request.
    """
    (ask or running).send(signal.SIGINT)
    code, _, err = running.end()
    assert code == 75, err
    end = summary(running.folder)
    code, twin = train([*overrides, *more], "name=twin", "devices=1", f"steps={end['steps']}")
    assert code == 0
    assert numbers(running.folder) == numbers(twin)
    assert summary(twin)["state_sha256"] == end["state_sha256"]


def once(found: list[Record]) -> None:
    """Nothing was restarted: each step is in the record once, with its checksums, and in order."""
    for kind in ("step", "digests"):
        seen = [record["step"] for record in of_kind(found, kind)]
        assert seen == sorted(set(seen)), Counter(seen).most_common(3)
        assert len(seen) == of_kind(found, "end")[-1]["step"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "places", [("forward:3", "backward:6", "reduce:9", "optimizer:12"), ("commit:3", "evaluation:8", "checkpoint:15")]
)
def test_a_kill_in_every_phase_of_a_step(
    rank: int, places: tuple[str, ...], tiny: list[str], twins: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 hosts the store and speaks for the run. The run never starts again, and no save is lost."""
    answers(monkeypatch)
    at = ",".join(f"kill:{rank}@{place}" for place in places)
    code, folder = train(tiny, *LONG, "name=a", "devices=5", f"faults.at=[{at}]")
    assert code == 0
    found = survived(folder, tiny, twins, *LONG)
    once(found)
    assert [one["phase"] for one in of_kind(found, "injected")] == [place.split(":")[0] for place in places]
    assert len(of_kind(found, "fault", fault="lost")) == len(places)
    assert len(of_kind(found, "regroup", why="lost")) == len(places)
    assert len(of_kind(found, "start")) == 1
    due = {10, 20, 30}
    assert {one["step"] for one in of_kind(found, "eval")} == due, "what was due is done, whoever is lost"
    assert {one["step"] for one in of_kind(found, "checkpoint")} == due, "who is lost in a save has it begun again"


@pytest.mark.parametrize("lost_at", [10, 11])
def test_a_save_that_is_lost_with_rank_0_is_said_to_be(lost_at: int, tmp_path: Path) -> None:
    """By the rank that takes its place; unless no step has been committed since: then the save is begun again."""
    said: list[Any] = []
    group = Group(Place.alone(), Precision())
    group.rank = 1
    saver = Saver(tmp_path, group, about={"writer_epoch": 1}, policy=Checkpoint(), send=said.append)
    saver.regrouped([], 0)
    saver.save(10, [], {})
    assert not saver.part(lambda: True)
    group.rank = 0
    saver.regrouped([], lost_at)
    assert [(event.kind, event.step) for event in said] == [("warning", 10)] * (lost_at - 10)


def test_survivors_keep_what_they_have_finished(tiny: list[str], twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 dies when all have come to the sum, and 2 leaves of each are finished: what is lost is the dead rank's.

    The first save begins when the replacement is there, so that it finds steps left.
    """

    def may(watch: supervisor.Supervisor, rank: Rank, strikes: dict[int, Record]) -> bool:
        if rank.member not in strikes:
            return len(watch._members) == watch._most  # of the twin, too
        return all(one is rank or one.flight().startswith("reduce: step 5, waits for") for one in watch._ranks)

    answers(monkeypatch, may)
    longer = (*LONG, "batch.virtual_ranks=8", "batch.sequences=16")
    code, folder = train(tiny, *longer, "name=a", "devices=4", "faults.at=[kill:1@reduce:5]")
    assert code == 0
    found = survived(folder, tiny, twins, *longer)
    once(found)
    (lost,) = of_kind(found, "regroup", why="lost")
    assert (lost["step"], lost["kept"] + lost["redone"]) == (5, 8)
    assert 3 <= lost["kept"] <= 6, "and the last ones, where no part of the sum stood on them yet"
    assert lost["members"][:3] == [0, 2, 3]
    joined = of_kind(found, "regroup", why="joined")  # unless the newcomer was there before the survivors went on
    assert [one["redone"] for one in joined] == [0] * (4 - lost["world"]), "a newcomer comes at the end of a step"
    assert [lost, *joined][-1]["members"] == [0, 2, 3, 4]


@pytest.mark.parametrize(
    "at",
    [
        ("kill:0+2@backward:4", "kill:1@reduce:10", "kill:0@regroup:10"),
        ("segv:1@forward:6", "exit:0@optimizer:12", "exception:1@reduce:18"),
    ],
    ids=["several at once, and in a recovery", "other ways to die"],
)
def test_other_losses(at: tuple[str, ...], tiny: list[str], twins: Twins) -> None:
    code, folder = train(tiny, *LONG, "name=a", "devices=5", f"faults.at=[{','.join(at)}]")
    assert code == 0
    found = survived(folder, tiny, twins, *LONG)
    once(found)
    assert {one["id"] for one in of_kind(found, "injected")} == set(at)


@pytest.mark.parametrize("devices", [1, 3])
def test_all_ranks_at_once(devices: int, tiny: list[str], twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is left: all start again from the checkpoint, by themselves, and repeat the same bits."""

    def may(watch: supervisor.Supervisor, rank: Rank, strikes: dict[int, Record]) -> bool:
        return saved(watch, rank, strikes) and (rank.member not in strikes or len(strikes) == devices)

    answers(monkeypatch, may)
    every = "+".join(map(str, range(devices)))
    code, folder = train(tiny, *LONG, "name=a", f"devices={devices}", f"faults.at=[kill:{every}@reduce:14]")
    assert code == 0
    found = survived(folder, tiny, twins, *LONG)
    assert [start["step"] for start in of_kind(found, "start")] == [0, 10]


@pytest.mark.parametrize("how", ["recovery.in_place=false", "sharding=optimizer", "sharding=full"])
def test_what_cannot_be_healed_in_place_starts_again(
    how: str, tiny: list[str], twins: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch)
    code, folder = train(tiny, *LONG, "name=a", "devices=2", how, "faults.at=[kill:1@backward:14]")
    assert code == 0
    found = survived(folder, tiny, twins, *LONG)
    assert [start["step"] for start in of_kind(found, "start")] == [0, 10]
    assert not of_kind(found, "regroup")


def test_ranks_that_hang_are_found_and_say_where(tiny: list[str], twins: Twins) -> None:
    """Three at once, each in its way, since each way costs seconds of silence; the fourth waits, and is left alone."""
    kinds = {1: "stop", 2: "gil", 3: "hang"}
    at = ",".join(f"{kind}:{rank}@backward:12" for rank, kind in kinds.items())
    code, folder = train(tiny, *LONG, "name=a", "devices=4", f"faults.at=[{at}]")
    assert code == 0
    found = survived(folder, tiny, twins, *LONG)
    once(found)
    faults = {one["rank"]: one for one in of_kind(found, "fault")}
    assert set(faults) == {one["rank"] for one in of_kind(found, "injected")} == set(kinds)
    for rank, fault in faults.items():
        assert (fault["fault"], fault["phase"]) == ("hang", "backward")
        silence = re.match(r"no sign of life for ([\d.]+) s", fault["cause"])
        assert silence
        assert float(silence[1]) >= pulse.LEAST
        assert re.match("reduce: step 12, waits for the exchange of elements 0 to", fault["flight"]["0"])
        assert re.match("backward: step 12, after an all-gather", fault["flight"][str(rank)])
        log = (folder / "logs" / f"rank-{rank}.log").read_text()
        assert re.search(r'File ".*train/loop.py", line \d+ in micro_batch', log), "the stack of the culprit"


def test_a_slow_rank_is_named(tiny: list[str], twins: Twins) -> None:
    """Once that has lasted for a few seconds; and it has no say in the bits."""
    code, folder = train(tiny, *LONG, "name=a", "devices=3", "faults.at=[slow:1@forward:4:25:16]")
    assert code == 0
    found = survived(folder, tiny, twins, *LONG)
    named = [one for one in of_kind(found, "slow") if one["rank"] == 1]
    assert named
    assert 4 < named[0]["step"] <= 30
    assert named[0]["times"] > 1.3


@pytest.mark.parametrize(
    "places", [("forward:0", "backward:6", "reduce:9", "optimizer:12"), ("commit:3", "evaluation:8", "checkpoint:15")]
)
def test_a_bit_that_flips_names_its_rank_and_changes_nothing(
    places: tuple[str, ...], tiny: list[str], twins: Twins
) -> None:
    """A stored weight or moment: its rank says so before anything of it counts, and is lost like any other."""
    at = [f"flip:{i % 3}@{place}:{1 + 20 * (i % 2)}" for i, place in enumerate(places)]
    code, folder = train(tiny, *LONG, "name=a", "devices=5", f"faults.at=[{','.join(at)}]")
    assert code == 0
    found = survived(folder, tiny, twins, *LONG)
    once(found)
    struck, faults = of_kind(found, "injected"), of_kind(found, "fault")
    assert {one["fault"] for one in faults} == {"corrupted"}
    assert [one["member"] for one in struck] == [one["rank"] for one in faults]
    for one, fault in zip(struck, faults, strict=True):
        assert fault["step"] - one["step"] in (0, 1), "the same step, or the next where it struck after the sum"
        assert "bits of the state changed before" in fault["cause"]


@pytest.mark.parametrize("more", ["recovery.guard=true", "recovery.guard=false"])
def test_without_the_guard_a_flipped_bit_goes_unseen(
    more: str, tiny: list[str], twins: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sharded moments nobody else has them: all start again from the checkpoint, to the same bits."""
    answers(monkeypatch)
    at = "faults.at=[flip:1@forward:14:3]"
    code, folder = train(tiny, *LONG, "name=a", "devices=2", "sharding=optimizer", more, at)
    assert code == 0
    if more.endswith("true"):
        found = survived(folder, tiny, twins, *LONG)
        assert [start["step"] for start in of_kind(found, "start")] == [0, 10]
    else:
        assert summary(folder)["state_sha256"] != twins.of(tiny, *LONG)[1]["state_sha256"]
        assert not of_kind(records(folder), "fault")


MORE = [
    ("batch.virtual_ranks=6", "batch.sequences=24", "batch.micro_batch=2", "precision=bf16", "model.dropout=0.1"),
    ("reduce.dtype=bf16",),
    ("reduce.bucket_mib=0.01", "batch.weights=auto"),
]


@pytest.mark.parametrize("more", MORE, ids=lambda more: more[0])
def test_odd_runs_survive_too(more: tuple[str, ...], tiny: list[str], twins: Twins) -> None:
    shorter = ("steps=16", "eval.every=0", "checkpoint.every=0", *more)
    code, folder = train(tiny, *shorter, "name=a", "devices=3", "faults.at=[kill:1@reduce:4,kill:0@backward:10]")
    assert code == 0
    once(survived(folder, tiny, twins, *shorter))


def test_a_place_where_ranks_keep_dying_stays_empty_for_a_while(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second replacement waits, the third does not come before 20 steps have passed; the run goes on without."""
    config = plan.resolve(compose.config("train", [*tiny, "name=a", "devices=2"]))
    now = 1000.0
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: now))
    with RunFolder(tmp_path / "run") as run:
        watch = watching(config, run)
        forked: list[int] = []
        monkeypatch.setattr(watch, "_fork", lambda spot, resume, joins: forked.append(spot[1]))
        stays = SimpleNamespace(member=0, spot=(0, 0), fault=None, port=1, tell=lambda message: None, **MEMBER)
        watch._ranks, watch._members, watch._present = [stays], [0], [0]  # type: ignore[list-item]
        for death in range(slots.LIVES):
            dies = SimpleNamespace(member=1 + death, spot=(0, 1), fault=None, died_of=lambda: "killed by SIGKILL")
            assert watch._bury([dies]) == supervisor.GOES_ON  # type: ignore[list-item]
            waits = slots.BACK_OFF * 2 ** (death - 1) if death else 0.0
            assert watch._slots[0, 1].due == now + waits
            now += waits
            watch._replace()
        assert forked == [1, 1]
        (warning,) = of_kind(list(run.events()), "warning")
        assert "left empty" in warning["text"]
        watch._last["step"] += slots.QUICK
        watch._replace()
        assert forked == [1, 1, 1]


@pytest.mark.parametrize(("kind", "verdict"), [(NotSaved.fault, 1), ("exception", supervisor.GOES_ON)])
def test_a_last_save_that_failed_ends_the_run(kind: str, verdict: int, tiny: list[str], tmp_path: Path) -> None:
    """Also where rank 0 is seen to end before rank 1, which has nothing left to do and says that all is done."""
    config = plan.resolve(compose.config("train", [*tiny, "name=a", "devices=2"]))
    with RunFolder(tmp_path / "run") as run:
        watch = watching(config, run)
        watch._ranks = [SimpleNamespace(member=1, spot=(0, 1), tell=lambda message: None, **MEMBER, host="", port=0)]  # type: ignore
        watch._members = watch._present = [0, 1]
        fault = events.Fault(fault=kind, phase="checkpoint", rank=0, step=6, cause="disk full").record()
        assert watch._bury([SimpleNamespace(member=0, spot=(0, 0), fault=fault)]) == verdict  # type: ignore[list-item]


def test_where_no_process_can_be_forked_the_others_go_on(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full, or the table of processes: it is tried again, but not at once."""
    config = plan.resolve(compose.config("train", [*tiny, "name=a", "devices=1"]))
    now = 1000.0
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: now))
    with RunFolder(tmp_path / "run") as run:
        watch, tried = watching(config, run), list[int]()

        def fork(spot: slots.Spot, resume: bool, joins: bool) -> None:
            tried.append(spot[1])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(watch, "_fork", fork)
        watch._replace()
        watch._replace()
        assert tried == [0]
        assert "nobody takes a lost rank's place for now: No space left on device" in capsys.readouterr().out
        now += 10 * slots.BACK_OFF
        watch._replace()
        assert tried == [0, 0]


def test_a_wish_is_of_this_run_and_can_be_read(tiny: list[str], tmp_path: Path) -> None:
    """Another number of ranks, asked of a run that had just ended, is not what the next one of its name shall have."""
    config = plan.resolve(compose.config("train", [*tiny, "name=a", "devices=1"]))
    with RunFolder(tmp_path / "run") as run:
        wish = run.path / folder.WISH
        wish.write_text('{"devices": 3}')
        assert folder.wished(run.path) == 3
        run.write(config, {"digest": "0"})
        assert folder.wished(run.path) is None
        for broken in ("{}", "null", '{"devices": 0}', '{"devices": "two"}', "two", "[1]"):
            wish.write_text(broken)
            assert folder.wished(run.path) is None
            assert not wish.exists()


def test_long_steps_do_not_make_a_place_suspect() -> None:
    """Three unrelated deaths within 20 steps are nothing special where these take minutes."""
    for seconds, suspected in ((slots.SOON / 2 + 1, False), (slots.SOON / 4, True)):
        slot = slots.Slot()
        assert [slot.died(3 * i, seconds * i) for i in range(slots.LIVES)] == [False, False, suspected]
        assert slot.takes(9, seconds * 2 + 5 * slots.BACK_OFF) == (not suspected)
        assert slot.takes(9, seconds * 2 + slots.SOON)


def test_a_place_where_many_have_died_is_not_empty_for_ever() -> None:
    """When all start again no place is spared, so more may die at one than would be tried there otherwise."""
    slot = slots.Slot()
    for _ in range(10):
        slot.died(7, 0.0)
    assert not slot.takes(7 + slots.QUICK, 1.0)
    assert slot.takes(7 + slots.QUICK, 5 * slots.BACK_OFF)


def test_what_the_others_are_told_of_losses_and_newcomers(tiny: list[str], tmp_path: Path) -> None:
    """A newcomer comes at the end of a step, unless that step will have no end; and alone it has no state."""
    config = plan.resolve(compose.config("train", [*tiny, "name=a", "devices=4"]))
    with RunFolder(tmp_path / "run") as run:
        watch = watching(config, run)
        told: list[Record] = []

        def process(member: int, named: bool = True) -> Any:
            words: dict[str, Any] = {"fault": None, "left": False, "port": 1, "died_of": lambda: "killed by SIGKILL"}
            tell = lambda message: told.append(json.loads(message))  # noqa: E731
            return SimpleNamespace(member=member, spot=(0, member % 3), tell=tell, **words, **MEMBER | {"named": named})

        def joins(member: int) -> tuple[list[int], bool, str]:
            watch._ranks.append(newcomer := process(member, named=False))
            watch._record(events.Ready(rank=member).record(), newcomer)
            return told[-1]["members"], told[-1]["boundary"], told[-1]["why"]

        ranks = [process(member) for member in range(3)]
        watch._ranks, watch._members, watch._present = ranks[:2], [0, 1, 2], [0, 1, 2]
        assert watch._bury([ranks[2]]) == supervisor.GOES_ON
        assert (told[-1]["members"], told[-1]["boundary"], told[-1]["why"]) == ([0, 1], False, "lost")
        assert joins(5) == ([0, 1, 5], False, "lost"), "who has not heard of the loss would wait for the dead"
        words: dict[str, Any] = {"why": "lost", "kept": 0, "redone": 0, "seconds": 0.0}
        watch._record(events.Regroup(step=1, epoch=1, members=[0, 1], world=2, **words).record())
        assert joins(6) == ([0, 1, 5, 6], True, "joined")
        watch._ranks = watch._ranks[2:]
        told.clear()
        watch._ranks.append(spare := process(7, named=False))
        watch._record(events.Ready(rank=7).record(), spare)
        assert not told, "it stands by: there are four already"
        watch._ranks = watch._ranks[2:]
        assert watch._bury(ranks[:2]) is None, "those that are left have no state: all start again"


def test_a_spare_takes_the_place_of_a_lost_rank_at_once(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 1, then rank 0: from the loss on there are as many ranks as before, and the bits are the same.

    Ranks that find no virtual rank to host stand by as well.
    """
    longer = (*ENDLESS, "batch.virtual_ranks=2", "batch.sequences=4")
    running = Running([*tiny, *longer], "name=a", "devices=2", "recovery.spares=1", f"faults.at=[slow:0@{SLOW}]")
    running.wait_for(at_step(3))
    pids: list[int] = []
    for lost, spares in ((1, 1), (0, 2)):
        running.wait_for(lambda found, n=spares: len(of_kind(found, "ready")) >= n)  # type: ignore[misc]
        pids = pids or sorted(running.children())[-3:]
        os.kill(pids[lost], signal.SIGKILL)
        running.wait_for(lambda found, n=spares: len(of_kind(found, "regroup")) >= n)  # type: ignore[misc]
    assert cli.main(["resize", f"run={running.folder}", "devices=3"]) == 0
    assert "has 2 ranks, and 1 that stand" in capsys.readouterr().out
    equals_one_rank(running, tiny, *longer)
    found = records(running.folder)
    once(found)
    assert [(r["world"], r["members"], r["why"]) for r in of_kind(found, "regroup")] == [
        (2, [0, 2], "lost"),
        (2, [2, 3], "lost"),
    ]


def test_a_loss_after_the_others_have_left_is_not_theirs_to_heal(tiny: list[str], tmp_path: Path) -> None:
    """Rank 1 has left and its process still lives when rank 0 fails in its last words: nobody can go on in place.
    A newcomer that dies then concerns nobody."""
    config = plan.resolve(compose.config("train", [*tiny, "name=a", "devices=2"]))
    with RunFolder(tmp_path / "run") as run:
        watch = watching(config, run)
        ranks = [
            SimpleNamespace(member=m, spot=(0, m % 2), left=False, fault=None, died_of=lambda: "killed by SIGKILL")
            for m in range(3)
        ]
        watch._ranks, watch._members, watch._present = ranks[:2], [0, 1], [0, 1]  # type: ignore[list-item,assignment]
        assert watch._bury(ranks[2:]) == supervisor.GOES_ON  # type: ignore[arg-type]
        watch._record(events.Left(rank=1, step=9, stopped=True).record(), ranks[1])  # type: ignore[arg-type]
        watch._ranks = ranks[1:2]  # type: ignore[assignment]
        assert watch._bury(ranks[:1]) is None  # type: ignore[arg-type]


def test_a_new_rank_0_says_each_step_once(tiny: list[str]) -> None:
    """What the old one left unsaid, what is in the record already, and the step that it has just been handed."""
    config = plan.resolve(compose.config("train", [*tiny, "name=a"]))
    said: list[Any] = []
    fabric = SimpleNamespace(is_global_zero=False, device=torch.device("cpu"), world_size=2)
    recorder = Recorder(config, fabric, said.append, vocab=300)  # type: ignore[arg-type]
    numbers = torch.zeros(4 + 2 * 8 + 2 + 2 * 2, dtype=torch.int64)
    for step in (1, 2, 3):
        recorder.catch_up(step, 0.1, numbers, world=2)
    assert said == []
    fabric.is_global_zero = True
    recorder.catch_up(4, 0.1, numbers, world=2)
    recorder.regrouped(recorded=2)
    assert sorted((event.step, event.kind) for event in said if event.kind != "throughput") == [
        (step, kind) for step in (3, 4) for kind in ("digests", "step")
    ]


def test_the_same_exception_in_the_same_step_again_ends_the_run(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    at = "exception:0@forward:5,exception:0@forward:5"
    code, folder = train(tiny, *LONG, "name=a", "devices=3", f"faults.at=[{at}]")
    assert code == 1
    assert "a fault on order" in capsys.readouterr().err
    assert ranks() == []
    assert len(of_kind(records(folder), "regroup", why="lost")) <= 1


def test_one_cause_that_takes_several_ranks_at_once_is_survived(tiny: list[str], tmp_path: Path) -> None:
    """Seen in one look or in two. Once the others have gone on, the same again is no bad luck."""
    config = plan.resolve(compose.config("train", [*tiny, "name=a", "devices=4"]))
    with RunFolder(tmp_path / "run") as run:
        watch = watching(config, run)
        fault = events.Fault(fault="exception", phase="reduce", rank=0, step=7, cause="OSError: no route").record()
        stays, *lost = [
            SimpleNamespace(member=m, spot=(0, m), fault=fault if m else None, port=1, tell=lambda _: None, **MEMBER)
            for m in range(4)
        ]
        watch._ranks, watch._members, watch._present = [stays], [0, 1, 2, 3], [0, 1, 2, 3]  # type: ignore[list-item]
        assert watch._bury(lost[:1]) == supervisor.GOES_ON  # type: ignore[arg-type]
        assert watch._bury(lost[1:2]) == supervisor.GOES_ON  # type: ignore[arg-type]
        words: dict[str, Any] = {"why": "lost", "kept": 0, "redone": 0, "seconds": 0.0}
        watch._record(events.Regroup(step=7, epoch=2, members=[0], world=1, **words).record())
        assert watch._bury(lost[2:]) == 1  # type: ignore[arg-type]


def test_restarts_that_lead_to_no_new_step_end_the_run(tiny: list[str], tmp_path: Path) -> None:
    """Steps that are only done again are no progress: whatever ended the run each time would do so for ever."""
    config = plan.resolve(compose.config("train", [*tiny, "name=a", "devices=1", "recovery.restarts=2"]))
    words: dict[str, Any] = {"loss": 1.0, "loss_hex": "", "lr": 0.0, "grad_norm": 1.0, "tokens": 1, "seconds": 1.0}
    with RunFolder(tmp_path / "run") as run:
        deaf: Any = SimpleNamespace(event=lambda record: None, say=lambda text: None, error=lambda text: None)
        watch, verdicts = watching(config, run, deaf), []
        for last in (3, 3, 4, 4, 4):
            watch._members, watch._last = [0], dict.fromkeys(watch._last, 0)
            for step in range(1, last + 1):
                watch.record(events.Step(step=step, world=1, **words))
            dies = SimpleNamespace(member=0, spot=(0, 0), fault=None, died_of=lambda: "killed by SIGKILL")
            verdicts.append(watch._bury([dies]))  # type: ignore[list-item]
        assert verdicts == [None, None, None, None, 1]


def test_resize_under_way(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """2 -> 4 -> 1 -> 9 -> 3 ranks while it trains, of nine one stands by; asking again is harmless."""
    longer = (*ENDLESS, "batch.virtual_ranks=8", "batch.sequences=8", "batch.micro_batch=1")
    running = Running([*tiny, *longer], "name=a", "devices=2", "faults.at=[slow:0@forward:0:10:1000000]")
    running.wait_for(at_step(1))
    codes = [cli.main(["resize", f"run={running.folder}", f"devices={n}"]) for n in (4, 4, 1, 9, 3)]
    assert codes == [0, 0, 0, 0, 0]
    assert "8 ranks, and 1 that stand by" in capsys.readouterr().out
    equals_one_rank(running, tiny, *longer)
    found = records(running.folder)
    once(found)
    worlds = [record["world"] for record in of_kind(found, "regroup")]
    assert worlds[-1] == 3
    assert {1, 4, 8} <= set(worlds) <= set(range(1, 9))
    assert cli.main(["resize", f"run={running.folder}", "devices=2"]) == 2
    assert "not under way" in capsys.readouterr().err
