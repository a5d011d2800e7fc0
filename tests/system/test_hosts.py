"""Two hosts: network namespaces with addresses of their own, joined by a pair of virtual cables."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import Running
from tests.system.packages import need, need_root
from tests.test_train import sha256, summary

pytestmark = pytest.mark.system

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces that see each other and nothing else. Installs iproute2 where it is missing and can be had."""
    need_root("making network namespaces")
    need("ip", "iproute2")
    names = [f"pc{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"skipped, because this machine makes no network namespaces ({error.stderr.strip()})")
    try:
        _run("ip", "link", "add", "pc0", "netns", names[0], "type", "veth", "peer", "name", "pc0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "pc0")
            _run("ip", "-n", name, "link", "set", "pc0", "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _command(name: str, overrides: list[str]) -> list[str]:
    return ["ip", "netns", "exec", name, sys.executable, "-m", "train", *overrides]


def test_two_hosts_leave_the_state_of_one(hosts: list[str], tiny: list[str], tmp_path: Path) -> None:
    """nodes=2 with two ranks each, over a network, against one process: equal to the bit."""
    overrides = [override for override in tiny if not override.startswith("runs=")]
    running = []
    for index, name in enumerate(hosts):
        environment = {**os.environ, "PET_NODE_RANK": str(index), "PET_MASTER_ADDR": ADDRESSES[0]}
        arguments = [*overrides, f"runs={tmp_path}/host{index}", "name=a", "nodes=2", "devices=2"]
        running.append(
            subprocess.Popen(
                _command(name, arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    for process in running:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, out + err
    alone = [*overrides, f"runs={tmp_path}/alone", "name=a", "devices=1"]
    subprocess.run(_command(hosts[0], alone), check=True, capture_output=True)
    digests = {
        json.loads((tmp_path / where / "a/summary.json").read_text())["state_sha256"] for where in ("host0", "alone")
    }
    assert len(digests) == 1
    assert sorted(path.name for path in (tmp_path / "host1/a/logs").iterdir()) == ["rank-2.log", "rank-3.log"]


def test_one_host_listens_on_loopback_only(hosts: list[str], tiny: list[str], tmp_path: Path) -> None:
    """While a run of several ranks goes on, nothing but 127.0.0.1 is listened at."""
    if shutil.which("ss") is None:
        pytest.skip("skipped, because the ss command is missing")
    process = subprocess.Popen(
        _command(hosts[0], [*tiny, "name=a", "devices=3", "steps=100000"]), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        listening = _run("ip", "netns", "exec", hosts[0], "ss", "-Hltn").stdout.splitlines()
        addresses = [line.split()[3] for line in listening]
        assert addresses
        assert all(address.startswith("127.0.0.1:") for address in addresses), addresses
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 75


def test_nodes_that_share_a_folder_stop_and_go_on(tiny: list[str]) -> None:
    """Only node 0's record has the starts of a run, and each node clears up in the same folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free.getsockname()[1])}
    for more, expected in ((["stop_after=0.1s"], 75), ([], 0)):
        arguments = ("name=a", "nodes=2", "devices=1", *more)
        running = [Running(tiny, *arguments, **where, PET_NODE_RANK=str(index)) for index in (0, 1)]
        for node in running:
            code, out, err = node.end()
            assert code == expected, out + err
    assert summary(running[0].folder)["state_sha256"] == sha256(tiny, "name=b", "devices=1")
