"""The exact sum on real ranks: equal bits for every world size; and the fast one, which is why `exact` exists."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import dist
from train.flat import BLOCK, LOSS, Buffer, Flat
from train.group import Group, Place
from train.reduce import ExactReducer, FastReducer


def odd_model() -> nn.Module:
    """Shapes that align with nothing: 7 x 13, 5, 301 x 17, 1."""
    torch.manual_seed(0)
    model = nn.Module()
    for name, shape in {"a": (7, 13), "b": (5,), "c": (301, 17), "d": (1,)}.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return model


def gradient(virtual_rank: int, like: Tensor) -> Tensor:
    """Values over many orders of magnitude, so that the order of addition shows in the last bits."""
    generator = torch.Generator().manual_seed(virtual_rank)
    return torch.randn(like.shape, generator=generator) * 10 ** torch.randn(like.shape, generator=generator)


def sums(place: Place, mode: str, virtual_ranks: int, bucket_bytes: int) -> dict[str, Any]:
    from lightning.fabric.plugins import Precision

    flat = Flat(odd_model())
    group = Group(place, Precision())
    reducer = (
        ExactReducer(group, flat, virtual_ranks, bucket_bytes)
        if mode == "exact"
        else FastReducer(group, flat, virtual_ranks)
    )

    def leaf(virtual_rank: int, buffer: Buffer) -> None:
        for view in buffer.views:
            view += gradient(virtual_rank, view)
        buffer.scalars[LOSS] += virtual_rank

    hashes = []
    for _ in range(2):  # the second step runs in buffers that the first one used
        parts = reducer.accumulate(leaf)
        before = [part.tensor.clone() for part in parts]
        total = reducer.reduce(parts)
        if mode == "exact" and place.world > 1:
            kept = all(torch.equal(part.tensor, copy) for part, copy in zip(parts, before, strict=True))
            assert kept, "a subtree sum was overwritten before commit"
        hashes.append(hashlib.sha256(total.tensor[: flat.size].numpy().data).hexdigest())
    return {"sha256": hashes, "loss": total.scalars[LOSS].item()}


@pytest.mark.parametrize(("virtual_ranks", "bucket_bytes"), [(8, 1 << 23), (8, 4096 * 5), (6, 4096 * 3)])
def test_the_exact_sum_is_the_same_for_every_world_size(virtual_ranks: int, bucket_bytes: int) -> None:
    """One bucket and many, V a power of two and not, W that divides V and not."""
    seen = set()
    for world in (1, 2, 3, 5, virtual_ranks):
        results = dist.run(
            "tests.test_reduce:sums", world, mode="exact", virtual_ranks=virtual_ranks, bucket_bytes=bucket_bytes
        )
        assert all(result["loss"] == sum(range(virtual_ranks)) for result in results)
        seen |= {digest for result in results for digest in result["sha256"]}
    assert len(seen) == 1


def test_the_exact_sum_is_the_sum_in_the_order_of_the_tree() -> None:
    """Against a sum written out by hand: ((0+1)+(2+3))+((4+5)+(6+7))."""
    flat = Flat(odd_model())
    buffer = flat.buffer()
    for view in buffer.views:
        g = [gradient(v, view) for v in range(8)]
        view += ((g[0] + g[1]) + (g[2] + g[3])) + ((g[4] + g[5]) + (g[6] + g[7]))
    expected = hashlib.sha256(buffer.tensor[: flat.size].numpy().data).hexdigest()
    (result,) = dist.run("tests.test_reduce:sums", 1, mode="exact", virtual_ranks=8, bucket_bytes=1 << 23)
    assert result["sha256"] == [expected, expected]


def test_the_fast_sum_depends_on_the_world_size() -> None:
    """What the tree is for. The sums agree to rounding: a relative 1e-5 of float32 values of mixed size."""
    digests = []
    for world in (1, 3, 4):
        results = dist.run("tests.test_reduce:sums", world, mode="fast", virtual_ranks=8, bucket_bytes=0)
        assert {result["loss"] for result in results} == {28.0}
        digests.append(results[0]["sha256"][0])
    assert len(set(digests)) > 1


def test_layout_aligns_and_round_trips() -> None:
    model = odd_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flat = Flat(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert flat.matrices.numel() % BLOCK == 0
    assert flat.size % BLOCK == 0
    assert all(begin % 64 == 0 for begin, _, _ in flat.slots.values())
    flat.parameters.zero_()
    assert all(parameter.abs().sum() == 0 for parameter in model.parameters())


def test_clipping_agrees_with_torch() -> None:
    """Against clip_grad_norm_; the norm is summed in another order, hence 1e-6 relative."""
    model, reference = odd_model(), odd_model()
    flat = Flat(model)
    buffer = flat.buffer()
    for view, parameter in zip(buffer.views, reversed_by_section(reference), strict=True):
        g = gradient(1, view)
        view += g
        parameter.grad = g.clone()
    buffer.scalars[LOSS] = 1e9  # rides along; is no gradient
    norm = flat.clip(buffer, 1.0)
    expected = nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for view, parameter in zip(buffer.views, reversed_by_section(reference), strict=True):
        torch.testing.assert_close(view, parameter.grad, rtol=1e-5, atol=0)
    assert buffer.scalars[LOSS] == 1e9


def reversed_by_section(model: nn.Module) -> list[nn.Parameter]:
    parameters = list(model.parameters())[::-1]
    return [p for p in parameters if p.dim() >= 2] + [p for p in parameters if p.dim() < 2]
