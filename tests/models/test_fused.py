"""What is computed otherwise than operation by operation, against the operations."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from train.models.fused import QUERIES, casts_kept, gelu, scores
from train.models.layers import causal_attention


def test_gelu_of_every_bf16_number_is_the_true_one_rounded() -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    x = x[x.isfinite()].view(-1, 256).T.requires_grad_()  # not contiguous
    true = x.detach().double().requires_grad_()
    y, z = gelu(x), F.gelu(true, approximate="tanh")
    torch.autograd.backward([y, z], [torch.full_like(y, 2), torch.full_like(z, 2)])
    torch.testing.assert_close(y, z.bfloat16(), rtol=0, atol=0)
    assert true.grad is not None
    torch.testing.assert_close(x.grad, true.grad.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_gelu_as_it_is_compiled_for_a_cpu_is_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """To 2e-6 in fp32: two exponentials' roundings; where it is tiny, of the number that it is a share of."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.linspace(-12, 12, 10_001, requires_grad=True)
    true = x.detach().double().requires_grad_()
    y, z = gelu(x), F.gelu(true, approximate="tanh")
    torch.autograd.backward([y.sum(), z.sum()])
    torch.testing.assert_close(y.double(), z, rtol=2e-6, atol=2e-6)
    assert x.grad is not None
    assert true.grad is not None
    torch.testing.assert_close(x.grad.double(), true.grad, rtol=2e-6, atol=2e-6)
    assert gelu(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("documents", [False, True])
def test_attentions_gradients_are_those_of_the_plain_form(cap: float, documents: bool) -> None:
    torch.manual_seed(0)
    T = QUERIES + 5
    a, b, c = ours = [torch.randn(2, heads, T, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    q, k, v = theirs = [x.detach().clone().requires_grad_() for x in ours]
    of = (torch.arange(2 * T) // 37).view(2, T) if documents else None
    seen = torch.ones(T, T).tril().bool()
    if of is not None:
        seen = seen & (of[:, None, :, None] == of[:, None, None])
    plain = 0.3 * q @ k.repeat_interleave(2, 1).mT
    plain = cap * (plain / cap).tanh() if cap else plain
    z = plain.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    y = causal_attention(a, b, c, of, scale=0.3, cap=cap)
    weights = torch.randn_like(y)
    torch.autograd.backward([y, z], [weights, weights])
    torch.testing.assert_close(y, z)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_rows_that_round_the_vocabulary_up_are_left_out() -> None:
    assert scores(torch.randn(1, 2, 3), torch.randn(8, 3), 5).shape == (1, 2, 5)


class Casts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.number += func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16
        return func(*args, **(kwargs or {}))


def test_weights_are_rounded_once_a_step_and_anew_in_the_next() -> None:
    weight, x = torch.nn.Parameter(torch.ones(4, 4)), torch.ones(4, 4, dtype=torch.bfloat16)
    sums = []
    for _ in range(2):
        with Casts() as casts, casts_kept():
            for _ in range(3):
                with torch.autocast("cpu", torch.bfloat16):
                    y = F.linear(x, weight).sum()
                y.backward()  # type: ignore[no-untyped-call]  # through the same rounding each time
        sums.append(float(y.detach()))
        assert casts.number == 1
        with torch.no_grad():
            weight.add_(1)
    assert sums == [64, 128]
    assert weight.grad is not None
    assert weight.grad.eq(24).all()
