"""Hosts on this machine: network namespaces with addresses of their own, each with a virtual cable to one switch."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

CABLE = "pc0"  # the name of the interface on either host


def address(index: int) -> str:
    """Of a host, the first being 0."""
    return f"10.77.0.{index + 1}"


class NoHosts(Exception):
    """This machine makes no network namespaces; why."""


def call(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


@contextlib.contextmanager
def joined_hosts(count: int = 2) -> Iterator[list[str]]:
    """The names of namespaces that see each other and nothing else. Needs root and iproute2; raises NoHosts."""
    names = [f"pc{os.getpid()}{letter}" for letter in "abcdefgh"[:count]]
    switch = f"pc{os.getpid()}switch"
    try:
        try:
            for name in (switch, *names):
                call("ip", "netns", "add", name)
            call("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        except subprocess.CalledProcessError as error:
            raise NoHosts(error.stderr.strip()) from error
        call("ip", "-n", switch, "link", "set", "bridge", "up")
        for index, name in enumerate(names):
            port = f"port{index}"
            call("ip", "link", "add", CABLE, "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
            call("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            call("ip", "-n", name, "addr", "add", f"{address(index)}/24", "dev", CABLE)
            call("ip", "-n", name, "link", "set", CABLE, "up")
            call("ip", "-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on(host: str, *command: str) -> list[str]:
    """A command as it is run on that host, with this Python in the place of `python`."""
    return ["ip", "netns", "exec", host, *(sys.executable if word == "python" else word for word in command)]


def place(index: int) -> dict[str, str]:
    """What tells a node which one it is."""
    return {"PET_NODE_RANK": str(index), "PET_MASTER_ADDR": address(0), "COLOSSUS_TOKEN": "of this test"}


def shape(host: str, *rate: str) -> None:
    """Let a token bucket filter decide what leaves this host: `rate 100mbit burst 64kb latency 50ms`."""
    call("tc", "-n", host, "qdisc", "replace", "dev", CABLE, "root", "tbf", *rate)


def heal(host: str) -> None:
    call("tc", "-n", host, "qdisc", "del", "dev", CABLE, "root")


def left(host: str) -> int:
    """The bytes that have left this host by the cable."""
    return int(call(*on(host, "cat", f"/sys/class/net/{CABLE}/statistics/tx_bytes")).stdout)
