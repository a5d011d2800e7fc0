"""Each part against the obvious form of the same formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from train.models.fused import QUERIES
from train.models.layers import (
    RMSNorm,
    cached_attention,
    causal_attention,
    language_loss,
    rotary_table,
    rotate,
    summed_loss,
)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("length", [1, QUERIES, QUERIES + 3, 2 * QUERIES])
def test_blocked_attention_is_causal_attention(heads: int, kv_heads: int, length: int) -> None:
    torch.manual_seed(0)
    shapes = [(2, heads, length, 8), (2, kv_heads, length, 8), (2, kv_heads, length, 8)]
    ours = [torch.randn(s, requires_grad=True) for s in shapes]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    y = causal_attention(*ours)
    q, k, v = theirs
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(y, z)
    weights = torch.randn_like(y)
    torch.autograd.backward([y, z], [weights, weights])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_scores_are_scaled_and_capped_alike_whole_and_step_by_step(cap: float) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    scores = 3 * q @ k.repeat_interleave(2, 1).mT
    scores = cap * torch.tanh(scores / cap) if cap else scores
    past = torch.ones(9, 9).tril().bool()
    right = torch.where(past, scores, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(causal_attention(q, k, v, scale=3, cap=cap), right)
    kv = torch.full((2, 2, 2, 12, 8), torch.nan)
    for start, end in ((0, 5), (5, 6), (6, 9)):
        new_q, new_k, new_v = (x[:, :, start:end] for x in (q, k, v))
        found = cached_attention(new_q, new_k, new_v, kv, start, scale=3, cap=cap)
        torch.testing.assert_close(found, right[:, :, start:end])


def test_norm_and_its_gradients_are_the_librarys() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(24, 1e-3)
    torch.nn.init.normal_(norm.weight)
    weight = norm.weight.detach().double().requires_grad_()
    x = torch.randn(3, 5, 24, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    upstream = torch.randn(3, 5, 24)
    torch.autograd.backward([norm(x), F.rms_norm(x64, (24,), weight, 1e-3)], [upstream, upstream.double()])
    assert norm.weight.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]


def test_norm_computes_in_fp32_and_answers_in_kind() -> None:
    norm = RMSNorm(64, 0.0)
    torch.nn.init.ones_(norm.weight)
    x = torch.full((1, 1, 64), 300.0, dtype=torch.float16)  # its square, 90,000, is beyond fp16
    y = norm(x)
    assert y.dtype == torch.float16
    assert torch.equal(y, torch.ones_like(y))


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    torch.manual_seed(0)
    table = rotary_table(32, 8, 10_000.0)
    q, k = torch.randn(8).expand(1, 1, 32, 8), torch.randn(8).expand(1, 1, 32, 8)
    a, b = rotate(q, table)[0, 0], rotate(k, table)[0, 0]
    torch.testing.assert_close(a.norm(dim=-1), q[0, 0].norm(dim=-1))
    scores = a @ b.T
    torch.testing.assert_close(scores[3:, 3:], scores[:-3, :-3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores[0, 0], scores[0, 5])


@pytest.mark.parametrize("chunk", [0, 7])
def test_z_loss_is_felt_and_not_seen_and_logits_come_in_chunks(chunk: int) -> None:
    """Against the formulas in float64; the last chunk is shorter; ignored targets count for neither."""
    torch.manual_seed(0)
    weight, targets = torch.randn(30, 8, dtype=torch.float64, requires_grad=True), torch.randint(0, 30, (2, 10))
    x = torch.randn(2, 10, 8, dtype=torch.float64, requires_grad=True)
    targets[0, ::3] = -100
    seen = []

    def logits(x: Tensor) -> Tensor:
        seen.append(x[..., 0].numel())
        return x @ weight.T

    loss = language_loss(logits, x, targets, z=0.5, chunk=chunk)
    loss.backward()  # type: ignore[no-untyped-call]
    assert (max(seen), sum(seen)) == ((7, 40) if chunk else (20, 20))
    kept, right = targets.flatten() >= 0, (x @ weight.T).flatten(0, 1)
    nats = F.cross_entropy(right[kept], targets.flatten()[kept], reduction="sum")
    torch.testing.assert_close(loss, nats)
    expected = torch.autograd.grad(nats + 0.5 * right[kept].logsumexp(-1).square().sum(), [x, weight])
    for found, gradient in zip([x.grad, weight.grad], expected, strict=True):
        torch.testing.assert_close(found, gradient)


def test_loss_is_a_fp32_sum_that_skips_ignored_targets() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(600, 64).bfloat16(), torch.randint(0, 64, (600,))  # 600 rows: three chunks
    targets[::3] = -100
    loss = summed_loss(logits, targets)
    kept = targets >= 0
    right = -logits.double().log_softmax(-1)[kept, targets[kept]].sum()
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)
    assert summed_loss(logits, torch.full_like(targets, -100)) == 0
