"""Several nodes: they meet, are lost, come back and leave; whatever they do changes no bit.

The nodes are processes on this host, each with a run folder of its own. Networks that are cut: tests/system.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from tests.running import TIMEOUT, Running, at_step, gone
from tests.test_recovery import SLOW as SLOW
from tests.test_recovery import equals_one_rank, of_kind, once, records, watching
from tests.test_resume import ENDLESS, numbers
from tests.test_train import train
from train import compose, events, fleet, nodes, plan, remote
from train.agent import Agent
from train.channel import Requests
from train.checks import FAILED, REFUSED, Refused
from train.console import Console
from train.fleet import Fleet
from train.folder import RunFolder, replace
from train.processes import Here, died_of

GROUPS = ("start", "regroup")  # events that say who there is
DEEP: list[Any] = functools.reduce(lambda inside, _: [inside], range(50), [])


class Nodes:
    """The nodes of a run, started one by one."""

    def __init__(self, overrides: list[str], folder: Path, port: int, *more: str) -> None:
        self.overrides = [one for one in overrides if not one.startswith("runs=")]
        self.folder, self.more = folder, more
        self.where = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port), "COLOSSUS_TOKEN": "of this test"}

    def start(self, index: int, *more: str, folder: str = "") -> Running:
        runs = f"runs={self.folder / (folder or f'node{index}')}"
        return Running([*self.overrides, runs], "name=a", *self.more, *more, **self.where, PET_NODE_RANK=str(index))


def members(found: list[dict[str, Any]]) -> list[int]:
    """Who belongs together, as the record has it."""
    ranks = [range(r["world"]) if r["kind"] == "start" else r["members"] for r in found if r["kind"] in GROUPS]
    return list(ranks[-1]) if ranks else []


def grown(world: int, above: int = -1) -> Any:
    """Whether there are so many ranks, one of them newer than a member."""
    return lambda found: len(members(found)) == world and max(members(found)) > above


def test_ranks_and_nodes_are_lost_and_come_back(tiny: list[str], tmp_path: Path, port: int) -> None:
    """A rank on another node; that node; all ranks on node 0, so that none is left where the run's folder is.

    Nothing starts again, and one rank alone comes to the same bits.
    """
    both = Nodes(tiny, tmp_path, port, *ENDLESS, "nodes=2", "devices=2", f"faults.at=[slow:1@{SLOW}]")
    head, other = both.start(0), both.start(1)
    head.wait_for(at_step(2))
    assert members(records(head.folder)) == [0, 1, 2, 3]
    ranks = sorted(other.children())[-2:]
    os.kill(ranks[0], signal.SIGKILL)
    head.wait_for(grown(4, above=3))
    other.process.kill()
    assert gone(set(ranks), within=TIMEOUT), "a node's ranks die with its agent"
    head.wait_for(lambda found: len(members(found)) == 2)
    other.end()
    other = both.start(1, folder="a fresh disk")
    head.wait_for(grown(4, above=5))
    newest = max(members(records(head.folder)))
    for rank in sorted(head.children())[-2:]:
        os.kill(rank, signal.SIGKILL)
    head.wait_for(grown(4, above=newest + 1))
    first = members(records(head.folder))[0]
    assert (head.folder / "logs" / f"rank-{first}.log").exists(), "rank 0, which saves, is where the run's folder is"
    equals_one_rank(head, both.overrides, f"runs={tmp_path}/alone", *ENDLESS, ask=other)
    assert other.end()[0] == 75, "asked there, all of the run stops"
    found = records(head.folder)
    once(found)
    assert len(of_kind(found, "start")) == 1
    causes = [fault["cause"] for fault in of_kind(found, "fault")]
    assert any("killed by SIGKILL" in cause for cause in causes)
    assert any("node 1 is lost" in cause for cause in causes)


def test_a_rank_that_hangs_on_another_node_is_found_and_says_where(tiny: list[str], tmp_path: Path, port: int) -> None:
    at = f"faults.at=[stop:3@backward:3,slow:1@{SLOW}]"
    both = Nodes(tiny, tmp_path, port, *ENDLESS, "nodes=2", "devices=2", at)
    head, other = both.start(0), both.start(1)
    head.wait_for(grown(4, above=3))
    head.wait_for(at_step(5))
    equals_one_rank(head, both.overrides, f"runs={tmp_path}/alone", *ENDLESS)
    assert other.end()[0] == 75
    found = records(head.folder)
    once(found)
    (fault,) = of_kind(found, "fault")
    assert (fault["fault"], fault["rank"], fault["phase"]) == ("hang", 3, "backward")
    assert re.match(r"backward: step 3, after an all-gather.*\(node 1\)", fault["flight"]["3"])
    assert re.match(r"reduce: step 3, waits for a part of the exchange.*\(node 1\)", fault["flight"]["2"])
    assert re.match("reduce: step 3, waits for a part of the exchange", fault["flight"]["0"])
    log = (other.folder / "logs" / "rank-3.log").read_text()
    assert re.search(r'File ".*train/loop.py", line \d+ in micro_batch', log), "the stack of the culprit"


def test_a_second_hang_is_reported_too(tmp_path: Path) -> None:
    """When all start again, numbers are given again: another process with the same one may hang as well."""
    said: list[dict[str, Any]] = []

    def fork(slot: int, order: dict[str, Any]) -> Any:
        rank = SimpleNamespace(member=order["member"], port=1, alive=True, process=SimpleNamespace(exitcode=-9))
        rank.sources = rank.words = list
        rank.silent, rank.flight, rank.end = lambda: (9.0, "reduce") if rank.alive else None, str, list
        rank.kill = lambda: setattr(rank, "alive", False)
        return rank

    class Orders:
        """A link, over which two members with one number are forked, hang for a while, and are killed."""

        lost, close, sources = "", list, list
        hang: ClassVar[list[dict[str, Any]]] = [{"fork": 0, "order": {"member": 3}}, {}, {"kill": 3}]
        orders = iter([*hang, *hang, {"over": 0, "why": ""}])

        def send(self, **message: Any) -> None:
            said.append(message)

        def receive(self) -> list[dict[str, Any]]:
            return [next(self.orders)]

    here = SimpleNamespace(index=1, config=SimpleNamespace(stop_after=""), fork=fork)
    with RunFolder(tmp_path / "run", node=1) as run:
        agent = Agent(here, run, Console(), None, Requests(), {})  # type: ignore[arg-type]
        assert agent._serve(Orders()) == 0  # type: ignore[arg-type]
    assert [key for one in said for key in one if key in ("silent", "exit_code")] == ["silent", "exit_code"] * 2


def test_nodes_come_and_go(tiny: list[str], tmp_path: Path, port: int) -> None:
    """nodes=1-3: one begins, others join at the end of a step, and leave when they are asked to; the run goes on."""
    some = Nodes(tiny, tmp_path, port, *ENDLESS, "nodes=1-3", f"faults.at=[slow:0@{SLOW}]")
    head = some.start(0, "devices=1")
    head.wait_for(at_step(2))
    second, third = some.start(1, "devices=2"), some.start(2, "devices=1")
    head.wait_for(grown(4))
    second.send(signal.SIGTERM)
    assert second.end()[0] == 75
    head.wait_for(grown(2))
    equals_one_rank(head, some.overrides, f"runs={tmp_path}/alone", *ENDLESS)
    assert third.end()[0] == 75
    found = records(head.folder)
    once(found)
    assert not of_kind(found, "fault")
    assert {r["why"] for r in of_kind(found, "regroup")} == {"joined", "resized"}


def test_node_0_is_lost_and_started_again(tiny: list[str], tmp_path: Path, port: int) -> None:
    """The other node's ranks end, and it waits; the same command there goes on from the checkpoint, with both."""
    both = Nodes(
        tiny, tmp_path, port, *ENDLESS, "checkpoint.every=3", "nodes=2", "devices=1", f"faults.at=[slow:0@{SLOW}]"
    )
    head, other = both.start(0), both.start(1)
    head.wait_for(lambda found: bool(of_kind(found, "checkpoint")))
    ranks = set(sorted(other.children())[-1:])
    head.process.kill()
    head.end()
    assert gone(ranks, within=TIMEOUT)
    again = both.start(0)
    again.wait_for(lambda found: len(of_kind(found, "start")) == 2)
    equals_one_rank(again, both.overrides, f"runs={tmp_path}/alone", *ENDLESS)
    assert other.end()[0] == 75
    assert [start["world"] for start in of_kind(records(again.folder), "start")] == [2, 2]


def test_batches_that_are_left_out_are_left_out_on_all_nodes(tiny: list[str], tmp_path: Path, port: int) -> None:
    """Node 0's folder says which: the others' may know of none, or of others, whose loss was no good elsewhere."""
    both = Nodes(tiny, tmp_path, port, "nodes=2", "devices=1")
    for folder, left_out in (("node0/a", [1, 2]), ("node1/a", [0]), ("alone/twin", [1, 2])):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "data.json").write_text(json.dumps({"left_out": left_out}))
    head, other = both.start(0), both.start(1)
    assert [node.end()[0] for node in (head, other)] == [0, 0]
    code, twin = train(both.overrides, f"runs={tmp_path}/alone", "name=twin", "devices=1")
    assert code == 0
    assert numbers(head.folder) == numbers(twin)


def test_two_nodes_write_one_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that both have; in containers even the numbers of their processes are equal."""
    rename = Path.replace

    def late(draft: Path, path: Path) -> Path:
        monkeypatch.setattr(Path, "replace", rename)
        replace(path, "the other's")  # between this one's draft and its name
        return rename(draft, path)

    monkeypatch.setattr(Path, "replace", late)
    replace(tmp_path / "data.json", "this one's")
    assert (tmp_path / "data.json").read_text() == "this one's"
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


def test_a_clock_that_is_wrong_elsewhere_is_harmless(tiny: list[str], tmp_path: Path) -> None:
    """What comes from another node has the time at which it came."""
    config = plan.resolve(compose.config("train", [*tiny, "name=a", "devices=1"]))
    said = events.Warned(rank=1, text="here", time=4e9).record()
    with RunFolder(tmp_path / "run") as run:
        watch = watching(config, run)
        for node in (0, 1):
            words = [json.dumps(said).encode()]
            watch._ranks = [SimpleNamespace(spot=(node, 0), words=lambda words=words: words)]  # type: ignore[list-item]
            watch._hear()
        here, elsewhere = (record["time"] for record in run.events())
    assert here == 4e9
    assert abs(elsewhere - time.time()) < 60


def test_ranks_are_told_on_which_node_each_of_them_is(tiny: list[str], tmp_path: Path) -> None:
    """By rank, of those who are members; by that they add up inside nodes first."""
    config = plan.resolve(compose.config("train", [*tiny, "name=a", "devices=1"]))
    told: list[bytes] = []
    with RunFolder(tmp_path / "run") as run:
        watch = watching(config, run)
        watch._ranks = [
            SimpleNamespace(member=member, spot=(node, 0), named=member == 5, port=1, tell=told.append)  # type: ignore[misc]
            for member, node in ((2, 1), (5, 0), (7, 2), (8, 1))
        ]
        watch._members = [5, 2, 8]
        watch._publish("lost")
    (membership,) = map(json.loads, told)
    assert (membership["members"], membership["hosts"]) == ([5, 2, 8], [0, 1, 1])


def test_a_node_with_other_settings_is_refused(tiny: list[str], tmp_path: Path, port: int) -> None:
    """Before anything starts, on both, by the key that differs."""
    both = Nodes(tiny, tmp_path, port, "nodes=2", "devices=1")
    for node in [both.start(0), both.start(1, "eval.every=7")]:
        code, _, err = node.end()
        assert code == REFUSED
        assert "eval.every is 3 on node 0, 7 there" in err


@functools.cache
def two_nodes() -> Any:
    return compose.config("train", ["nodes=2", "devices=1", "accelerator=cpu"])


@pytest.fixture
def lobby(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """Node 0 of a run of two nodes, without any ranks."""
    monkeypatch.setenv("COLOSSUS_TOKEN", "secret")
    config = two_nodes()
    here = Here(nodes.Node(0, "127.0.0.1", port), config, tmp_path, tmp_path / "events.jsonl", None, 1)  # type: ignore[arg-type]
    with Fleet(here, 2, {"agrees": {"seed": 0}}) as found:
        yield found


def arrived(lobby: Fleet) -> list[remote.There]:
    until = time.monotonic() + TIMEOUT
    while not (changed := lobby.meet()) and time.monotonic() < until:
        time.sleep(0.01)
    return changed


def calls(lobby: Fleet) -> remote.Link:
    """Node 1's end of a link on which it has said hello."""
    link = remote.call(lobby.here.node)
    assert link is not None
    link.send(node=1, devices=1, agrees={"seed": 0})
    return link


def node_1(lobby: Fleet) -> tuple[remote.Link, remote.There]:
    """Both ends of the link to node 1, which has been let in."""
    link = calls(lobby)
    (there,) = arrived(lobby)
    return link, there


def test_who_does_not_know_the_token_is_not_let_in(lobby: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does he who says nothing, or nonsense, keep the others waiting."""
    node = lobby.here.node
    with socket.create_connection((node.host, node.port)), socket.create_connection((node.host, node.port)) as noise:
        noise.sendall(b"\0\0\0\4kill" * 9)
        monkeypatch.setenv("COLOSSUS_TOKEN", "guessed")
        with pytest.raises(Refused, match="another token: set COLOSSUS_TOKEN"):
            remote.call(node)
        assert lobby.meet() == []
        monkeypatch.setenv("COLOSSUS_TOKEN", "secret")
        link = remote.call(node)
        assert link is not None
        link.send(node=1, devices=2, agrees={"seed": 0})
        (there,) = arrived(lobby)
        assert (there.index, there.devices, lobby.devices) == (1, 2, 3)
        link.close()


def test_a_call_that_cannot_be_taken_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Too many open files, for a while, or a network's error that belongs to one caller."""
    failed, listen = threading.Event(), nodes.listen

    class Failing(socket.socket):
        def accept(self) -> Any:
            if not failed.is_set():
                failed.set()
                raise OSError(errno.EMFILE, "too many open files")
            return super().accept()

    monkeypatch.setattr(nodes, "listen", lambda *where: Failing(fileno=listen(*where).detach()))
    monkeypatch.setattr(fleet, "GREETERS", 1)
    lobby = request.getfixturevalue("lobby")
    assert failed.wait(TIMEOUT)
    link = calls(lobby)
    assert [there.index for there in arrived(lobby)] == [1]
    link.close()


def test_strangers_take_few_descriptors(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """So many are met at once, and all others after them; each connection is open once while that goes on."""
    met, too_many = threading.Semaphore(0), threading.Barrier(3)
    copies, crowds = list[int](), list[int]()

    def challenge(connection: Connection, secret: bytes) -> None:
        stranger = os.fstat(connection.fileno()).st_ino
        copies.append(sum(inode == stranger for _, inode in nodes.sockets()))
        with contextlib.suppress(threading.BrokenBarrierError):
            crowds.append(too_many.wait(0.5))
        met.release()
        raise EOFError

    monkeypatch.setattr(remote, "deliver_challenge", challenge)
    monkeypatch.setattr(fleet, "GREETERS", 2)
    node = request.getfixturevalue("lobby").here.node
    with contextlib.ExitStack() as strangers:
        for _ in range(5):
            strangers.enter_context(socket.create_connection((node.host, node.port)))
        assert all(met.acquire(timeout=TIMEOUT) for _ in range(5))
    assert (copies, crowds) == ([1] * 5, [])


def test_who_comes_under_the_number_of_a_node_that_is_there_waits_until_it_is_lost(lobby: Fleet) -> None:
    """It may be the same one, back before its loss is noticed; it may be another, which is no reason for a loss."""

    def waiting(number: int) -> bool:
        until, changed = time.monotonic() + TIMEOUT, lobby.meet()
        while lobby._arrived.qsize() != number and not changed and time.monotonic() < until:
            time.sleep(0.01)
            changed = lobby.meet()
        return lobby._arrived.qsize() == number and not changed

    first = calls(lobby)
    (there,) = arrived(lobby)
    second, third = calls(lobby), calls(lobby)
    assert waiting(2)
    second.close()
    assert waiting(1)
    assert (lobby.others, there.link.lost) == ({1: there}, "")
    first.close()
    gone, came = arrived(lobby) + arrived(lobby)
    assert (gone, lobby.others) == (there, {1: came})
    third.close()
    assert arrived(lobby) == [came]


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        ({"node": 1, "devices": 1, "agrees": {"seed": 1}}, "seed is 0 on node 0, 1 there"),
        ({"node": 2, "devices": 1, "agrees": {"seed": 0}}, "nodes 0 … 1"),
        ({"node": 1, "devices": 0, "agrees": {"seed": 0}}, "nodes 0 … 1"),
        ({"record": {}}, "nodes 0 … 1"),
    ],
)
def test_who_would_do_something_else_is_turned_away(hello: dict[str, Any], why: str, lobby: Fleet) -> None:
    link = remote.call(lobby.here.node)
    assert link is not None
    link.send(**hello)
    answers: list[dict[str, Any]] = []

    def hear() -> None:  # and hang up, as an agent does: that is waited for
        until = time.monotonic() + TIMEOUT
        while not answers and time.monotonic() < until:
            answers.extend(link.receive())
            time.sleep(0.01)
        link.close()

    hears = threading.Thread(target=hear)
    hears.start()
    with pytest.raises(Refused, match=why):
        lobby.gather(2, lambda text: None)
    hears.join()
    assert lobby.others == {}
    assert answers[0]["over"] == REFUSED
    assert why in answers[0]["why"]


def test_who_has_no_token_is_warned_also_where_nobody_is_waited_for(
    lobby: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nodes=1-4 the port is open from the start."""
    said: list[str] = []
    lobby.gather(1, said.append)
    assert said == []
    monkeypatch.delenv("COLOSSUS_TOKEN")
    lobby.gather(1, said.append)
    assert [text.split(":")[0] for text in said] == ["COLOSSUS_TOKEN is not set"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"node": "1"},
        {"node": True},
        {"devices": None},
        {"devices": 9},
        {"agrees": ["seed"]},
        {"agrees": {"seed": DEEP}},
    ],
)
def test_what_a_node_says_of_itself_has_types_and_bounds(wrong: dict[str, Any], lobby: Fleet) -> None:
    """More ranks than there are virtual ranks no node has."""
    right = {"node": 1, "devices": 8, "agrees": {"seed": 0}}
    assert lobby._unfit(right) == ""
    assert lobby._unfit({**right, **wrong}) == "there are nodes 0 … 1, of 1 … 8 ranks"
    assert all(lobby._unfit({key: right[key] for key in right if key != absent}) for absent in right)


def test_a_node_that_is_silent_is_lost_and_its_ranks_with_it(lobby: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its connection stands: on both sides, since each goes by what it hears."""
    monkeypatch.setattr(remote, "BEAT", 3600.0)
    link, there = node_1(lobby)
    rank = there.fork(0, {"member": 5, "joins": True})
    assert lobby.meet() == []
    assert link.lost == ""
    monkeypatch.setattr(remote, "GONE", 0.2)
    assert arrived(lobby) == [there]
    assert (lobby.others, rank.alive) == ({}, False)
    assert re.match(r"node 1 is lost: nothing heard for \d+ s", rank.died_of())
    list(link.receive())
    assert "closed" in link.lost


def test_the_last_word_arrives_though_both_speak_at_once(lobby: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that is closed with something unread takes back what was sent last; node 1 would wait for node 0."""
    monkeypatch.setattr(remote, "SETTLED", 2 * TIMEOUT)
    link, there = node_1(lobby)
    link.send(**{"from": 99, "word": "not read yet"})
    said, send = threading.Event(), there.link.send

    def says(**message: Any) -> None:
        send(**message)
        if message:  # no sign of life
            said.set()

    monkeypatch.setattr(there.link, "send", says)
    parting = threading.Thread(target=there.link.part, kwargs={"over": 0, "why": ""})
    parting.start()
    assert said.wait(TIMEOUT)
    time.sleep(0.2)
    for _ in range(3):
        link.send(**{"from": 99, "word": "still here"})
        time.sleep(0.05)
    assert {"over": 0, "why": ""} in list(link.receive())
    link.close()
    parting.join(TIMEOUT)
    assert not parting.is_alive()


def test_who_ends_because_node_0_does_is_told_where_to_read_why(lobby: Fleet) -> None:
    """It was stopped at once, say, which is written there and nowhere else."""
    link, _ = node_1(lobby)
    lobby.verdict = FAILED, ""
    parting = threading.Thread(target=lobby.__exit__, args=(None, None, None))
    parting.start()
    until, heard = time.monotonic() + TIMEOUT, list[dict[str, Any]]()
    while not heard and time.monotonic() < until:
        heard = [message for message in link.receive() if "over" in message]
    link.close()
    parting.join(TIMEOUT)
    assert heard == [{"over": FAILED, "why": "node 0 says why"}]


def test_what_an_agent_says_of_a_rank(lobby: Fleet, tmp_path: Path) -> None:
    """Its words, its port, its silence, its end, and the log that lies on another disk."""
    (tmp_path / "logs").mkdir()
    link, there = node_1(lobby)
    rank = there.fork(0, {"member": 5, "joins": True})
    assert rank.flight() == "on node 1"
    silence = {"silent": 4.5, "phase": "reduce", "flights": {5: "reduce: waits", 98: "whoever that is"}}
    ready = events.line(events.Ready(rank=5).record())
    for said in ({"word": "mark"}, {"word": ready}, {"port": 77}, silence):
        link.send(**{"from": 5, **said})
    link.send(**{"from": 99, "word": "whoever that is"})
    link.send(**{"from": 5, "exit_code": -9, "log": "stuck in reduce"})
    until = time.monotonic() + TIMEOUT
    while rank.alive and time.monotonic() < until:
        there.hear()
        assert rank.silent() in (None, (4.5, "reduce"))
    assert list(rank.words()) == [b"mark", ready.encode()]
    assert (rank.port, rank.silent(), rank.killed) == (77, None, True)
    assert "killed by SIGKILL" in rank.died_of()
    assert rank.flight() == "reduce: waits (node 1)"
    assert (tmp_path / "logs" / "rank-5.log").read_text() == "stuck in reduce"
    link.close()


def test_a_log_that_cannot_be_written_here_ends_no_run(lobby: Fleet, tmp_path: Path) -> None:
    assert not (tmp_path / "logs").exists()
    link, there = node_1(lobby)
    rank = there.fork(0, {"member": 5, "joins": True})
    link.send(**{"from": 5, "exit_code": -9, "log": "stuck in reduce"})
    while rank.alive:
        there.hear()
    assert not there.link.lost
    link.close()


def word(event: events.Event, **other: Any) -> bytes:
    """What an agent says of a rank that says this event, with other values."""
    return json.dumps({"from": 5, "word": json.dumps({**event.record(), **other})}).encode()


LEFT = events.Left(rank=5, step=3, stopped=False, time=0.0)
AUDITED = events.Audited(step=1, virtual_rank=0, suspects=[], time=0.0)
NONSENSE = [
    *(b"", b"kill", b"\xff", b"5", b"[1]", b"[" * 100_000, b'{"from": [5]}'),
    *(b'{"from": 5, "port": "http"}', b'{"from": 5, "port": 1e999}', b'{"from": 5, "silent": 4.5, "phase": "reduce"}'),
    b'{"from": 5, "silent": "long", "phase": "reduce", "flights": {}}',
    b'{"from": 5, "silent": 4.5, "phase": "reduce", "flights": []}',
    *(b'{"from": 5, "exit_code": "-9", "log": ""}', b'{"from": 5, "exit_code": -9}'),
    *(b'{"from": 5, "exit_code": 1, "log": 5}', b'{"from": 5, "exit_code": 1, "log": "\\ud800"}'),
    *(b'{"from": 5, "word": %b}' % said for said in (b"5", b'"\\ud800"', b'"{"', b'"5"', b'"[]"', b'"{}"')),
    *(b'{"from": 5, "word": "%b"}' % (b"[" * 100_000), b'{"from": 5, "word": "{\\"kind\\": \\"left\\"}"}'),
    *(word(LEFT, kind="cheer"), word(LEFT, kind=["left"]), word(LEFT, step="3"), word(LEFT, step=None)),
    *(word(LEFT, more=DEEP), word(AUDITED, suspects=[[1]])),
]


@pytest.mark.parametrize("said", NONSENSE, ids=lambda said: said[:60])
def test_who_says_what_no_node_says_is_lost(said: bytes, lobby: Fleet, tmp_path: Path) -> None:
    """The node, and not the run: nothing of that comes to the supervisor, which would take it for a rank's word."""
    (tmp_path / "logs").mkdir()
    link, there = node_1(lobby)
    rank = there.fork(0, {"member": 5, "joins": True})
    link.send(**json.loads(word(LEFT)))
    with link._sending:  # a sign of life in the middle of it would be another kind of nonsense
        link._connection.send_bytes(said)
    assert arrived(lobby) == [there]
    assert (lobby.others, rank.alive) == ({}, False)
    assert [json.loads(one)["kind"] for one in rank.words()] == ["left"]
    assert there.link.lost == "it said what no node says"
    link.close()


def test_a_message_without_end_is_not_waited_for(lobby: Fleet) -> None:
    link, there = node_1(lobby)
    os.write(link._connection.fileno(), struct.pack("!i", 2**31 - 1))
    assert arrived(lobby) == [there]
    assert there.link.lost == "its connection broke (bad message length)"
    link.close()


def test_a_signal_without_a_name_ends_a_rank_only() -> None:
    assert died_of(-35) == "killed by signal 35"
    assert died_of(-signal.SIGTERM) == "killed by SIGTERM"
