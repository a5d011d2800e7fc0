"""The exact sum on real ranks: equal bits for every world size; and the fast one, which is why `exact` exists."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import dist
from train import balance as balancing
from train import clock
from train.balance import Balance
from train.evidence import Evidence
from train.fast import FastReducer
from train.flat import BLOCK, Buffer, Flat, squares
from train.group import Group
from train.hierarchy import HostsFirstReducer
from train.ranks import Ranks
from train.reduce import ExactReducer


def odd_model() -> nn.Module:
    """Shapes that align with nothing: 7 x 13, 5, 301 x 17, 1; and a parameter that no gradient reaches."""
    torch.manual_seed(0)
    model = nn.Module()
    for name, shape in {"a": (7, 13), "unused": (40, 60), "b": (5,), "c": (301, 17), "d": (1,)}.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return model


def gradient(virtual_rank: int, like: Tensor) -> Tensor:
    """Values over many orders of magnitude, so that the order of addition shows in the last bits."""
    generator = torch.Generator().manual_seed(virtual_rank)
    return torch.randn(like.shape, generator=generator) * 10 ** torch.randn(like.shape, generator=generator)


def used(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name != "unused"]


KINDS: dict[str, Any] = {"exact": ExactReducer, "fast": FastReducer, "hosts first": HostsFirstReducer}


def sums(group: Group, mode: str, ranks: Ranks | None = None, **more: Any) -> dict[str, Any]:
    """Two steps of real backward passes, two micro-batches a leaf; what came of them, as digests."""
    flat = Flat(model := odd_model(), group.world)
    options: dict[str, Any] = {"virtual_ranks": 8, "micro_batches": 2, **more}
    options["dtype"] = getattr(torch, options.get("dtype", "float32"))
    hosted = options.pop("hosted", None)
    options["evidence"] = Evidence(flat, options.pop("by_parameter", False))
    reducer = KINDS[mode](ranks or Ranks.default(), flat, **options)
    if hosted:
        reducer.assign([range(*own) for own in hosted])
    early = 0

    def leaf(virtual_rank: int, buffer: Buffer) -> None:
        nonlocal early
        for scale in (0.25, 0.75):
            torch.stack([(p * gradient(virtual_rank, p) * scale).sum() for p in used(model)]).sum().backward()  # type: ignore[no-untyped-call]
        buffer.loss += 0.1 * virtual_rank
        buffer.tokens = 1000 + virtual_rank
        early = reducer._next

    results = []
    for _ in range(2):  # the second step runs in buffers that the first one used
        for v, buffer in reducer.leaves():
            leaf(v, buffer)
        kept = [b for b in reducer._taken if b is not reducer._last]
        before = [buffer.tensor.clone() for buffer in kept]
        total = reducer.finish(stop=group.rank == group.world - 1)
        assert all(torch.equal(b.tensor, copy) for b, copy in zip(kept, before, strict=True)), "overwritten too early"
        summed = torch.cat([total.gradient[a:b] for a, b in flat.ranges])
        results.append(
            {
                "sha256": hashlib.sha256(summed[: flat.size].numpy().data).hexdigest(),
                "loss": float(total.loss).hex(),
                "norm": float(total.norm).hex(),
                "stops": total.stops.item(),
                "leaves": total.leaves.tolist(),
                "state": total.state.tolist(),
            }
        )
    assert results[0] == results[1]
    flat.parameters.detach()[reducer._mine[0][0]] += 1.0  # each rank changes what it owns, as an optimizer does
    reducer.spread()
    parameters = hashlib.sha256(flat.parameters.detach().numpy().data).hexdigest()
    return results[0] | {"early": early, "buckets": len(reducer._buckets), "parameters": parameters}


Found = dict[str, dict[int, list[dict[str, Any]]]]  # what each rank found, by case and world size
EQUAL = ("sha256", "loss", "norm", "leaves", "state")
CASES: dict[str, dict[str, Any]] = {
    "one bucket": {"virtual_ranks": 8},
    "many": {"virtual_ranks": 8, "bucket_bytes": 4096 * 5, "by_parameter": True},
    "V = 6": {"virtual_ranks": 6, "bucket_bytes": 4096 * 3},
    "bf16": {"virtual_ranks": 8, "bucket_bytes": 4096 * 5, "dtype": "bfloat16"},
}


def sums_in_turn(group: Group) -> dict[str, dict[str, Any]]:
    """All cases that so many ranks can have, by the same processes: these cost more than the sums."""
    return {
        name: sums(group, "exact", **case)
        for name, case in CASES.items()
        if group.world <= 5 or group.world == case["virtual_ranks"]
    }


@pytest.fixture(scope="module")
def exact() -> Found:
    found: Found = {name: {} for name in CASES}
    for world in (1, 2, 3, 5, 6, 8):
        for result in dist.run("tests.test_reduce:sums_in_turn", world):
            for name, of_rank in result.items():
                found[name].setdefault(world, []).append(of_rank)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_exact_sum_is_the_same_for_every_world_size(case: str, exact: Found) -> None:
    """Sum, loss, norm and checksums: one bucket and many, V a power of two and not, W that divides V and not."""
    assert list(exact[case]) == [1, 2, 3, 5, CASES[case]["virtual_ranks"]]
    seen = set()
    for world, results in exact[case].items():
        assert len(results) == world
        assert all(result["stops"] == 1 for result in results)
        assert results[0]["leaves"][3][0] == 1003
        seen |= {json.dumps({key: result[key] for key in EQUAL}) for result in results}
    assert len(seen) == 1


def test_uneven_shares_have_the_same_sum(exact: Found) -> None:
    (expected,) = exact["one bucket"][1]
    for hosted in ([(0, 6), (6, 8)], [(0, 1), (1, 2), (2, 8)], [(0, 3), (3, 5), (5, 8)]):
        for result in dist.run("tests.test_reduce:sums", len(hosted), mode="exact", hosted=hosted, bucket_bytes=20_480):
            assert all(result[key] == expected[key] for key in EQUAL), hosted


def test_a_sharded_sum_is_the_same_sum_in_parts(exact: Found) -> None:
    """Each rank holds its part only; the norm and the checksums are those of the whole; spreading brings all to all."""
    (whole,) = exact["one bucket"][1]
    for world in (2, 3, 8):
        results = dist.run("tests.test_reduce:sums", world, mode="exact", sharded=True, bucket_bytes=20_480)
        assert all(result[key] == whole[key] for result in results for key in EQUAL if key != "sha256")
        assert len({result["sha256"] for result in results}) > 1
        assert len({result["parameters"] for result in results}) == 1


def test_buckets_go_out_during_the_last_backward() -> None:
    """All that have their gradients: those behind the parameter without one must wait for the end of the leaf."""
    for result in dist.run("tests.test_reduce:sums", 4, mode="exact", bucket_bytes=4096 * 8):
        assert 0 < result["early"] < result["buckets"]


def test_the_exact_sum_is_the_sum_in_the_order_of_the_tree(exact: Found) -> None:
    """Against a sum written out by hand: ((0+1)+(2+3))+((4+5)+(6+7)), each leaf its two micro-batches."""
    flat = Flat(model := odd_model())
    buffer = flat.buffer()
    names = dict(model.named_parameters())
    for (name, view), parameter in zip(flat.named(buffer.tensor).items(), flat.items, strict=True):
        assert names[name] is parameter
        if name != "unused":
            g = [gradient(v, view) * 0.25 + gradient(v, view) * 0.75 for v in range(8)]
            view += ((g[0] + g[1]) + (g[2] + g[3])) + ((g[4] + g[5]) + (g[6] + g[7]))
    expected = hashlib.sha256(buffer.tensor[: flat.size].numpy().data).hexdigest()
    (result,) = exact["one bucket"][1]
    assert result["sha256"] == expected


def test_a_reduced_precision_rounds_every_node(exact: Found) -> None:
    """Against bfloat16 sums written out by hand; and it is another sum than float32's."""
    flat = Flat(odd_model())
    buffer = flat.buffer()
    for name, view in flat.named(buffer.tensor).items():
        if name != "unused":
            g = [(gradient(v, view) * 0.25 + gradient(v, view) * 0.75).bfloat16() for v in range(8)]
            view += ((g[0] + g[1]) + (g[2] + g[3])) + ((g[4] + g[5]) + (g[6] + g[7]))
    expected = hashlib.sha256(buffer.tensor[: flat.size].numpy().data).hexdigest()
    (result,) = exact["bf16"][1]
    assert result["sha256"] == expected


def test_the_fast_sum_depends_on_the_world_size() -> None:
    """What the tree is for. The same leaves, the same seven sums of them, other bits."""
    digests = []
    for world in (1, 3):
        results = dist.run("tests.test_reduce:sums", world, mode="fast")
        assert len({result["sha256"] for result in results}) == 1
        assert float.fromhex(results[0]["loss"]) == pytest.approx(2.8)
        digests.append(results[0]["sha256"])
    assert len(set(digests)) > 1


def peak(group: Group, mode: str) -> int:
    """Bytes of the tensors alive at most during a step, its gradient buffers included, after a first step."""
    import gc
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode

    flat = Flat(model := nn.Linear(512, 2048), group.world)
    reducer = KINDS[mode](
        Ranks.default(), flat, virtual_ranks=group.world, bucket_bytes=BUCKET, evidence=Evidence(flat)
    )
    alive = most = 0

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal alive, most
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, list | tuple) else [result]:
                storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
                if storage is not None and storage._cdata not in seen and storage.nbytes() >= 1 << 16:
                    seen.add(storage._cdata)
                    alive += storage.nbytes()
                    most = max(most, alive)
                    weakref.finalize(tensor, gone, storage._cdata, storage.nbytes())
            return result

    seen: set[int] = set()

    def gone(key: int, size: int) -> None:
        nonlocal alive
        alive -= size
        seen.discard(key)

    def leaf(virtual_rank: int, buffer: Buffer) -> None:
        model(torch.full((4, 512), float(virtual_rank))).sum().backward()

    with Count():  # type: ignore[no-untyped-call]
        for v, buffer in reducer.leaves():
            leaf(v, buffer)
        reducer.finish()
    gc.collect()
    return most


def peaks(group: Group) -> list[int]:
    return [peak(group, mode) for mode in ("exact", "fast")]


BUCKET = 1 << 20


def test_exact_needs_no_copy_of_the_gradient_besides() -> None:
    """At W = V, its peak is the fast reduction's to within one bucket: here 1 of 4 MiB."""
    exact, fast = zip(*dist.run("tests.test_reduce:peaks", 4), strict=True)
    assert all(size > 4 << 20 for size in fast), "the gradient itself is counted"
    assert max(exact) <= max(fast) + BUCKET, (exact, fast)


def test_layout_aligns_and_round_trips() -> None:
    model = odd_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flat = Flat(model, most=3)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert flat.cut % BLOCK == flat.size % BLOCK == 0
    for world in (1, 2, 3):
        buckets = flat.buckets(2 * BLOCK * world, world)
        assert flat.size <= buckets[-1][1] <= flat.length
        assert all((end - begin) % (BLOCK * world) == 0 for begin, end in buckets)
    assert all(begin % 64 == 0 for begin, _, _ in flat.slots.values())
    flat.parameters.detach().zero_()
    assert all(parameter.abs().sum() == 0 for parameter in model.parameters())


def test_clipping_agrees_with_torch() -> None:
    """Against clip_grad_norm_ and plain SGD; the norm is summed in another order, hence 1e-6 relative."""
    flat, reference = Flat(odd_model()), odd_model()
    buffer = flat.buffer()
    named = dict(reference.named_parameters())
    for name, view in flat.named(buffer.tensor).items():
        view += gradient(1, view)
        named[name].grad = view.clone()
    norm = squares(buffer.tensor).double().sum().sqrt()
    expected = nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    torch.testing.assert_close(norm.float(), expected, rtol=1e-6, atol=0)
    groups = [tensor for half in flat.owned for _, tensor in half]
    flat.step(torch.optim.SGD(groups, lr=0.1).step, buffer.tensor, norm, max_norm=1.0)
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    for name, view in flat.named(flat.parameters.detach()).items():
        torch.testing.assert_close(view, named[name].detach(), rtol=1e-5, atol=1e-7)


def test_norms_do_not_depend_on_how_many_blocks_are_summed_at_once() -> None:
    values = gradient(5, torch.empty(70 * BLOCK))
    whole = squares(values)
    for blocks in (1, 2, 3, 7, 64):
        assert torch.equal(torch.cat([squares(part) for part in values.split(blocks * BLOCK)]), whole)  # type: ignore[no-untyped-call]


def test_a_checksum_sees_every_bit_and_adds_up_over_any_cut() -> None:
    flat = Flat(nn.Linear(130, 70))
    values = gradient(2, torch.empty(flat.length))
    whole = flat.checksum(values, 0).sum()
    cut = 3 * BLOCK
    assert flat.checksum(values[:cut], 0).sum() + flat.checksum(values[cut:], cut).sum() == whole
    for place, bit in ((0, 0), (cut - 1, 31), (cut, 7), (flat.length - 1, 15)):
        changed = values.clone()
        changed.view(torch.int32)[place] ^= 1 << bit if bit < 31 else -(1 << 31)
        assert flat.checksum(changed, 0).sum() != whole
    swapped = values.clone()
    swapped[:64], swapped[64:128] = values[64:128], values[:64]
    assert flat.checksum(swapped, 0).sum() != whole


class Recorded:
    """In the place of a channel: what was sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, event: Any) -> None:
        self.sent.append(event)


def balanced(group: Group) -> list[Any]:
    """Leaves that take rank 1 much longer by its clock, under batch.weights=auto; the shares after each step."""
    now = [0.0]
    clock.time = SimpleNamespace(perf_counter=lambda: now[0])  # type: ignore
    flat = Flat(nn.Linear(3, 3), group.world)
    reducer = ExactReducer(Ranks.default(), flat, virtual_ranks=8)
    channel = Recorded()
    batch = SimpleNamespace(virtual_ranks=8, weights="auto")
    balance = Balance(SimpleNamespace(batch=batch), group, reducer, channel)  # type: ignore[arg-type]

    def leaf(virtual_rank: int, buffer: Buffer) -> None:
        now[0] += 0.03 if group.rank == 1 else 0.001

    shares = []
    for step in range(42):
        for v, buffer in reducer.leaves():
            leaf(v, buffer)
        balance.observe(step, reducer.finish().seconds[0].tolist())
        shares.append([len(own) for own in reducer.hosted])
    shared, *slow = channel.sent or [None]
    return [shares, shared and (shared.shares, shared.why), [(event.rank, event.step) for event in slow]]


def test_a_slow_rank_is_given_less() -> None:
    first, second = dist.run("tests.test_reduce:balanced", 2)
    assert first[0] == second[0], "the ranks decide alike"
    assert first[0][0] == [4, 4]
    assert first[0][-1] == [7, 1]
    assert first[1] == [[7, 1], "measured"]
    # four leaves a step are 1.2 s in the first window, one is 0.3 s in each of the next: 2.1 s in the fourth
    assert first[2] == [[1, 39]], "and it is named, once, when that has lasted for a while"
    assert second[1:] == [None, []], "rank 0 speaks for all"


def agrees(group: Group) -> list[Any]:
    """The shares after a regroup for which one rank decided alone, and after one with a newcomer who knows less."""
    reducer = ExactReducer(Ranks.default(), Flat(nn.Linear(3, 3), group.world), virtual_ranks=8)
    config, state = SimpleNamespace(batch=SimpleNamespace(virtual_ranks=8, weights="auto")), SimpleNamespace(step=0)

    def regrouped(balance: Balance, digest: int, joined: bool) -> list[int]:
        balancing._same_micro_batch = lambda *_: (digest, [0.1, 0.9][group.rank])  # type: ignore[assignment]
        reducer.lay_out()
        for step in range(balancing.WINDOW if group.rank == 1 and not joined else 0):  # it catches up
            balance.observe(step, [0.1, 0.9])
        balance.regrouped(state, None, joined)  # type: ignore[arg-type]
        return list(map(len, reducer.hosted))

    def new() -> Balance:
        return Balance(config, group, reducer, Recorded())  # type: ignore[arg-type]

    balance = new()
    found = [regrouped(balance, 7, True), regrouped(balance, 7, False)]
    found += [regrouped(balance, group.rank, True)]  # other bits: from here on nobody follows speeds
    return [*found, regrouped(new() if group.rank == 1 else balance, 7, True)]


def test_ranks_decide_alike_though_they_know_unlike() -> None:
    """Else they expect leaves from each other that nobody computes, and bytes of other sizes."""
    results = dist.run("tests.test_reduce:agrees", 2)
    assert results == [[[7, 1], [4, 4], [4, 4], [4, 4]]] * 2
