"""What is computed otherwise than operation by operation, because a CPU is faster so.

Measured on one thread of an AVX-512 bf16 machine; tests/bench/NOTES.md has what else was tried.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

QUERIES = 128  # of a block of attention


class Attention(torch.autograd.Function):
    """softmax(q kᵀ · scale) v over the past and present, in blocks of queries that see the keys up to their own end.

    q (B, H, T, E), k and v (B, K, T, E), `other` (B, 1, T, T) or None: true where a query may not see a key. Queries
    that share a key are rows of one matrix. Autograd would copy each block twice more and add up gradients of slices
    in tensors of zeros: 6.0 ms, not 4.7, for 2 x 256 tokens, 6 heads of 64. With S the scores, P their softmax:
    dV = Pᵀ dO, dP = dO Vᵀ, dS = P · (dP - rowsum(dP · P)), dQ = dS K · scale, dK = dSᵀ Q · scale.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, other: Tensor | None, scale: float, cap: float) -> Tensor:
        B, H, T, E = q.shape
        groups, outs, kept = H // k.size(1), [], []
        k, v = k.reshape(-1, T, E), v.reshape(-1, T, E)
        none, future = q.new_empty(()), q.new_full((QUERIES, QUERIES), float("-inf")).triu(1)
        for start in range(0, T, QUERIES):
            end = min(start + QUERIES, T)
            n = end - start
            queries = q[:, :, start:end].reshape(-1, groups * n, E)
            scores = torch.baddbmm(none, queries, k[:, :end].transpose(1, 2), beta=0, alpha=scale)
            tanh = (scores / cap).tanh_() if cap else none
            scores = cap * tanh if cap else scores
            scores.view(-1, groups, n, end)[..., start:].add_(future[:n, :n])
            if other is not None:
                scores.view(B, H, n, end).masked_fill_(other[:, :, start:end, :end], float("-inf"))
            weights = scores.softmax(-1).to(v.dtype)
            outs.append(torch.bmm(weights, v[:, :end]).view(B, H, n, E))
            kept += [queries, weights, tanh]
        ctx.save_for_backward(k, v, *kept)
        ctx.shape, ctx.scale, ctx.cap = (B, H, T, E), scale, cap
        return torch.cat(outs, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        (B, H, T, E), (k, v, *kept) = ctx.shape, ctx.saved_tensors
        none, dq = gradient.new_empty(()), gradient.new_empty(B, H, T, E)
        dk: Tensor | None = None
        for index in reversed(range(0, len(kept), 3)):  # the last block sees all keys: the others' are added to its
            queries, weights, tanh = kept[index : index + 3]
            end = weights.size(-1)
            start = index // 3 * QUERIES
            out = gradient[:, :, start:end].reshape(queries.shape)
            scores = torch.bmm(out, v[:, :end].transpose(1, 2))
            scores = torch._softmax_backward_data(scores, weights, -1, weights.dtype)
            if ctx.cap:
                scores *= 1 - tanh.square()
            dq[:, :, start:end] = torch.baddbmm(none, scores, k[:, :end], beta=0, alpha=ctx.scale).view(B, H, -1, E)
            keys = torch.baddbmm(none, scores.transpose(1, 2), queries, beta=0, alpha=ctx.scale)
            values = torch.bmm(weights.transpose(1, 2), out)
            if dk is None:
                dk, dv = keys, values
            else:
                dk[:, :end] += keys
                dv[:, :end] += values
        assert dk is not None
        return dq, dk.view(B, -1, T, E), dv.view(B, -1, T, E), None, None, None


def gelu(x: Tensor) -> Tensor:
    """GELU (arXiv 1606.08415) in its tanh form; on a CPU in bf16 from a table."""
    if x.device.type == "cpu" and torch.compiler.is_compiling():  # x·sigmoid(2u) for x·(1 + tanh u)/2: half of the time
        h = x.float()
        return (h * (1.5957691216057308 * h * (1 + 0.044715 * h * h)).sigmoid()).to(x.dtype)
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return F.gelu(x, approximate="tanh")
    y: Tensor = Gelu.apply(x)  # type: ignore[no-untyped-call]
    return y


class Gelu(torch.autograd.Function):
    """GELU in its tanh form, of bf16: there are 65,536 numbers, so it is looked up, as is its derivative.

    What is found is the true number, rounded: 0.6 + 0.75 ms for 512 x 1,536, where the library takes 1.5 + 1.5.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return look_up(x, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return look_up(x, 1).mul_(gradients[0])


def look_up(x: Tensor, which: int) -> Tensor:
    place = x.reshape(-1).view(torch.uint16).to(torch.int32)
    return torch.index_select(gelu_table()[which], 0, place).view(x.shape)


@functools.cache
def gelu_table() -> tuple[Tensor, Tensor]:
    """GELU and its derivative for every bf16 number, by its bits; no graph, as activations may be recomputed here."""
    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).double()
        slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate="tanh")
        return F.gelu(x, approximate="tanh").bfloat16(), slope.bfloat16()


def scores(x_BTD: Tensor, weight: Tensor, vocab: int) -> Tensor:
    """Logits (B, T, vocab). A slice that leaves nothing out would still cost two passes over zeros backward."""
    logits_BTV = F.linear(x_BTD, weight)
    return logits_BTV if logits_BTV.size(-1) == vocab else logits_BTV[..., :vocab]


@contextlib.contextmanager
def casts_kept() -> Iterator[None]:
    """Let autocast round each weight once a step, not once a micro-batch: they do not change within one."""
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
