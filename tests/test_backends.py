"""Groups on GPUs that lose a rank (those on CPUs: test_regroup): tried on a device made of gloo's collectives.

It has of a GPU what matters here: waiting for a collective returns at once, and only an event says when it has ended.
Numbers are not ordered by a stream, so where bits are compared the host runs ahead of nothing.
"""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch._C._distributed_c10d import HashStore, ProcessGroupGloo, Store

from tests import dist, test_regroup
from tests.test_regroup import Half, Member
from tests.test_train import summary, train
from train import backends, compose, events, folder, plan, resize
from train.checks import Refused
from train.commands import Resize
from train.group import Group
from train.ranks import Changed


class Communicator:
    """NCCL's, and the one stream of its device."""

    awaited: ClassVar[list[Any]] = []  # by the stream
    left: ClassVar[list[Any]] = []
    Options = staticmethod(lambda: SimpleNamespace(config=SimpleNamespace()))

    def __init__(self, store: Store, rank: int, world: int, options: Any) -> None:
        assert options.config.blocking is False
        self._gloo = ProcessGroupGloo(store, rank, world, options._timeout)

    def __getattr__(self, name: str) -> Any:
        def launch(*arguments: Any) -> Any:
            work = getattr(self._gloo, name)(*arguments)
            return SimpleNamespace(wait=lambda: Communicator.awaited.append(work))

        return launch

    def eager_connect_single_device(self, device: torch.device) -> None:
        pass

    def abort(self) -> None:
        Communicator.left.append(self._gloo)  # gloo's own end would wait


class Event:
    def record(self) -> None:
        self._before = list(Communicator.awaited)

    def query(self) -> bool:
        return all(work.is_completed() for work in self._before)


def emulate(ahead: int = backends.AHEAD) -> None:
    """In this process, which a test has forked: all groups that can be left are on a GPU."""
    backends.AHEAD, torch.cuda.Event = ahead, Event  # type: ignore
    torch.distributed.ProcessGroupNCCL = Communicator  # type: ignore
    backends.Gloo = lambda store, rank, world, before: backends.Nccl(store, rank, world, torch.device("cpu"))  # type: ignore


def waits_for_rank_0(group: Group, seen: str) -> int:
    """How often rank 1 has looked around it before rank 0 came, which waits for a third time."""
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        Path(seen).touch() if looks == 3 else None

    group.look = look  # type: ignore[method-assign]
    while group.rank == 0 and not Path(seen).exists():
        time.sleep(0.01)
    group.barrier()
    return looks


def test_who_only_waits_is_alive_also_where_nobody_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sharding, say; else it would be killed for its silence while rank 0 has something to do by itself."""
    assert dist.run("tests.test_backends:waits_for_rank_0", 2, seen=str(tmp_path / "seen"))[1] >= 3
    answers, looks = iter([False, False, True]), []
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=list, query=lambda: next(answers)))
    group = backends.Joined("a group of GPUs")
    group.settle(lambda: looks.append(1), reads=False)
    assert not looks, "the host does not wait for what it does not read"
    group.settle(lambda: looks.append(1), reads=True)
    assert len(looks) == 2


def leaves_in_the_middle(outer: Group) -> list[Any]:
    """Rank 1 never sends its part of a step's sum. Rank 0 is told to go on without it, and then with it again."""
    emulate()
    member = Member(outer)
    member.join(1, 0, 1)
    assert member.gathered() == [0, 1]
    half, changed = Half(member.group), False
    before = half.flat.parameters.detach().clone()
    if outer.rank == 0:
        half.leaves()
        look, looks = member.group.look, []

        def hears_of_it() -> None:
            looks.append(1)
            member.send(2, 0) if len(looks) == 3 else None
            look()

        member.group.look = hears_of_it  # type: ignore[method-assign]
        try:
            half.reducer.finish()  # after which the optimizer would be launched
        except Changed as change:
            changed = str(change) == "epoch 2"
        assert torch.equal(before, half.flat.parameters)
        member.group.join()
        assert (member.group.world, len(Communicator.left)) == (1, 1)
    outer.barrier()
    member.join(3, 0, 1)
    assert member.gathered() == [0, 1]
    return [changed, sorted(half.reducer.kept())]


def test_a_sum_that_never_arrives_is_left_before_the_optimizer_is_launched() -> None:
    """What of the step is finished is kept: two subtrees of the four leaves that were computed."""
    (changed, kept), _ = dist.run("tests.test_backends:leaves_in_the_middle", 2)
    assert changed
    assert kept == [0, 1, 2]


def takes_over(group: Group, **arguments: Any) -> dict[str, Any]:
    emulate(ahead=0)
    return test_regroup.takes_over(group, **arguments)


def test_a_step_is_taken_over_to_the_same_bits() -> None:
    arguments: dict[str, Any] = {"dtype": "float32", "done": [2, 1, 0], "hosts": []}
    assert dist.run("tests.test_backends:takes_over", 3, **arguments) == dist.run(
        "tests.test_regroup:takes_over", 3, **arguments
    )


class Never(Event):
    made = 0

    def __init__(self) -> None:
        Never.made += 1

    def query(self) -> bool:
        return False


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> backends.Nccl:
    """A group of one, none of whose collectives ever ends."""
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", Communicator, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Never)
    return backends.Nccl(HashStore(), 0, 1, torch.device("cuda"))


def test_the_host_does_not_run_far_ahead_of_a_collective_that_never_ends(nccl: backends.Nccl) -> None:
    """Else the queue of launches fills up, and holds it where nothing can be heard."""

    def look() -> None:
        raise Changed

    before = Never.made
    for _ in range(backends.AHEAD):
        nccl.wait(SimpleNamespace(wait=lambda: None), look)
    with pytest.raises(Changed):
        nccl.wait(SimpleNamespace(wait=lambda: None), look)
    assert Never.made == before + backends.AHEAD + 1


def test_a_communicator_that_cannot_be_aborted_ends_the_rank(
    nccl: backends.Nccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels would hold up whatever is launched next. Meanwhile the rank gives signs of life."""
    let_go, signs = threading.Event(), []
    now = itertools.count(step=backends.ABORTED / 10)  # seconds, at each look at the clock
    monkeypatch.setattr(backends, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(nccl.processes, "abort", let_go.wait)
    try:
        with pytest.raises(TimeoutError, match="still on the device"):
            nccl.leave(lambda: signs.append(1))
    finally:
        let_go.set()
    assert len(signs) == 9


def test_gpus_heal_without_spares_which_would_take_a_rank_s_memory(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose.config("train", [*tiny, "accelerator=cuda"])
    assert config.heals
    assert not compose.config("train", [*tiny, "accelerator=cuda", "sharding=optimizer"]).heals
    monkeypatch.setattr("train.hardware.gpus", lambda: (SimpleNamespace(name="any", memory=2**36),) * 2)
    with pytest.raises(Refused, match="spares"):
        plan.resolve(compose.config("train", [*tiny, "accelerator=cuda", "recovery.spares=1"]))


def test_no_more_ranks_than_gpus_but_over_gloo(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.resize.under_way", lambda path: True)
    monkeypatch.setattr("train.resize.PATIENCE", 0.0)
    monkeypatch.setattr("train.hardware.gpus", lambda: (SimpleNamespace(),) * 2)
    for backend in ("nccl", "gloo"):
        config = compose.config("train", [*tiny, "name=a", "devices=2", "accelerator=cuda", f"backend={backend}"])
        (tmp_path / backend).mkdir()
        (tmp_path / backend / "config.yaml").write_text(folder.to_yaml(config))
    with pytest.raises(Refused, match="3 are more than the 2 GPUs here"):
        resize.resize(Resize(run=str(tmp_path / "nccl"), devices=3))
    asked: list[str] = []
    monkeypatch.setattr("train.resize.replace", lambda path, text: asked.append(f"{path.parent.name}: {text}"))
    assert resize.resize(Resize(run=str(tmp_path / "gloo"), devices=3)) == 1
    assert asked == ['gloo: {"devices": 3}']
    monkeypatch.undo()
    monkeypatch.setattr("train.resize.under_way", lambda path: True)
    monkeypatch.setattr("train.resize.PATIENCE", 0.0)
    assert resize.resize(Resize(run=str(tmp_path / "gloo"), devices=3)) == 1
    assert not (tmp_path / "gloo" / folder.WISH).exists(), "a later run of this name would heed it"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_gpus_a_killed_rank_changes_no_bit(tiny: list[str]) -> None:
    settings = ["accelerator=cuda", "compile=false", "checkpoint.every=0", "steps=12"]
    code, run = train(tiny, *settings, "name=a", "devices=2", "faults.at=[kill:1@backward:4]")
    assert code == 0
    kinds = [record["kind"] for record in events.read(run / "events.jsonl")]
    assert (kinds.count("start"), kinds.count("fault")) == (1, 1)
    code, twin = train(tiny, *settings, "name=twin", "devices=1")
    assert code == 0
    assert summary(twin)["state_sha256"] == summary(run)["state_sha256"]
