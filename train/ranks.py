"""This rank among the others, as the sum of the gradients sees it: whoever made the process group, torch alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # see _World: has to be imported before there is a group
from torch import Tensor

Wait = Callable[[], object]


class Changed(Exception):
    """The ranks are not what they were: this group is to be left for the next one."""


class Ranks:
    """This rank among the others: what the sum of the gradients needs to know of them."""

    def __init__(self, rank: int, world: int, wire: torch.device, processes: Any = None) -> None:
        """`processes`: torch's process group, or a bare backend; None where the world is 1."""
        self.rank, self.world, self.processes = rank, world, processes
        self.hosts: Sequence[int] = ()  # by rank, the host that it is on, where that is known
        self.doing = ""  # which collective is waited for, or was last: for who asks why it takes so long
        self.wire = wire  # where tensors must lie to travel: gloo's in the host's memory, nccl's in the device's own

    @classmethod
    def default(cls) -> Ranks:
        """The ranks of torch.distributed's default group; a single one where there is no group."""
        if not dist.is_initialized():
            return cls(0, 1, torch.device("cpu"))
        wire = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        return cls(dist.get_rank(), dist.get_world_size(), torch.device(wire), _World())

    def launch(self, start: Callable[..., Any], *arguments: Any) -> Any:
        """Start a collective. Every one is started here: it may find that the one before has failed."""
        return start(*arguments)

    def wait(self, work: Any, what: str) -> None:
        """For the end of a collective. Every one is waited for here."""
        self.doing = f"waits for {what}"
        self._wait(work)
        self.doing = f"after {what}"

    def _wait(self, work: Any) -> None:
        work.wait()

    def look(self) -> None:
        """Raise Changed where the ranks are not what they were; these never change."""

    def settle(self, reads: bool) -> None:
        """Return when what was waited for is there. A stream may wait instead of the host, if that `reads` nothing."""

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """(…) on each rank -> (W, …) on all of them."""
        if self.world == 1:
            return tensor.unsqueeze(0)
        sent = tensor.contiguous().to(self.wire)
        gathered = torch.empty(self.world, *sent.shape, dtype=sent.dtype, device=self.wire)
        work = self.launch(self.processes._allgather_base, gathered.view(-1), sent.view(-1))
        self.wait(work, f"an all-gather of {sent.numel():,} numbers")
        self.settle(tensor.device.type != self.wire.type)
        return gathered.to(tensor.device)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Tensors only: objects would travel as pickles. What was there stays until all of it has arrived."""
        if not isinstance(obj, Tensor):
            raise TypeError(f"only tensors are broadcast, not {type(obj).__name__}")
        if self.world > 1:
            on_wire = obj.to(self.wire, copy=True)
            self.wait(self.launch(self.processes.broadcast, on_wire, src), f"a broadcast from rank {src}")
            self.settle(obj.device.type != self.wire.type)
            obj.copy_(on_wire)
        return obj

    def sum_up(self, tensor: Tensor) -> Any:
        """Start to add up a tensor on the wire, in place and in the backend's own order."""
        return self.launch(self.processes.allreduce, tensor)

    def exchange(self, received: Tensor, sent: Tensor, from_each: Sequence[int], to_each: Sequence[int]) -> Any:
        """Start an all-to-all of 1-D tensors on the wire, cut into so many elements from and to each rank."""
        return self.launch(self.processes.alltoall_base, received, sent, from_each, to_each)


class _World:
    """torch.distributed's default group, looked up whenever it is needed: nobody but torch holds it.

    A group that is held outlives `destroy_process_group` with its threads, and when the interpreter ends under one of
    gloo's that still has a tensor in hand, the process aborts ("terminate called without an active exception").
    Torch's own `torch.distributed.nn`, which optimizers import when they are built, has it as a default argument for
    good if it is imported after `init_process_group`.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(dist.group.WORLD, name)


def gather(ranks: Ranks, target: Tensor, chunk: Tensor) -> Wait:
    """Start to bring every rank's chunk into `target`, (W·chunk,); the returned call waits for it."""
    direct = target.device == ranks.wire and target.dtype == chunk.dtype
    gathered = target if direct else torch.empty(target.shape, dtype=chunk.dtype, device=ranks.wire)
    chunk = chunk.to(ranks.wire)
    work = ranks.launch(ranks.processes._allgather_base, gathered, chunk)

    def wait(sent: Tensor = chunk) -> None:  # which must live until it has been sent
        a = target.storage_offset()
        ranks.wait(work, f"the gather of elements {a:,} to {a + target.numel():,}")
        if not direct:
            target.copy_(gathered)

    return wait
