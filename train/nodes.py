"""Where this process stands among the nodes of a run: with `nodes=N` the same command runs once on each of them.

Read from what the launcher sets: `PET_*` (Kubeflow Trainer, torchrun's own names), `SLURM_*`, `SKYPILOT_*`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import stat
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from train.checks import Refused, needed

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
PORT = 29400  # where node 0 listens to the others, unless PET_MASTER_PORT says otherwise


@dataclass(frozen=True, slots=True)
class Node:
    index: int
    host: str  # of node 0
    port: int  # where it listens to the others; 0: there are none

    @property
    def alone(self) -> bool:
        return self.port == 0


def here(nodes: int, env: Mapping[str, str] = os.environ) -> Node:
    """This node's place among at most `nodes`. Raises Refused where nobody says which of several this is."""
    if nodes == 1:
        return Node(0, "127.0.0.1", 0)
    port = int(env.get("PET_MASTER_PORT", PORT))
    if "PET_NODE_RANK" in env and "PET_MASTER_ADDR" in env:
        node = Node(int(env["PET_NODE_RANK"]), env["PET_MASTER_ADDR"], port)
    elif "SLURM_NODEID" in env and "SLURM_JOB_NODELIST" in env:
        node = Node(int(env["SLURM_NODEID"]), _first_host(env["SLURM_JOB_NODELIST"]), port)
    elif "SKYPILOT_NODE_RANK" in env and env.get("SKYPILOT_NODE_IPS"):
        node = Node(int(env["SKYPILOT_NODE_RANK"]), env["SKYPILOT_NODE_IPS"].split()[0], port)
    else:
        unset = "neither PET_NODE_RANK and PET_MASTER_ADDR nor SLURM_* nor SKYPILOT_* are set"
        raise Refused("nodes", f"{nodes} nodes, but {unset}")
    if not 0 <= node.index < nodes:
        raise Refused("nodes", f"this is node {node.index}, but there are {nodes} at most")
    return node


def _first_host(nodelist: str) -> str:
    """`gpu[07-09,12],big1` -> `gpu07`."""
    match = needed(re.match(r"([^,\[]+)(?:\[(\d+))?", nodelist), "SLURM_JOB_NODELIST", f"'{nodelist}' names no host")
    return match[1] + (match[2] or "")


def listen(node: Node, port: int = 0) -> socket.socket:
    """A socket that listens, at any free port or at this one: on loopback unless the run has several nodes."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1" if node.alone else "0.0.0.0", port))
    except OSError as error:
        listener.close()
        raise Refused("PET_MASTER_PORT", f"port {port} cannot be listened at ({error.strerror})") from error
    listener.listen(128)
    return listener


def bind_to(peer: tuple[str, int] | None) -> None:
    """Let gloo and NCCL talk through the interface that reaches `peer`, or through loopback where there is none.

    Left to itself, gloo binds to what the host's own name resolves to, which is often 127.0.0.1, on every host.
    """
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ[variable] = os.environ.get(variable, _interface(*peer)) if peer else loopback


def _interface(host: str, port: int) -> str:
    """The name of the network interface through which this (Linux) host reaches `host`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # no packet is sent: the kernel only chooses a route
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                request = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(request[20:24]) == address:
                    return name
    raise Refused("nodes", f"no network interface has the address {address}, which reaches {host}")


def sockets() -> set[tuple[int, int]]:
    """The sockets that this process has open, where the system tells."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # closed since it was listed
                status = os.fstat(int(name))
                if stat.S_ISSOCK(status.st_mode):
                    found.add((int(name), status.st_ino))
    return found
