"""What recovery is made of, on ranks that do as a test says: leaving a group, going on with a step, giving a state."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import Precision
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from tests import dist
from tests.test_reduce import gradient, odd_model, used
from train import backends, compose, nodes, optim, plan, telemetry
from train.config import Optimizer, OptimizerKind
from train.evidence import Evidence
from train.flat import Buffer, Flat, Piece
from train.group import Dismissed, Group, Membership, Place
from train.hierarchy import HostsFirstReducer
from train.loop import TrainState
from train.ranks import Changed, gather
from train.recovery import Recovery

V = 8
ALL = V  # leaves, and then the sum, which never comes
LATE = 60.0  # seconds after which a rank that nothing has freed is freed by the test

# --------------------------------------------------------------------------------------------------- groups


class Member:
    """A rank of a group that changes; who belongs to it is `sent`."""

    def __init__(self, outer: Group, hosts: Sequence[int] = ()) -> None:
        """`hosts`: where each of the outer ranks lives, if that is to be known."""
        self.outer, self._hosts = outer, hosts
        listener = nodes.listen(nodes.here(1)) if outer.rank == 0 else None
        port = torch.tensor(listener.getsockname()[1] if listener else 0)
        self._port = int(outer.broadcast(port))
        self._newest: Membership | None = None
        place = Place(member=outer.rank, local_rank=0, device="cpu", loopback=True, backend="gloo", heals=True)
        self.group = Group(place, Precision(), listener, lambda: self._newest)

    def send(self, epoch: int, *members: int, boundary: bool = False) -> None:
        hosts = [self._hosts[member] for member in members if self._hosts]
        where: dict[str, Any] = {"host": "127.0.0.1", "port": self._port, "hosts": hosts}
        self._newest = Membership(epoch=epoch, members=list(members), **where, boundary=boundary, why="lost")

    def join(self, epoch: int, *members: int) -> None:
        self.send(epoch, *members)
        self.group.join()
        self.outer.barrier()  # who leaves again at once would cut off who is still connecting

    def gathered(self) -> list[int]:
        found: list[int] = self.group.all_gather(torch.tensor(self.outer.rank)).tolist()
        return found


def frees_the_other(outer: Group) -> str:
    """Rank 0 waits for rank 1, which leaves; nobody tells rank 0, unless it is too late."""
    member, why = Member(outer), ""
    member.join(1, 0, 1)
    if outer.rank == 0:
        late = threading.Timer(LATE, member.send, (2, 0, 1))
        late.start()
        try:
            member.gathered()
        except Changed as change:
            why = str(change)
        late.cancel()
    else:
        time.sleep(0.3)
    member.join(2, 0, 1)
    assert member.gathered() == [0, 1]
    return why


def test_who_waits_for_a_rank_that_leaves_is_freed() -> None:
    why, _ = dist.run("tests.test_regroup:frees_the_other", 2)
    assert why
    assert why != "epoch 2", "it was freed by the test"


def leaves_what_never_ends(outer: Group) -> list[Any]:
    """Rank 0 waits for rank 1, is told to go on without it, and does. Then rank 1 comes after all."""
    member = Member(outer)
    member.join(1, 0, 1)
    received, sent = torch.zeros(2, dtype=torch.int64), torch.tensor([7 + outer.rank])
    if outer.rank == 0:
        threading.Timer(0.3, member.send, (2, 0)).start()
        began = time.monotonic()
        with pytest.raises(Changed, match="epoch 2"):
            member.group.wait(member.group.processes._allgather_base(received, sent), "a test")
        seconds = time.monotonic() - began
        member.group.join()
        outer.barrier()
        outer.barrier()
        return [member.group.world, seconds < LATE / 2, received.tolist().count(8)]
    outer.barrier()
    with pytest.raises(Changed):
        member.group.wait(member.group.processes._allgather_base(received, sent), "a test")
    member.send(2, 0)
    with pytest.raises(Dismissed):
        member.group.join()
    outer.barrier()
    return []


def test_a_collective_that_will_never_end_is_left() -> None:
    """And nothing is written to its tensors when what it waits for arrives: the other is refused, and dismissed."""
    assert dist.run("tests.test_regroup:leaves_what_never_ends", 2) == [[1, True, 0], []]


def test_a_group_that_never_comes_to_its_end_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As gloo's may where something was on its way when the connection went.

    A pair of sockets that another thread has made while the group was, an event loop's say, is left alone.
    """
    left, late = threading.Event(), []

    class Endless:
        def __del__(self) -> None:
            late.append(left.wait(LATE))

    monkeypatch.setattr(backends, "DROPPED", 0.01)
    monkeypatch.setattr(torch.distributed, "ProcessGroupGloo", lambda *_: Endless())
    alone = Membership(epoch=1, members=[0], host="", port=0)
    group = Group(Place.alone(), Precision(), news=lambda: alone)
    before, (one, other) = nodes.sockets(), socket.socketpair()
    with one, other:
        group._joined = backends.Gloo(HashStore(), 0, 1, before)
        group.join()
        one.send(b"still there")
        assert other.recv(100) == b"still there"
    assert group.processes is None
    assert not late, "it was waited for"
    left.set()


def changes_often(outer: Group) -> list[int]:
    """Open sockets after each of some epochs, with a collective left unfinished in every one."""
    member, counts = Member(outer), []
    for epoch in range(1, 7):
        member.join(epoch, 0, 1, 2)
        assert member.gathered() == [0, 1, 2]
        if outer.rank == 0:
            pending = member.group.sum_up(torch.zeros(1000))  # noqa: F841
        for thread in threading.enumerate():
            if thread.name == "leave":
                thread.join(LATE)
        counts.append(len(nodes.sockets()))
        outer.barrier()
    return counts


def test_a_group_that_is_left_leaves_no_descriptors() -> None:
    for counts in dist.run("tests.test_regroup:changes_often", 3):
        assert len(set(counts[1:])) == 1, counts


def waits_for_a_boundary(outer: Group) -> bool:
    member = Member(outer)
    member.join(1, 0, 1)
    member.send(2, 0, 1, boundary=True)
    with pytest.raises(Changed):  # a group that has not settled heeds every change
        member.group.look()
    member.group.settled = member.group.membership
    member.group.look()
    announced = member.group.newer() is not None
    assert member.gathered() == [0, 1], "the step goes on to its end"
    member.send(3, 0, 1)
    with pytest.raises(Changed):
        member.group.look()
    return announced


def test_who_joins_interrupts_nothing() -> None:
    assert dist.run("tests.test_regroup:waits_for_a_boundary", 2) == [True, True]


# ------------------------------------------------------------------------------------- the step in flight


class Half:
    """A rank in the middle of a step."""

    def __init__(self, ranks: Group, dtype: str = "float32") -> None:
        self.model = odd_model()
        self.flat = Flat(self.model, V)
        self.optimizer = optim.build(Optimizer(kind=OptimizerKind.adamw), self.flat)
        self.reducer = HostsFirstReducer(  # the flat sum where hosts are not known
            ranks, self.flat, V, 1, dtype=getattr(torch, dtype), bucket_bytes=20_480, evidence=Evidence(self.flat)
        )
        self.computed: list[int] = []

    def leaves(self, most: int = V) -> None:
        """Compute hosted leaves, `most` of them: in the middle of the next one the rank hears of a change."""
        for v, buffer in self.reducer.leaves():
            if most == 0:
                return
            most -= 1
            self._leaf(v, buffer)

    def _leaf(self, v: int, buffer: Buffer) -> None:
        terms = [(p * gradient(v, p)).sum() for p in used(self.model)]
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
        buffer.loss += 0.1 * v
        buffer.tokens = 1000 + v
        self.computed.append(v)

    def pieces(self) -> list[Piece]:
        return self.flat.pieces() + optim.pieces(self.optimizer, self.flat)

    def total(self) -> dict[str, Any]:
        total = self.reducer.finish()
        summed = total.gradient[: self.flat.size]
        return {
            "sha256": sha256(summed),
            "loss": float(total.loss).hex(),
            "norm": float(total.norm).hex(),
            "leaves": total.leaves.tolist(),
            "state": total.state.tolist(),
        }


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().numpy().data).hexdigest()


def recovered(
    half: Half,
    member: Member,
    step: int,
    whole: bool,
    again: bool = False,
    begins: Callable[[], object] = lambda: None,
    recorder: Any = None,
) -> SimpleNamespace:
    """Have `half`, with the state after `step` or with none, regroup with the others; what was said and asked for.

    `again`: the ranks change once more in the middle of it. `begins`: called where the run begins.
    """
    said = SimpleNamespace(sent=[], caught_up=[], shaken=[], again=again)

    def regrouped(pieces: list[Piece], step: int) -> None:
        if said.again:
            said.again = False
            member.outer.barrier()  # who has not come so far would be cut off, and hear of no change
            member.send(3, *group.membership.members)
            raise Changed

    group = member.group
    member.send(2, *group.membership.members)
    last = SimpleNamespace(step=step, numbers=torch.arange(5) + step, world=group.world, rate=0.125 * step)
    recorder = recorder or SimpleNamespace(
        last=last if whole else None,
        flush=lambda: None,
        catch_up=lambda *it: said.caught_up.append([it[0], it[1], it[2].tolist(), it[3]]),
        regrouped=lambda recorded: None,
    )
    said.state = TrainState(step=step if whole else 0, flat=half.flat, optimizer=half.optimizer, handled=group.rank)
    part = Recovery(
        group=group,
        state=said.state,
        parts=SimpleNamespace(recorder=recorder, phase=lambda name, step: None),  # type: ignore[arg-type]
        reducer=half.reducer,
        keeper=SimpleNamespace(saver=SimpleNamespace(part=lambda lost: False, regrouped=regrouped)),  # type: ignore[arg-type]
        balance=SimpleNamespace(regrouped=lambda state, parts, joined: said.shaken.append(joined)),  # type: ignore[arg-type]
        channel=SimpleNamespace(send=said.sent.append),  # type: ignore[arg-type]
        begin=lambda: (said.sent.append("begun"), begins())[0],
        whole=whole,
        unshaken=not whole,
    )
    part.regroup()
    assert part.whole
    return said


def loses_who_says_that_it_begins(group: Group) -> list[str]:
    """Rank 0 is lost as the run begins, where the others have done their part of that."""
    member = Member(group)
    member.join(1, 0, 1, 2)
    half, calls = Half(member.group), []

    def begins() -> None:
        calls.append("begun")
        if len(calls) > 1:
            return
        group.barrier()  # who is not here yet would be cut off by who leaves
        if group.rank == 0:
            member.group._joined.leave(lambda: None)
            raise Dismissed
        threading.Timer(0.2, member.send, (3, 1, 2)).start()

    with contextlib.suppress(Dismissed):
        recovered(half, member, 0, whole=False, begins=begins)
    group.barrier()  # rank 0's process has the store
    return calls


def test_a_run_has_begun_only_when_that_is_on_record() -> None:
    """Else the others would go on, and who reads the record would know of no start, and of none of its settings."""
    assert dist.run("tests.test_regroup:loses_who_says_that_it_begins", 3) == [["begun"], ["begun"] * 2, ["begun"] * 2]


def takes_over(group: Group, dtype: str, done: list[int], hosts: list[int]) -> dict[str, Any]:
    """Rank r is interrupted when it has computed `done[r]` of its leaves; the last rank is a newcomer afterwards."""
    member = Member(group, hosts)
    member.join(1, 0, 1, 2)
    half = Half(member.group, dtype)
    assert half.reducer._flat_sum == (not hosts)
    hosted = len(half.reducer.hosted[group.rank])
    half.leaves(done[group.rank])
    if done[group.rank] == ALL:
        threading.Timer(0.3, member.send, (2, *member.group.membership.members)).start()
        with pytest.raises(Changed):
            half.reducer.finish()
    before, half.computed = half.computed, []
    dies = group.rank == group.world - 1 > 0
    unfinished = [b for b in half.reducer._taken if all(b is not done for done in half.reducer._done.values())]
    if dies:
        half = Half(member.group, dtype)
        with torch.no_grad():
            half.flat.parameters.zero_()
    said = recovered(half, member, 3, whole=not dies)
    kept = half.reducer.kept()
    half.leaves()
    for buffer in half.reducer._free + half.reducer._taken:
        assert all(buffer is not other for other in unfinished), "an abandoned collective may still write to it"
    sent = [(event.kept, event.redone) for event in said.sent]
    result = {
        "hosted": hosted,
        "before": before,
        "kept": sorted(kept),
        "again": list(half.computed),
        "sent": sent,
        "total": half.total(),
        "computed": list(map(list, half.reducer.computed)),
    }
    half.leaves()  # the next step is an ordinary one
    return result | {"next": half.total(), "shares": [len(own) for own in half.reducer.hosted]}


def notices_between_leaves(group: Group) -> list[Any]:
    """The ranks change while a leaf is computed: it is kept, and no other one is begun."""
    member = Member(group)
    member.join(1, 0, 1)
    member.group.settled = member.group.membership
    half = Half(member.group)
    leaves = half.reducer.leaves()
    for _ in range(2):
        half._leaf(*next(leaves))
    member.send(2, 0, 1)
    with pytest.raises(Changed):
        next(leaves)
    return [half.computed, sorted(half.reducer.kept())]


def test_a_change_is_noticed_between_two_leaves() -> None:
    assert dist.run("tests.test_regroup:notices_between_leaves", 2) == [[[0, 1], [0, 1]], [[4, 5], [4, 5]]]


def alone(group: Group, dtype: str) -> dict[str, Any]:
    half = Half(group, dtype)
    half.leaves()
    return half.total()


@pytest.mark.parametrize(("dtype", "hosts"), [("float32", []), ("bfloat16", []), ("float32", [0, 0, 1])])
def test_a_step_is_taken_over_with_what_is_finished(dtype: str, hosts: list[int]) -> None:
    """Of 2 or 3 leaves; everything that is missing is computed once.

    A rank has lost its last leaf where sums stand on it, or a bf16 one; not where the sum never came.
    """
    (expected,) = dist.run("tests.test_regroup:alone", 1, dtype=dtype)
    for done in ([3, 3, 2], [1, 2, 0], [0, 0, 0], [ALL, ALL, 1], [ALL, 1, 0]):
        results = dist.run("tests.test_regroup:takes_over", 3, dtype=dtype, done=done, hosts=hosts)
        kept = [result["kept"] for result in results]
        again = sorted(v for result in results for v in result["again"])
        assert all(set(one) <= set(result["before"]) for one, result in zip(kept, results, strict=True))
        assert kept[-1] == []
        assert again == sorted(set(range(V)) - {v for own in kept for v in own}), "each that is missing, once"
        last = dtype == "float32" and 2 not in done[2:]
        finished = [
            min(many, result["hosted"] - (not last or many != ALL))
            for many, result in zip(done[:2], results[:2], strict=True)
        ]
        assert [len(own) for own in kept[:2]] == finished
        assert results[0]["sent"] == [[sum(finished), V - sum(finished) if sum(finished) else 0]]
        for rank, result in enumerate(results):
            assert result["computed"][rank] == sorted({*result["kept"], *result["again"]}), "not its regular share"
            assert result["total"] == result["next"] == expected
            assert result["shares"] == [result["hosted"] for result in results]


def cannot_launch(group: Group) -> dict[str, Any]:
    """Rank 0's second exchange of the last leaf is refused by the backend, as NCCL does when an earlier one failed."""
    member = Member(group)
    member.join(1, 0, 1)
    half, joined = Half(member.group), member.group._joined
    launched: list[int] = []

    def real(name: str) -> Callable[..., Any]:
        """Asked for each time: whoever holds a gloo group to its end waits for that, which may not come (DROPPED)."""
        return lambda *arguments: getattr(joined.processes, name)(*arguments)

    def exchange(*arguments: Any) -> Any:
        launched.append(1)
        if len(launched) == 2:
            threading.Timer(0.3, member.send, (2, 0, 1)).start()  # gloo may not tell rank 1 that it was cut off
            if group.rank == 0:
                raise RuntimeError("NCCL communicator was aborted on rank 0")
        return real("alltoall_base")(*arguments)

    others = {name: real(name) for name in ("_allgather_base", "allreduce")}
    member.group.processes = SimpleNamespace(alltoall_base=exchange, **others)
    half.leaves()
    with pytest.raises(Changed):
        half.reducer.finish()
    half.computed = []
    recovered(half, member, 3, whole=True)
    kept = len(half.reducer.kept())
    half.leaves()
    return {"kept": kept, "again": half.computed, "total": half.total()}


def test_a_collective_that_cannot_be_launched_is_as_one_that_fails() -> None:
    """And the last leaf is kept though a part of it is the subtree's sum already, what was refused included."""
    (expected,) = dist.run("tests.test_regroup:alone", 1, dtype="float32")
    first, second = dist.run("tests.test_regroup:cannot_launch", 2)
    assert first == {"kept": 4, "again": [], "total": expected}
    assert second["total"] == expected
    assert second["kept"] + len(second["again"]) == 4, "whether its first bucket's sum had come is a matter of chance"


class Refusing:
    """In the place of a backend: it launches nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        def refuse(*_: Any) -> None:
            raise RuntimeError(name)

        return refuse


@pytest.mark.parametrize("heals", [True, False])
def test_every_launch_that_is_refused_is_a_change_where_ranks_are_replaced(heals: bool) -> None:
    group, some = Group(dataclasses.replace(Place.alone(), heals=heals), Precision()), torch.zeros(2)
    group.world, group.processes = 2, Refusing()
    calls: dict[str, list[Callable[[], object]]] = {
        "_allgather_base": [lambda: group.all_gather(some), lambda: gather(group, some, some[:1])],
        "allreduce": [lambda: group.all_reduce(some)],
        "broadcast": [lambda: group.broadcast(some)],
        "alltoall_base": [lambda: group.exchange(some, some, [1, 1], [1, 1])],
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises(Changed if heals else RuntimeError, match=name):
                call()


# ------------------------------------------------------------------------------------------ the state


def hands_over(group: Group, steps: list[int], again: bool) -> dict[str, Any]:
    """Rank r is at step `steps[r]`, in the middle of the next one; -1: it is new."""
    member = Member(group)
    member.join(1, 0, 1, 2)
    half, step = Half(member.group), steps[group.rank]
    for number, piece in enumerate(half.pieces()):
        piece.data.copy_(torch.arange(piece.data.numel()) * (step + 2.0) + number)
    if step >= 0:
        half.leaves(1)
    before = len(half.reducer.kept())
    said = recovered(half, member, step, whole=step >= 0, again=again)
    return {
        "before": before,
        "kept": len(half.reducer.kept()),
        "step": said.state.step,
        "handled": said.state.handled,
        "first": float(half.pieces()[0].data[1]),
        "state": sha256(torch.cat([piece.data for piece in half.pieces()])),
        "updates": [float(moments["step"]) for moments in half.optimizer.state.values()],
        "caught_up": said.caught_up,
        "shaken": said.shaken,
        "sent": [(event.step, event.kept, event.redone) for event in said.sent],
    }


@pytest.mark.parametrize("again", [False, True], ids=["once", "interrupted"])
@pytest.mark.parametrize("steps", [[5, 6, 6], [6, 5, -1], [-1, 6, 6]])
def test_a_step_that_one_rank_has_applied_is_committed(steps: list[int], again: bool) -> None:
    """The others take its state and its numbers, and drop what they have of a step that is over."""
    results = dist.run("tests.test_regroup:hands_over", 3, steps=steps, again=again)
    assert len({result["state"] for result in results}) == 1
    for rank, result in enumerate(results):
        assert result["before"] == (steps[rank] >= 0)
        ahead = steps[rank] == 6 and (again or 5 not in steps)
        assert result["kept"] == (result["before"] if ahead else 0), "of a step that is over"
        assert result["step"] == 6
        assert result["shaken"] == [-1 in steps], "with a newcomer hands are shaken, if need be the next time"
        assert result["handled"] == (0 if 5 in steps else 1), "what one has not done, all do"
        catches_up = [[6, 0.75, [6, 7, 8, 9, 10], 3]]
        assert result["caught_up"] == (catches_up if steps[rank] < 6 else [])
        assert result["first"] == 8.0
        assert steps[rank] == 6 or set(result["updates"]) == {6.0}
    kept = sum(result["kept"] for result in results)
    assert results[0]["sent"] == [[6, kept, V - kept if kept else 0]]


def test_a_state_that_arrives_damaged_is_not_used() -> None:
    with pytest.raises(AssertionError, match="did not arrive as rank 1 sent it"):
        dist.run("tests.test_regroup:receives_other_bits", 3)


def receives_other_bits(group: Group) -> None:
    member = Member(group)
    member.join(1, 0, 1, 2)
    half = Half(member.group)
    broadcast = member.group.broadcast

    def flipped(tensor: Tensor, source: int = 0) -> Tensor:
        broadcast(tensor, source)
        if group.rank == 0 and tensor.numel() == 301 * 17:
            tensor.view(torch.int32)[100] ^= 1 << 20
        return tensor

    member.group.broadcast = flipped  # type: ignore[method-assign, assignment]
    recovered(half, member, 4 + int(group.rank == 1), whole=True)


def records_late(group: Group, overrides: list[str]) -> dict[str, Any]:
    """Numbers are read two steps late, as on GPUs: the ranks agree to leave, and rank 2 gives way to a new one."""
    config = plan.resolve(compose.config("train", overrides))
    said: list[Any] = []
    member = Member(group)
    member.join(1, 0, 1, 2)
    half, new = Half(member.group), group.rank == 2
    fabric: Any = SimpleNamespace(is_global_zero=group.rank == 0, device=torch.device("cpu"), world_size=3)
    fabric.log_dict = lambda *_, **__: None
    recorder = telemetry.Recorder(config, fabric, said.append, vocab=300)
    recorder._lag = telemetry.LAG

    def step(number: int, changes: bool) -> None:
        half.leaves()
        recorder.step(number, half.reducer.finish(change=changes), 0.125 * number)

    for number in range(1, 6):  # all know of it in step 4 and leave after step 6; one is lost before
        step(number, changes=number >= 4)
    if new:
        half, recorder = Half(member.group), telemetry.Recorder(config, fabric, said.append, vocab=300)
        recorder._lag = telemetry.LAG
    recovered(half, member, 0 if new else 5, whole=not new, recorder=recorder)
    caught_up = recorder.last and [recorder.last.step, recorder.last.rate, recorder.last.numbers.tolist()]
    for number in range(6, 10):
        step(number, changes=False)
        assert not recorder.changing, f"after step {number} it leaves for a membership that does not exist"
    recorder.flush()
    return {"caught_up": caught_up, "said": [event.step for event in said if event.kind == "step"]}


def test_numbers_that_are_read_late_are_of_the_group_that_made_them(tiny: list[str]) -> None:
    """They are read before it is left: a newcomer gets those of the step whose state it gets; each is said once."""
    results = dist.run("tests.test_regroup:records_late", 3, overrides=[*tiny, "name=a"])
    assert results[0]["caught_up"][:2] == [5, 0.625]
    assert all(result["caught_up"] == results[0]["caught_up"] for result in results)
    assert [result["said"] for result in results] == [[*range(1, 10)], [], []]
