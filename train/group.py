"""Membership: which ranks there are, how a rank joins them, and how it leaves a group that has lost one.

The supervisor alone says who belongs together: it sends each rank a `Membership`, numbered by epochs, whenever that
changes. A rank joins by making a new process group from it; the old one is abandoned. It may be in the middle of a
collective that will never end: so every wait is cut in slices, between which the rank looks for a newer epoch, and
goes on to that by raising `Changed`. Nothing else is interrupted.

Ranks meet at a TCP store that the first of them hosts; each has a socket for one from its birth. On one host it
listens on loopback only: `TCPStore` would listen on all interfaces even when told 127.0.0.1.

`Group` is a Lightning Fabric strategy as well: one device a rank, nothing wrapped, nothing reduced behind the
loop's back. Fabric brings devices, precision and loggers; the sum of the gradients is `train.reduce`'s.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import Precision
from lightning.fabric.strategies.strategy import Strategy
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from train import backends, nodes
from train.ranks import Changed, Ranks

PATIENCE = 60.0  # seconds in which the supervisor must say how it goes on after a collective has failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank stands: which process of the run it is, on which device, and how the ranks talk to each other."""

    member: int  # unique in the run's life: a replacement is a new one
    local_rank: int
    device: str  # "cpu", "cuda:3"
    loopback: bool  # all ranks are on this host
    backend: str  # "gloo", "nccl"
    heals: bool  # the supervisor replaces the membership when a rank is lost

    @classmethod
    def alone(cls, device: str = "cpu") -> Place:
        """Of a process that trains, or computes again, by itself."""
        return cls(member=0, local_rank=0, device=device, loopback=True, backend="gloo", heals=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Who belongs together from now on, as the supervisor says."""

    epoch: int
    members: list[int]  # by rank
    host: str  # where the first of them hosts the store
    port: int
    hosts: list[int] = field(default_factory=list)  # by rank, the number of the node that it is on
    recorded: int = 0  # the last step whose event the supervisor has
    boundary: bool = False  # nobody is lost: go on to it together, between two steps
    why: str = "start"  # "start", "lost", "joined", "resized"


class Dismissed(Exception):
    """This rank is not a member any more."""


class Group(Ranks, Strategy):
    """The ranks of a run, as a strategy of Fabric's. Alone until it joins others."""

    def __init__(
        self,
        place: Place,
        precision: Precision,
        listener: socket.socket | None = None,
        news: Callable[[], Membership | None] = lambda: None,
    ) -> None:
        """`listener` is for the store that this rank hosts when it is the first; `news`, the newest membership sent."""
        Strategy.__init__(self, precision=precision)
        self._place, self._listener, self._news = place, listener, news
        self._device = torch.device(place.device)
        wire = torch.device("cpu") if place.backend == "gloo" else self._device
        Ranks.__init__(self, 0, 1, wire)
        self.local_rank = place.local_rank
        self.membership = Membership(epoch=0, members=[place.member], host="", port=0)
        self.store: Store = HashStore()
        self.settled = self.membership  # the last for which all is done that a new group begins with
        self._joined = backends.Joined()
        self._server: Store | None = None

    @property
    def global_rank(self) -> int:
        return self.rank

    @property
    def world_size(self) -> int:
        return self.world

    # Membership.

    def launch(self, start: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return start(*arguments)
        except RuntimeError as error:
            if not self._place.heals:
                raise
            raise Changed(str(error)) from error

    def _wait(self, work: Any) -> None:
        self.launch(self._joined.wait, work, self.look)

    def settle(self, reads: bool) -> None:
        self._joined.settle(self.look, reads)

    def look(self) -> None:
        """Raise Changed where there is a newer membership, unless it waits for the end of a step that is under way.

        A group that has not settled heeds every one: those that come together must have heard of the same.
        """
        newer = self.newer()
        if newer is not None and not (newer.boundary and self.settled is self.membership):
            raise Changed(f"epoch {newer.epoch}")

    def newer(self) -> Membership | None:
        """The newest membership, if this group's is an older one."""
        return news if (news := self._news()) and news.epoch > self.membership.epoch else None

    def join(self) -> None:
        """Leave this group for the newest one, once there is a newer. Raises Changed where that has changed again."""
        left, self._joined = self._joined, backends.Joined()
        self.processes, self.world = None, 1
        left.leave(self._news)  # asks for news all the time: a sign of life
        until = time.monotonic() + PATIENCE
        while (new := self.newer()) is None:
            if self.membership.epoch == 0:  # a spare, which stands by
                until = time.monotonic() + PATIENCE
            if time.monotonic() > until:
                raise TimeoutError("the group has failed, and the supervisor does not say how to go on")
            time.sleep(0.001)
        if self._place.member not in new.members:
            raise Dismissed
        self.membership = new
        self.rank, self.world = new.members.index(self._place.member), len(new.members)
        self.hosts = new.hosts
        if self.world == 1:
            self.store = HashStore()
            return
        if self._server is None and self._listener is not None and self.rank == 0:
            self._server = TCPStore(
                new.host,
                new.port,
                is_master=True,
                wait_for_workers=False,
                timeout=backends.TIMEOUT,
                master_listen_fd=self._listener.detach(),
            )
        made: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._meet, args=(new, self.rank, made), daemon=True, name="meet").start()
        while made.empty():
            self.look()
            time.sleep(0.001)
        met = made.get()
        if isinstance(met, RuntimeError) and self._place.heals:
            raise Changed(str(met)) from met
        if isinstance(met, Exception):
            raise met
        self.store, self._joined = met
        self.processes = self._joined.processes

    def _meet(self, new: Membership, rank: int, made: queue.Queue[Any]) -> None:
        """Make the process group; in a thread, since it waits for all members, and one may be lost meanwhile."""
        try:
            before = nodes.sockets()
            nodes.bind_to(None if self._place.loopback else (new.host, new.port))
            client = TCPStore(new.host, new.port, is_master=False, wait_for_workers=False, timeout=backends.TIMEOUT)
            store = PrefixStore(str(new.epoch), client)
            world, heals = len(new.members), self._place.heals
            made.put((store, backends.joined(store, rank, world, self.wire, heals, before)))
        except Exception as error:
            made.put(error)

    def leave(self) -> None:
        if self.processes is not None and dist.is_initialized():
            dist.destroy_process_group()
        self._joined, self.processes = backends.Joined(), None

    # What Fabric asks of a strategy.

    @property
    def root_device(self) -> torch.device:
        return self._device

    @property
    def is_global_zero(self) -> bool:
        return self.rank == 0

    def module_to_device(self, module: nn.Module) -> None:
        module.to(self._device)

    def all_reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = None) -> Tensor:
        """The sum, in place on the wire's device; the returned tensor holds the result on the tensor's own."""
        if self.world == 1:
            return tensor
        on_wire = tensor.to(self.wire)
        self.wait(self.sum_up(on_wire), "an all-reduce")
        self.settle(tensor.device.type != self.wire.type)
        return on_wire.to(tensor.device)

    def barrier(self, name: str | None = None) -> None:
        self.all_reduce(torch.zeros(1))

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        raise NotImplementedError("backward never synchronizes here: the reducer does, once a step")

    def module_sharded_context(self) -> AbstractContextManager[None]:
        raise NotImplementedError("nothing is sharded by Fabric here")
