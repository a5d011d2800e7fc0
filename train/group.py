"""Membership: which ranks there are, and how a rank joins them.

The supervisor gives each rank its place (`Place`); the ranks meet at a TCP store that rank 0 hosts. On one host
the store listens on loopback only: `TCPStore` would listen on all interfaces even when told 127.0.0.1, so it is
handed a socket that is bound already.

`Group` is a Lightning Fabric strategy as well: one device a rank, nothing wrapped, nothing reduced behind the
loop's back. Fabric brings devices, precision and loggers; the sum of the gradients is `train.reduce`'s.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import Precision
from lightning.fabric.strategies.strategy import Strategy
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore, Store, TCPStore

from train.config import Refused
from train.ranks import Ranks

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
TIMEOUT = timedelta(minutes=30)  # a collective that takes longer has lost a rank; the supervisor sees that first


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank stands: among all ranks, on its host, on which device, and where the ranks meet."""

    rank: int
    world: int
    local_rank: int
    device: str  # "cpu", "cuda:3"
    host: str  # of the store
    port: int
    loopback: bool  # all ranks are on this host
    backend: str  # "gloo", "nccl"


class Group(Ranks, Strategy):
    """The ranks of a run, as a strategy of Fabric's."""

    def __init__(self, place: Place, precision: Precision) -> None:
        Strategy.__init__(self, precision=precision)
        self._device = torch.device(place.device)
        wire = torch.device("cpu") if place.backend == "gloo" else self._device
        Ranks.__init__(self, place.rank, place.world, wire)
        self.global_rank, self.local_rank, self.world_size = place.rank, place.local_rank, place.world

    # What Fabric asks of a strategy.

    @property
    def root_device(self) -> torch.device:
        return self._device

    @property
    def is_global_zero(self) -> bool:
        return self.rank == 0

    def module_to_device(self, module: nn.Module) -> None:
        module.to(self._device)

    def all_reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = dist.ReduceOp.SUM) -> Tensor:
        """In place on the wire's device; the returned tensor holds the result on the tensor's own."""
        if self.world == 1:
            return tensor
        on_wire = tensor.to(self.wire)
        dist.all_reduce(on_wire, op=reduce_op)
        return on_wire.to(tensor.device)

    def barrier(self, name: str | None = None) -> None:
        if self.world > 1:
            self.all_reduce(torch.zeros(1))

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        raise NotImplementedError("backward never synchronizes here: the reducer does, once a step")

    def module_sharded_context(self) -> AbstractContextManager[None]:
        raise NotImplementedError("nothing is sharded by Fabric here")


def join(place: Place, listener: socket.socket | None) -> Store:
    """Meet the other ranks: after this, torch.distributed's default group is this run's. Returns the store.

    `listener` is rank 0's socket for the store, bound and listening.
    """
    if place.world == 1:
        return HashStore()
    # Left to itself, gloo binds to what the host's own name resolves to, which is often 127.0.0.1, on every host.
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    interface = loopback if place.loopback else _interface(place.host, place.port)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ[variable] = interface if place.loopback else os.environ.get(variable, interface)
    store = TCPStore(
        place.host,
        place.port,
        world_size=place.world,
        is_master=listener is not None,
        timeout=TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener is not None else None,
    )
    dist.init_process_group(place.backend, store=store, rank=place.rank, world_size=place.world, timeout=TIMEOUT)
    return store


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


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
