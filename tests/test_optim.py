"""The optimizer over the flat layout, and schedules as pure functions of the step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from train import optim
from train.config import Optimizer, OptimizerKind, Schedule, ScheduleKind
from train.flat import BLOCK, Flat


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 7), nn.LayerNorm(7), nn.Linear(7, 5))


def test_flat_adamw_equals_adamw_on_each_parameter() -> None:
    """Torch's AdamW on the parameters one by one: decay on matrices only, five steps.

    The fused kernel rounds the last, partial vector of a tensor differently, so the reference is the plain loop's
    arithmetic: equal to 1e-6 relative.
    """
    config = Optimizer(kind=OptimizerKind.adamw, lr=0.01, weight_decay=0.3)
    ours, theirs = model(), model()
    flat = Flat(ours)
    optimizer = optim.build(config, flat)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.3},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for step in range(5):
        x = torch.randn(4, 13, generator=torch.Generator().manual_seed(step))
        buffer = flat.buffer()
        flat.attach(buffer)
        ours(x).square().mean().backward()
        optim.set_learning_rate(optimizer, 0.01)
        flat.step(optimizer.step, buffer.tensor, torch.ones(()), max_norm=0)
        reference.zero_grad()
        theirs(x).square().mean().backward()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_it_is_torchs_own_optimizer_bit_for_bit() -> None:
    """Its class over the same tensors, with another rate at each step: parameters, moments and counts of steps."""
    config = Optimizer(kind=OptimizerKind.adamw, weight_decay=0.3)
    ours, theirs = Flat(model()), Flat(model())
    matrices, vectors = ([tensor for _, tensor in half] for half in theirs.owned)
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    optimizer = optim.build(config, ours)
    for step in range(5):
        gradient = torch.randn(ours.length, generator=torch.Generator().manual_seed(step))
        for flat, one in ((ours, optimizer), (theirs, reference)):
            optim.set_learning_rate(one, 0.01 / (1 + step))
            flat.step(one.step, gradient.clone(), torch.ones((), dtype=torch.float64), max_norm=0.5)
    assert torch.equal(ours.parameters, theirs.parameters)
    for a, b in zip(optimizer.state.values(), reference.state.values(), strict=True):
        assert {name: tensor.tolist() for name, tensor in a.items()} == {name: x.tolist() for name, x in b.items()}


def test_the_result_does_not_depend_on_where_a_tensor_is_cut() -> None:
    """Bitwise: a flat tensor whole, and cut at a multiple of 64 as a sharded optimizer would."""

    def stepped(parts: list[torch.Tensor], gradients: list[torch.Tensor]) -> torch.Tensor:
        optimizer = torch.optim.AdamW(parts, lr=0.01, fused=True)
        for part, gradient in zip(parts, gradients, strict=True):
            part.grad = gradient
        for _ in range(3):
            optimizer.step()
        return torch.cat([part.detach() for part in parts])

    values, gradient = torch.randn(2, 1024 * 3, generator=torch.Generator().manual_seed(0))
    whole = stepped([values.clone().requires_grad_()], [gradient])
    for cut in (64, 1024, 2048 + 64):
        parts = [values[:cut].clone().requires_grad_(), values[cut:].clone().requires_grad_()]
        assert torch.equal(stepped(parts, [gradient[:cut], gradient[cut:]]), whole), cut


def test_state_is_named_and_views_restore() -> None:
    flat = Flat(model())
    optimizer = optim.build(Optimizer(kind=OptimizerKind.adamw), flat)
    flat.step(optimizer.step, torch.ones(flat.length), torch.ones((), dtype=torch.float64), max_norm=0)
    state = {piece.name: piece for piece in optim.pieces(optimizer, flat)}
    assert {name: piece.shape for name, piece in state.items()} == {
        f"{moment}.{name}": parameter.shape
        for name, parameter in model().named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    assert all(piece.replicated and piece.data.numel() == piece.shape.numel() for piece in state.values())
    torch.testing.assert_close(state["exp_avg.1.weight"].data, torch.full((7,), 0.1))
    state["exp_avg.0.weight"].data.fill_(7)
    again = {piece.name: piece for piece in optim.pieces(optimizer, flat)}
    assert (again["exp_avg.0.weight"].data == 7).all()
    optim.set_step(optimizer, 12)
    assert all(entry["step"] == 12 for entry in optimizer.state.values())


def test_ranks_that_own_parts_update_them_to_the_same_bits() -> None:
    """Three ranks' ranges, cut at blocks across both sections, against the whole; and their pieces cover the state."""

    def wide() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(61, 83), nn.LayerNorm(83), nn.Linear(83, 31))

    whole = Flat(wide())
    optimizer = optim.build(Optimizer(kind=OptimizerKind.adamw), whole)
    gradients = [torch.randn(whole.length, generator=torch.Generator().manual_seed(s)) for s in range(5)]
    norm = torch.tensor(3.0, dtype=torch.float64)
    for gradient in gradients:
        whole.step(optimizer.step, gradient.clone(), norm, max_norm=1.0)
    expected = {(piece.name): piece.data for piece in optim.pieces(optimizer, whole)}
    covered = {name: torch.zeros_like(data) for name, data in expected.items()}
    assert whole.length == 9 * BLOCK
    for ranges in ([(0, 3 * BLOCK)], [(3 * BLOCK, 4 * BLOCK), (8 * BLOCK, 9 * BLOCK)], [(4 * BLOCK, 8 * BLOCK)]):
        flat = Flat(wide())
        flat.own([ranges])
        own = optim.build(Optimizer(kind=OptimizerKind.adamw), flat)
        for gradient in gradients:
            flat.step(own.step, gradient.clone(), norm, max_norm=1.0)
        for a, b in ranges:
            assert torch.equal(flat.parameters[a:b], whole.parameters[a:b])
        for piece in optim.pieces(own, flat):
            assert not piece.replicated
            stretch = slice(piece.offset, piece.offset + piece.data.numel())
            assert torch.equal(piece.data, expected[piece.name][stretch])
            covered[piece.name][stretch] += 1
    assert all((count == 1).all() for count in covered.values())


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_schedules(kind: ScheduleKind) -> None:
    optimizer = Optimizer(kind=OptimizerKind.adamw, lr=0.5)
    schedule = Schedule(kind=kind, warmup_steps=4, decay=0.25, floor=0.1)
    rates = [optim.learning_rate(optimizer, schedule, step, 100) for step in range(100)]
    assert rates[:5] == [0.5 * (step + 1) / 5 for step in range(4)] + [0.5]
    assert max(rates) == 0.5
    match kind:
        case ScheduleKind.constant:
            assert rates[50:] == [0.5] * 50
        case ScheduleKind.cosine:
            expected = 0.05 + 0.45 * 0.5 * (1 + math.cos(math.pi * 46 / 96))
            assert rates[50] == pytest.approx(expected)
            assert rates == rates[:4] + sorted(rates[4:], reverse=True)
        case ScheduleKind.wsd:
            assert rates[75] == 0.5
            assert rates[76] == pytest.approx(0.05 + 0.45 * 24 / 25)
            assert rates[99] == pytest.approx(0.05 + 0.45 / 25)
