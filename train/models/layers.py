"""The parts of a transformer: norms, rotation, attention, loss.

Each is written twice in one's head: for a GPU, where the fused kernel of the library is the fastest, and for a
CPU core, where memory traffic decides and the obvious form is often two times slower. Where the two differ the
function says so, with the numbers that decided (bf16 autocast, one thread of an AVX-512 bf16 machine, eager,
forward and backward, 2,048 tokens). Nothing here knows what a rank is.

Shapes: B sequences, T positions, D width, H query heads, K key/value heads, E head size, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from train.models import fused

Forward = TypeVar("Forward", bound=Callable[..., Any])
IGNORED = -100  # a target that counts for nothing
ROWS = 256  # of a chunk of the loss on CPU: 256 x 4,096 logits in fp32 are 4 MB, which stay in the cache


class Linear(nn.Module):
    """x Wᵀ + b. torch's draws a first weight that is thrown away, and imports sympy for it on the meta device (2 s)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in float64 where it is that: what norms, routers and the loss are computed in."""
    return x if x.dtype == torch.float64 else x.float()


class _RMSNorm(torch.autograd.Function):
    """With h = x/rms(x): y = h·w, dw = sum(dy·h), dx = (dy·w - h·mean(dy·w·h)) / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True).square() / x_BTD.size(-1) + eps)
        unit = x_BTD * scale
        ctx.save_for_backward(unit, weight, scale)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        unit, weight, scale = ctx.saved_tensors
        along = gradient * unit
        mean = (along @ weight).unsqueeze(-1) / -unit.size(-1)
        return (gradient * weight).addcmul_(unit, mean).mul_(scale), along.flatten(0, -2).sum(0), None


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (arXiv 1910.07467), computed in fp32, returned in x's precision.

    On CPU with its own backward: the library's is a chain of small operations, 4.0 ms at 2,048 x 256; this one 1.4,
    which is 6 % of a step of a small model.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        x, weight = wide(x_BTD), wide(self.weight)
        if x.device.type != "cpu":
            return F.rms_norm(x, weight.shape, weight, self.eps).to(x_BTD.dtype)
        y: Tensor = _RMSNorm.apply(x, weight, self.eps)  # type: ignore[no-untyped-call]
        return y.to(x_BTD.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / deviation · weight + bias over the last dimension (arXiv 1607.06450), computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        y = F.layer_norm(wide(x_BTD), self.weight.shape, wide(self.weight), wide(self.bias), self.eps)
        return y.to(x_BTD.dtype)


def rotary_table(
    context: int, size: int, base: float, *, factor: float = 1, low: float = 1, high: float = 4, original: float = 1
) -> Tensor:
    """cos and sin of position · base^(-2i/size), as (2, context, size/2) in fp32 (arXiv 2104.09864).

    With a `factor` above 1 as in Llama 3.1 (arXiv 2407.21783): a pair that turns fewer than `low` times in `original`
    tokens turns `factor` times slower, one that turns more than `high` times as before, and the share of the two is
    linear in between.

    Always made on the CPU, by the same operations as in transformers, so that the table's bits depend neither
    on the device nor on where a checkpoint came from.
    """
    with torch.device("cpu"):
        frequency = 1.0 / base ** (torch.arange(0, size, 2).float() / size)
        if factor != 1:
            turns = original / (2 * math.pi / frequency)
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            frequency = (1 - kept) * frequency / factor + kept * frequency
        angle = torch.outer(torch.arange(context).float(), frequency)
        return torch.stack((angle.cos(), angle.sin()))


def rotate(x_BHTE: Tensor, table: Tensor) -> Tensor:
    """Rotary positions: the pair (i, i + E/2) of each head turns by its angle. `table` is (2, T, E/2).

    In x's own precision: 3.9 ms a layer; 6.7 with fp32 in between, for the same loss.
    """
    cos, sin = table.to(x_BHTE.dtype)
    a, b = x_BHTE.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def capped(scores: Tensor, cap: float) -> Tensor:
    """cap · tanh(scores / cap), which leaves small scores alone and lets none be larger; 0: no cap."""
    return cap * (scores / cap).tanh() if cap else scores


def documents(tokens_BT: Tensor, separator: int | None) -> Tensor | None:
    """A number for each token, (B, T), the same within a document, which a `separator` begins; None: no documents.

    The token that ends a document begins the next one: that is what the next one's first token is predicted from.
    """
    return None if separator is None else (tokens_BT == separator).cumsum(1)


def causal_attention(
    q_BHTE: Tensor,
    k_BKTE: Tensor,
    v_BKTE: Tensor,
    documents_BT: Tensor | None = None,
    *,
    scale: float | None = None,
    cap: float = 0.0,
) -> Tensor:
    """softmax(q kᵀ · scale) v over the past and present, (B, H, T, E); H / K queries share a key (arXiv 2305.13245).

    `scale` is 1/√E unless said; with a `cap` the scores are capped before the softmax. With `documents_BT` a token
    sees those of its own document only.

    On a GPU the library's fused kernel. On a CPU that kernel is the slowest choice in bf16 (8 x 256 tokens, 4 heads
    of 64: 32–43 ms; plain softmax over all scores 22–31), and half of what the plain form computes is masked away. So:
    blocks of 128 queries (64: equal, 256: slower) that see only the keys up to their own end, 16–20 ms. The fused
    kernel has no cap, so a GPU takes the blocks too where there is one (unmeasured there).
    """
    scale = q_BHTE.size(-1) ** -0.5 if scale is None else scale
    if q_BHTE.device.type != "cpu" and not cap:
        seen, shared = None, q_BHTE.size(1) != k_BKTE.size(1)
        if documents_BT is not None:
            seen = (documents_BT[:, None, :, None] == documents_BT[:, None, None]).tril()
        return F.scaled_dot_product_attention(
            q_BHTE, k_BKTE, v_BKTE, seen, is_causal=seen is None, scale=scale, enable_gqa=shared
        )
    other = None if documents_BT is None else documents_BT[:, None, :, None] != documents_BT[:, None, None]
    y_BHTE: Tensor = fused.Attention.apply(q_BHTE, k_BKTE, v_BKTE, other, scale, cap)  # type: ignore[no-untyped-call]
    return y_BHTE


def cached_attention(
    q_BHTE: Tensor,
    k_BKTE: Tensor,
    v_BKTE: Tensor,
    kv: Tensor,
    start: int,
    *,
    scale: float | None = None,
    cap: float = 0.0,
) -> Tensor:
    """The same for T new positions after `start` known ones, whose keys and values are in `kv` (2, B, K, context, E).

    Those of the new positions are added to it. Returns (B, H, T, E).
    """
    heads, groups, T, E = q_BHTE.size(1), k_BKTE.size(1), q_BHTE.size(2), q_BHTE.size(3)
    end = start + T
    kv[0, :, :, start:end], kv[1, :, :, start:end] = k_BKTE, v_BKTE
    seen = torch.ones(T, end, dtype=torch.bool, device=q_BHTE.device).tril(start)
    k, v = kv[..., :end, :].to(q_BHTE.dtype)
    if not cap:
        y: Tensor = F.scaled_dot_product_attention(q_BHTE, k, v, seen, scale=scale, enable_gqa=heads != groups)
        return y
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    scores = capped(q_BHTE @ k.transpose(2, 3) * (E**-0.5 if scale is None else scale), cap)
    y = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype) @ v
    return y


def attention(checkpointed: str) -> Callable[..., Tensor]:
    """`causal_attention`, which keeps its scores for the backward pass; with `selective` it computes them again.

    They are what grows with the square of the context (Megatron's selective recomputation, arXiv 2205.05198).
    """
    if checkpointed != "selective":
        return causal_attention
    return functools.partial(checkpoint, causal_attention, use_reentrant=False, preserve_rng_state=False)


def checkpointed(forward: Forward) -> Forward:
    """The `forward` of a module of which, where its `again` says so, nothing is kept for the backward pass but inputs.

    The same operations from the same state of the generators: the same bits. Hooks of the module run once.
    """

    @functools.wraps(forward)
    def wrapped(module: Any, *inputs: Any) -> Any:
        if not module.again:
            return forward(module, *inputs)
        return checkpoint(functools.partial(forward, module), *inputs, use_reentrant=False)

    return cast(Forward, wrapped)


class RotaryAttention(nn.Module):
    """Causal attention with rotary positions and shared keys, its three projections to heads in one matrix.

    `cap` and `scale` as in `causal_attention`, `again` as in `attention`. The rows of `qkv` are those of queries, keys
    and values, in that order.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        size: int,
        *,
        scale: float | None = None,
        cap: float = 0.0,
        again: str = "none",
    ) -> None:
        super().__init__()
        self.attention = attention(again)
        self.heads, self.kv_heads, self.size, self.scale, self.cap = heads, kv_heads, size, scale, cap
        self.qkv = Linear(width, (heads + 2 * kv_heads) * size)
        self.out = Linear(heads * size, width)

    def project(self, x_BTD: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, H, T, E), rotated keys and values (B, K, T, E)."""
        heads_BHTE = self.qkv(x_BTD).unflatten(-1, (-1, self.size)).transpose(1, 2)
        qk, v = torch.split(heads_BHTE, [self.heads + self.kv_heads, self.kv_heads], 1)
        q, k = torch.split(rotate(qk, table), [self.heads, self.kv_heads], 1)
        return q, k, v

    def merge(self, y_BHTE: Tensor) -> Tensor:
        y_BTD: Tensor = self.out(y_BHTE.transpose(1, 2).flatten(2))
        return y_BTD

    def forward(self, x_BTD: Tensor, table: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x_BTD, table)
        return self.merge(self.attention(q, k, v, documents_BT, scale=self.scale, cap=self.cap))

    def step(self, x_BTD: Tensor, table: Tensor, kv: Tensor, start: int) -> Tensor:
        """T new positions after `start` known ones, whose keys and values are in `kv` (2, B, K, context, E)."""
        q, k, v = self.project(x_BTD, table)
        return self.merge(cached_attention(q, k, v, kv, start, scale=self.scale, cap=self.cap))


def language_loss(
    logits: Callable[[Tensor], Tensor], x_BTD: Tensor, targets_BT: Tensor, *, z: float, chunk: int
) -> Tensor:
    """`summed_loss` of what `logits` makes of x_BTD; with a `chunk`, of so many tokens at a time.

    The logits of a chunk are forgotten and computed again in the backward pass, so they never stand whole: 2,048 tokens
    of 131,072 ids are 1 GiB in fp32. That adds up in another order. (`F.linear_cross_entropy` has no z-loss.)

    The gradient, not the value, is also that of `z` times the sum of squared logs of the softmax's partition function
    (PaLM, arXiv 2204.02311, with 1e-4), which keeps logits from drifting.
    """

    def part(x: Tensor, targets: Tensor) -> Tensor:
        logits_NV, targets_N = logits(x).flatten(0, -2), targets.flatten()
        nats = summed_loss(logits_NV, targets_N)
        if not z:
            return nats
        squares_N = wide(logits_NV).logsumexp(-1).square()
        return with_auxiliary(nats, z * squares_N.masked_fill(targets_N == IGNORED, 0).sum())

    if not chunk:
        return part(x_BTD, targets_BT)
    rows = zip(torch.split(x_BTD.flatten(0, 1), chunk), torch.split(targets_BT.flatten(), chunk), strict=True)
    parts = [checkpoint(part, x, y, use_reentrant=False, preserve_rng_state=False) for x, y in rows]
    return torch.stack(parts).sum()


class _Auxiliary(torch.autograd.Function):
    """The value of the first, the gradient of the sum of both."""

    @staticmethod
    def forward(ctx: Any, nats: Tensor, auxiliary: Tensor) -> Tensor:
        return nats.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0]


def with_auxiliary(nats: Tensor, auxiliary: Tensor) -> Tensor:
    """`nats`, whose backward pass goes through `auxiliary` as well.

    So whoever asks a model for its loss gets the cross-entropy alone, and training has the gradient of both.
    """
    result: Tensor = _Auxiliary.apply(nats, auxiliary)  # type: ignore[no-untyped-call]
    return result


def summed_loss(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """The sum of cross-entropy in nats over the targets that are not -100: a fp32 scalar.

    The softmax is in fp32. On CPU in chunks of rows, because a conversion of all logits at once does not fit the
    cache: 23 ms against 54 at 2,048 x 4,096. (A softmax in bf16 takes 12, and a loss with two digits.)
    """
    rows = ROWS if logits_NV.device.type == "cpu" else max(1, logits_NV.size(0))
    parts = zip(torch.split(logits_NV, rows), torch.split(targets_N, rows), strict=True)
    return torch.stack([F.cross_entropy(wide(x), y, reduction="sum", ignore_index=IGNORED) for x, y in parts]).sum()
