"""The sum inside hosts first: equal bits, and a cable is crossed once a host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import dist
from tests.test_reduce import EQUAL, odd_model, sums
from train import compose, plan
from train.engine import laid_out
from train.flat import Flat
from train.group import Group
from train.hierarchy import HostsFirstReducer, collectors
from train.ranks import Ranks
from train.reduce import ExactReducer


class Cabled(Ranks):
    """Ranks on hosts, which count what leaves each one's host; a gather goes round in a ring, as gloo's does."""

    def __init__(self, ranks: Ranks, hosts: Sequence[int]) -> None:
        super().__init__(ranks.rank, ranks.world, ranks.wire, self)
        self.inner, self.hosts, self.crossed = ranks.processes, hosts, 0

    def exchange(self, received: Tensor, sent: Tensor, from_each: Sequence[int], to_each: Sequence[int]) -> Any:
        far = [host != self.hosts[self.rank] for host in self.hosts]
        self.crossed += sent.element_size() * sum(n for n, crosses in zip(to_each, far, strict=True) if crosses)
        return self.inner.alltoall_base(received, sent, from_each, to_each)

    def _allgather_base(self, target: Tensor, chunk: Tensor) -> Any:
        if chunk.is_floating_point():  # not the row of numbers
            next_one = self.hosts[(self.rank + 1) % self.world]
            self.crossed += (next_one != self.hosts[self.rank]) * chunk.nbytes * (self.world - 1)
        return self.inner._allgather_base(target, chunk)


def counted(group: Group, hosts: list[int], mode: str, **more: Any) -> dict[str, Any]:
    """`sums` over two steps, and the bytes of them and of spreading parameters that left this rank's host."""
    ranks = Cabled(Ranks.default(), hosts)
    return sums(group, mode, ranks, **more) | {"crossed": ranks.crossed, "length": Flat(odd_model(), len(hosts)).length}


UNEVEN = [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1, 1, 2]]


@pytest.mark.parametrize(
    ("virtual_ranks", "bucket_bytes", "dtype"),
    [(8, 1 << 23, "float32"), (8, 4096 * 5, "float32"), (6, 4096 * 3, "float32"), (8, 4096 * 5, "bfloat16")],
)
def test_it_is_the_sum_of_one_rank(virtual_ranks: int, bucket_bytes: int, dtype: str) -> None:
    """Sum, loss, norm and checksums; hosts of 1 + 3, 2 + 2 and 3 + 2 + 1 ranks; one bucket and many."""
    more = {"virtual_ranks": virtual_ranks, "bucket_bytes": bucket_bytes, "dtype": dtype}
    alone = dist.run("tests.test_reduce:sums", 1, mode="exact", **more)[0]
    for hosts in UNEVEN:
        for result in dist.run("tests.test_hierarchy:counted", len(hosts), mode="hosts first", hosts=hosts, **more):
            assert {key: result[key] for key in EQUAL} == {key: alone[key] for key in EQUAL}, hosts


@pytest.mark.parametrize("hosts", UNEVEN, ids=str)
def test_each_host_has_one_collector_of_each_chunk(hosts: list[int]) -> None:
    """Its owner, where it lives; and on a host no rank has two more than another of what is others'."""
    found = collectors(hosts)
    for host in set(hosts):
        here = [rank for rank, at in enumerate(hosts) if at == host]
        assert sorted(chunk for rank in here for chunk in found[rank]) == list(range(len(hosts)))
        assert all(rank in found[rank] for rank in here)
        many = [len(found[rank]) for rank in here]
        assert max(many) - min(many) <= 1


@pytest.mark.parametrize(("hosts", "hosted"), [([0, 0, 1, 1], None), ([0, 0, 0, 1], [(0, 1), (1, 3), (3, 4), (4, 8)])])
def test_a_cable_is_crossed_once_a_host(hosts: list[int], hosted: Any) -> None:
    """With one subtree a host: both ways, to and from each other host, the gradient's bytes; flat it is more."""
    more = {"hosts": hosts, "hosted": hosted, "bucket_bytes": 4096 * 5}
    crossed = {}
    for mode in ("exact", "hosts first"):
        results = dist.run("tests.test_hierarchy:counted", len(hosts), mode=mode, **more)
        crossed[mode] = sum(result["crossed"] for result in results)
    (length,) = {result["length"] for result in results}
    assert crossed["hosts first"] == 2 * 2 * 4 * length, "two steps of two ways of float32"
    assert crossed["exact"] >= 1.5 * crossed["hosts first"]


def test_sharded_parameters_cross_once_a_host_too() -> None:
    whole = dist.run("tests.test_reduce:sums", 1, mode="exact")[0]
    for hosts in UNEVEN:
        more = {"mode": "hosts first", "hosts": hosts, "sharded": True, "bucket_bytes": 20_480}
        results = dist.run("tests.test_hierarchy:counted", len(hosts), **more)
        assert all(result[key] == whole[key] for result in results for key in EQUAL if key != "sha256")
        assert len({result["parameters"] for result in results}) == 1
        if hosts == [0, 0, 1, 1]:
            assert sum(result["crossed"] for result in results) == 3 * 4 * results[0]["length"]


def under_way(group: Group) -> int:
    """How many exchanges are under way at most, in two steps of many buckets."""
    ranks, counts = Cabled(Ranks.default(), [0, 0, 1, 1]), [0]
    exchange, wait = ranks.exchange, ranks.wait

    def begun(*arguments: Any) -> Any:
        counts.append(counts[-1] + 1)
        return exchange(*arguments)

    def waited(work: Any, what: str) -> None:
        counts.append(counts[-1] - ("exchange" in what))
        wait(work, what)

    ranks.exchange, ranks.wait = begun, waited  # type: ignore[method-assign, assignment]
    sums(group, "hosts first", ranks, bucket_bytes=4096 * 8)
    assert counts[-1] == 0
    return max(counts)


def test_buckets_are_on_their_way_at_the_same_time() -> None:
    """Three buckets, each in another of the sum's four steps: between hosts and inside them at once."""
    assert dist.run("tests.test_hierarchy:under_way", 4) == [3] * 4


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        (["nodes=2", "devices=2"], HostsFirstReducer),
        (["nodes=1-4"], HostsFirstReducer),
        (["nodes=2", "devices=2", "reduce.hosts_first=false"], ExactReducer),
        (["devices=2"], ExactReducer),
    ],
)
def test_it_is_used_where_there_are_several_nodes(more: list[str], kind: type, tiny: list[str]) -> None:
    config = plan.resolve(compose.config("train", [*tiny, "name=a", *more]))
    assert type(laid_out(config, Ranks(0, 1, torch.device("cpu")), nn.Linear(3, 3))[1]) is kind


@pytest.mark.parametrize("hosts", [[], [0, 0, 0], [0, 1, 2]], ids=str)
def test_where_it_would_bring_nothing_the_sum_is_the_flat_one(hosts: list[int]) -> None:
    """Without hosts that are known, on one host, with one rank on each."""
    for result in dist.run("tests.test_hierarchy:flat", 3, hosts=hosts):
        assert result


def flat(group: Group, hosts: list[int]) -> bool:
    ranks = Ranks.default()
    ranks.hosts = hosts
    reducer = HostsFirstReducer(ranks, Flat(odd_model(), 3), 8)
    return reducer._flat_sum
