"""Groups on GPUs that lose a rank: what they do is tried on a device that is made of gloo's collectives.

It has of a GPU what matters here: waiting for a collective returns at once, and only an event says when it has ended.
Numbers are not ordered by a stream, so where bits are compared the host runs ahead of nothing.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from lightning.fabric.plugins import Precision
from torch._C._distributed_c10d import ProcessGroupGloo, Store

from tests import dist, test_regroup
from tests.test_regroup import LATE, Half, Member
from tests.test_train import summary, train
from train import compose, events, nccl, plan
from train.checks import Refused
from train.group import Changed, Group, Membership, Place


class Device:
    """A communicator, and the one stream of its device."""

    awaited: ClassVar[list[Any]] = []  # by the stream
    left: ClassVar[list[Any]] = []

    def __init__(self, store: Store, rank: int, world: int, device: torch.device, timeout: timedelta) -> None:
        self._gloo = ProcessGroupGloo(store, rank, world, timeout)

    def __getattr__(self, name: str) -> Any:
        def launch(*arguments: Any) -> Any:
            work = getattr(self._gloo, name)(*arguments)
            return SimpleNamespace(wait=lambda: Device.awaited.append(work))

        return launch

    def abort(self) -> None:
        Device.left.append(self._gloo)  # gloo's own end would wait


class Event:
    def record(self) -> None:
        self._before = list(Device.awaited)

    def query(self) -> bool:
        return all(work.is_completed() for work in self._before)


class OnGpu(Member):
    def __init__(self, outer: Group) -> None:
        super().__init__(outer)
        self.group._on_gpu = True


def emulate(ahead: int = nccl.AHEAD) -> None:
    """In this process, which a test has forked."""
    nccl.communicator, nccl.AHEAD, torch.cuda.Event = Device, ahead, Event  # type: ignore


def leaves_in_the_middle(outer: Group) -> list[Any]:
    """Rank 1 never sends its part of a step's sum. Rank 0 is told to go on without it, and then with it again."""
    emulate()
    member = OnGpu(outer)
    member.join(1, 0, 1)
    assert member.gathered() == [0, 1]
    half, changed, began = Half(member.group), False, time.monotonic()
    before = half.flat.parameters.detach().clone()
    if outer.rank == 0:
        threading.Timer(0.3, member.send, (2, 0)).start()
        try:
            half.leaves()
            half.reducer.finish()  # after which the optimizer would be launched
        except Changed as change:
            changed = str(change) == "epoch 2"
        assert torch.equal(before, half.flat.parameters)
        member.group.join()
        assert (member.group.world, len(Device.left)) == (1, 1)
    outer.barrier()
    member.join(3, 0, 1)
    assert member.gathered() == [0, 1]
    return [changed, time.monotonic() - began < LATE, sorted(half.reducer.kept())]


def test_a_sum_that_never_arrives_is_left_before_the_optimizer_is_launched() -> None:
    """What of the step is finished is kept: two subtrees of the four leaves that were computed."""
    (changed, soon, kept), _ = dist.run("tests.test_nccl:leaves_in_the_middle", 2)
    assert (changed, soon) == (True, True)
    assert kept in ([0, 1], [0, 1, 2])


def takes_over(group: Group, **arguments: Any) -> dict[str, Any]:
    emulate(ahead=0)
    test_regroup.Member = OnGpu  # type: ignore[misc]
    return test_regroup.takes_over(group, **arguments)


def test_a_step_is_taken_over_to_the_same_bits() -> None:
    arguments: dict[str, Any] = {"dtype": "float32", "done": [2, 1, 0]}
    assert dist.run("tests.test_nccl:takes_over", 3, **arguments) == dist.run(
        "tests.test_regroup:takes_over", 3, **arguments
    )


class Never(Event):
    made = 0

    def __init__(self) -> None:
        Never.made += 1

    def query(self) -> bool:
        return False


def test_the_host_does_not_run_far_ahead_of_a_collective_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the queue of launches fills up, and holds it where nothing can be heard."""
    monkeypatch.setattr(torch.cuda, "Event", Never)

    def look() -> None:
        raise Changed

    launched = nccl.Launched(look)
    for _ in range(nccl.AHEAD):
        launched.wait(SimpleNamespace(wait=lambda: None))
    with pytest.raises(Changed):
        launched.wait(SimpleNamespace(wait=lambda: None))
    assert Never.made == nccl.AHEAD + 1
    launched.forget()
    launched.see()


def test_a_communicator_that_cannot_be_aborted_ends_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels would hold up whatever is launched next. Meanwhile the rank gives signs of life."""
    monkeypatch.setattr("train.group.PATIENCE", 0.05)
    alone, signs, let_go = Membership(epoch=1, members=[0], host="", port=0), [], threading.Event()

    def news() -> Membership:
        signs.append(time.monotonic())
        return alone

    group = Group(Place.alone(), Precision(), news=news)
    group._on_gpu, group.processes = True, SimpleNamespace(abort=lambda: let_go.wait(LATE))
    with pytest.raises(TimeoutError, match="still on the device"):
        group.join()
    let_go.set()
    assert len(signs) > 3


def test_gpus_heal_without_spares_which_would_take_a_rank_s_memory(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose.config("train", [*tiny, "accelerator=cuda"])
    assert config.heals
    assert not compose.config("train", [*tiny, "accelerator=cuda", "sharding=optimizer"]).heals
    monkeypatch.setattr("train.hardware.gpus", lambda: (SimpleNamespace(name="any", memory=2**36),) * 2)
    with pytest.raises(Refused, match="spares"):
        plan.resolve(compose.config("train", [*tiny, "accelerator=cuda", "recovery.spares=1"]))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_gpus_a_killed_rank_changes_no_bit(tiny: list[str]) -> None:
    settings = ["accelerator=cuda", "compile=false", "checkpoint.every=0", "steps=12"]
    code, folder = train(tiny, *settings, "name=a", "devices=2", "faults.at=[kill:1@backward:4]")
    assert code == 0
    kinds = [record["kind"] for record in events.read(folder / "events.jsonl")]
    assert (kinds.count("start"), kinds.count("fault")) == (1, 1)
    code, twin = train(tiny, *settings, "name=twin", "devices=1")
    assert code == 0
    assert summary(twin)["state_sha256"] == summary(folder)["state_sha256"]
