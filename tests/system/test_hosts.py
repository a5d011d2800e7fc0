"""Hosts joined by cables: what a run does when one is slow, flaps or is cut, or a host is lost."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import Fresh, Running, at_step, gone
from tests.system.hosts import NoHosts, call, heal, joined_hosts, left, on, place, shape
from tests.system.packages import need, need_root
from tests.test_fleet import SLOW
from tests.test_recovery import equals_one_rank, of_kind, once, records
from tests.test_resume import ENDLESS
from tests.test_train import sha256, steps, summary
from train.remote import GONE

pytestmark = pytest.mark.system

FEW = f"faults.at=[slow:1@{SLOW}]"  # steps, for the twin


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Two, or as many as a test's parameter says. Installs iproute2 where it is missing and can be had."""
    need_root("making network namespaces")
    need("ip", "iproute2")
    try:
        with joined_hosts(getattr(request, "param", 2)) as names:
            yield names
    except NoHosts as why:
        pytest.skip(f"skipped, because this machine makes no network namespaces ({why})")


class Host(Fresh):
    """A node of a run of two, on one of the hosts."""

    def __init__(
        self, hosts: list[str], index: int, tiny: list[str], folder: Path, *more: str, **environment: str
    ) -> None:
        overrides = [override for override in tiny if not override.startswith("runs=")]
        overrides += [f"runs={folder}/host{index}", "name=a", "nodes=2", "devices=2", *more]
        self.folder = folder / f"host{index}" / "a"
        self.process = subprocess.Popen(
            on(hosts[index], "python", "-m", "train", *overrides),
            env={**os.environ, **place(index), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def cut(host: str) -> None:
    """Nothing leaves this host any more; what others send still arrives."""
    shape(host, "rate", "8bit", "burst", "10", "limit", "10")


def test_joined_hosts_leave_the_state_of_one(hosts: list[str], tiny: list[str], tmp_path: Path) -> None:
    """nodes=2 with two ranks each, over a network, against one process: equal to the bit."""
    running = [Host(hosts, index, tiny, tmp_path) for index in (0, 1)]
    for node in running:
        code, out, err = node.end()
        assert code == 0, out + err
    assert summary(running[0].folder)["state_sha256"] == sha256(tiny, "name=alone", "devices=1")
    assert sorted(path.name for path in (running[1].folder / "logs").iterdir()) == ["rank-2.log", "rank-3.log"]


def test_a_step_crosses_the_cable_once_a_host(hosts: list[str], eight: list[str], tmp_path: Path) -> None:
    """By the interfaces' own counters, of whole runs: with two ranks a host 1 of the gradient's bytes, else 1.75."""
    crossed, states = [], set()
    for first in ("true", "false"):
        before = [left(host) for host in hosts]
        more = ("steps=40", "eval.every=0", "checkpoint.every=0", f"reduce.hosts_first={first}")
        running = [Host(hosts, index, eight, tmp_path / first, *more) for index in (0, 1)]
        for node in running:
            code, out, err = node.end()
            assert code == 0, out + err
        states.add(summary(running[0].folder)["state_sha256"])
        crossed.append([left(host) - was for host, was in zip(hosts, before, strict=True)])
    assert len(states) == 1
    for ours, flat in zip(*crossed, strict=True):
        assert 0.5 < ours / flat < 0.7, crossed


def test_a_cable_that_flaps_only_takes_its_time(hosts: list[str], tiny: list[str], tmp_path: Path) -> None:
    """Cut for five seconds, then again and again for a moment, one way and both: nobody is lost, the bits are right."""
    first, second = (Host(hosts, index, tiny, tmp_path, *ENDLESS, FEW) for index in (0, 1))
    first.wait_for(at_step(2))
    for ends, seconds in ((hosts, 5.0), (hosts[:1], 1.0), (hosts[1:], 1.0), (hosts, 0.5), (hosts, 0.5)):
        for host in ends:
            cut(host)
        time.sleep(seconds)
        for host in ends:
            heal(host)
        seen = len(steps(first.folder))
        first.wait_for(at_step(seen + 3))
    equals_one_rank(first, tiny, *ENDLESS)
    assert second.end()[0] == 75
    found = records(first.folder)
    once(found)
    assert not of_kind(found, "regroup")


@pytest.mark.parametrize("side", [0, 1, 2], ids=["from node 0", "from node 1", "both ways"])
def test_a_cable_that_is_cut_for_good(side: int, hosts: list[str], tiny: list[str], tmp_path: Path) -> None:
    """Node 0 goes on alone, node 1's ranks are ended: never two that write. When it is whole again, both take part."""
    first, second = (Host(hosts, index, tiny, tmp_path, *ENDLESS, FEW) for index in (0, 1))
    first.wait_for(at_step(2))
    ranks = set(sorted(second.children())[-2:])
    for host in hosts if side == 2 else hosts[side : side + 1]:
        cut(host)
    first.wait_for(lambda found: bool(of_kind(found, "regroup", world=2)))
    assert gone(ranks, within=GONE + 5)
    alone = len(steps(first.folder))
    first.wait_for(at_step(alone + 3))
    for host in hosts if side == 2 else hosts[side : side + 1]:
        heal(host)
    first.wait_for(lambda found: bool(of_kind(found, "regroup", world=4)))
    equals_one_rank(first, tiny, *ENDLESS)
    assert second.end()[0] == 75
    found = records(first.folder)
    once(found)
    assert len(of_kind(found, "start")) == 1
    lost = of_kind(found, "fault")
    assert len(lost) == 2
    assert all("node 1 is lost" in fault["cause"] for fault in lost)


@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_of_three_unequal_hosts_one_is_lost_and_replaced(hosts: list[str], eight: list[str], tmp_path: Path) -> None:
    """One, two and one ranks at 100 Mbit/s; the second host dies with its disk, and another one takes its place."""

    def node(index: int, folder: Path) -> Host:
        ranks = (1, 2, 1)[index]
        return Host(hosts, index, eight, folder, *ENDLESS, FEW, "nodes=3", f"devices={ranks}")

    for host in hosts:
        shape(host, "rate", "100mbit", "burst", "64kb", "latency", "50ms")
    first, second, third = (node(index, tmp_path) for index in range(3))
    first.wait_for(at_step(2))
    ranks = set(sorted(second.children())[-2:])
    second.process.kill()
    assert gone(ranks, within=5)
    second.end()
    first.wait_for(lambda found: bool(of_kind(found, "regroup", world=2)))
    second = node(1, tmp_path / "another disk")
    first.wait_for(lambda found: bool(of_kind(found, "regroup", world=4)))
    equals_one_rank(first, eight, *ENDLESS)
    assert [other.end()[0] for other in (second, third)] == [75, 75]
    found = records(first.folder)
    once(found)
    assert len(of_kind(found, "start")) == 1


def test_one_host_listens_on_loopback_only(hosts: list[str], tiny: list[str], tmp_path: Path) -> None:
    """While a run of several ranks goes on, nothing but 127.0.0.1 is listened at."""
    if shutil.which("ss") is None:
        pytest.skip("skipped, because the ss command is missing")
    process = subprocess.Popen(
        on(hosts[0], "python", "-m", "train", *tiny, "name=a", "devices=3", "steps=100000"),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        listening = call(*on(hosts[0], "ss", "-Hltn")).stdout.splitlines()
        addresses = [line.split()[3] for line in listening]
        assert addresses
        assert all(address.startswith("127.0.0.1:") for address in addresses), addresses
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 75


def test_nodes_that_share_a_folder_stop_and_go_on(tiny: list[str]) -> None:
    """Only node 0's record has the starts of a run. With sharded state a loss on node 1 has all ranks start again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free.getsockname()[1])}
    for more, expected in (("stop_after=0.1s", 75), ("faults.at=[kill:1@backward:5]", 0)):
        arguments = ("name=a", "nodes=2", "devices=1", "sharding=optimizer", more)
        running = [Running(tiny, *arguments, **where, PET_NODE_RANK=str(index)) for index in (0, 1)]
        for node in running:
            code, out, err = node.end()
            assert code == expected, out + err
    assert [start["step"] for start in of_kind(records(running[0].folder), "start")][2:] == [3]
    assert summary(running[0].folder)["state_sha256"] == sha256(tiny, "name=b", "devices=1")
