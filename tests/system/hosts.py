"""Hosts on this machine: network namespaces with addresses of their own, joined by a pair of virtual cables."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "pc0"  # the name of the interface on either host


class NoHosts(Exception):
    """This machine makes no network namespaces; why."""


def call(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """The names of two namespaces that see each other and nothing else. Needs root and iproute2; raises NoHosts."""
    names = [f"pc{os.getpid()}{side}" for side in "ab"]
    try:
        try:
            for name in names:
                call("ip", "netns", "add", name)
        except subprocess.CalledProcessError as error:
            raise NoHosts(error.stderr.strip()) from error
        call("ip", "link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", CABLE)
            call("ip", "-n", name, "link", "set", CABLE, "up")
            call("ip", "-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on(host: str, *command: str) -> list[str]:
    """A command as it is run on that host, with this Python in the place of `python`."""
    return ["ip", "netns", "exec", host, *(sys.executable if word == "python" else word for word in command)]


def place(index: int) -> dict[str, str]:
    """What tells a node which one it is."""
    return {"PET_NODE_RANK": str(index), "PET_MASTER_ADDR": ADDRESSES[0], "COLOSSUS_TOKEN": "of this test"}


def shape(host: str, *rate: str) -> None:
    """Let a token bucket filter decide what leaves this host: `rate 100mbit burst 64kb latency 50ms`."""
    call("tc", "-n", host, "qdisc", "replace", "dev", CABLE, "root", "tbf", *rate)


def heal(host: str) -> None:
    call("tc", "-n", host, "qdisc", "del", "dev", CABLE, "root")


def left(host: str) -> int:
    """The bytes that have left this host by the cable."""
    return int(call(*on(host, "cat", f"/sys/class/net/{CABLE}/statistics/tx_bytes")).stdout)
