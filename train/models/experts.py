"""A mixture of experts in the place of a feed-forward layer: every token goes to the few that a router chooses for it.

Dropless: an expert takes all tokens that choose it, however many. The places (token, choice) are sorted by expert,
which is a permutation known from integers alone; then each expert multiplies one stretch of rows. On a GPU the
stretches are the groups of grouped matrix products, whose ends stay on the device, so the host never waits to know
them (unmeasured there). On a CPU they are a loop over the experts, as is fastest there.

Every sum has a fixed order, forward and backward: rows are only ever *gathered*, by the permutation or by its inverse,
and the few rows of one token are added as neighbours. Nothing is scattered, so nothing depends on threads.

An expert that nobody chose multiplies zero rows: its gradient is zeros, and never missing.

Shapes: N tokens, E experts, K chosen, D width, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.models.fused import gelu
from train.models.layers import wide

ROWS = 32  # of which an expert's are a multiple, on a CPU in bf16


class Routing(NamedTuple):
    """Where a layer's tokens went, and its auxiliary losses, both of which are means over the tokens."""

    gates_NK: Tensor  # how much each chosen expert counts: its probability among all of them, not renormalised
    chosen_NK: Tensor  # int64
    counts_E: Tensor  # int64: places that each expert has
    balance: Tensor  # (): E times the sum over experts of share of places x mean probability; 1 where even
    z: Tensor  # (): the square of the log of the router's partition function


def told(routing: Routing) -> Tensor:
    """(E + 2,) float64: the counts, the balance loss, the z-loss."""
    return torch.cat([routing.counts_E.double(), torch.stack((routing.balance, routing.z)).detach().double()])


class Router(nn.Module):
    """The probabilities of the experts, in fp32 in any precision, and the likeliest few.

    The losses are those of Switch (arXiv 2101.03961, with K choices a token) and ST-MoE (arXiv 2202.08906).
    """

    def __init__(self, width: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.chosen = chosen

    def forward(self, x_ND: Tensor) -> Routing:
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(wide(x_ND), wide(self.weight))
        probabilities_NE = logits_NE.softmax(-1)
        gates_NK, chosen_NK = probabilities_NE.topk(self.chosen)
        experts = torch.arange(self.weight.size(0), device=x_ND.device)
        counts_E = (chosen_NK.unsqueeze(-1) == experts).sum((0, 1))
        shares_E = counts_E.to(logits_NE.dtype) / chosen_NK.numel()
        balance = experts.numel() * (shares_E * probabilities_NE.mean(0)).sum()
        return Routing(gates_NK, chosen_NK, counts_E, balance, logits_NE.logsumexp(-1).square().mean())


class _Gather(torch.autograd.Function):
    """Rows in another order, each `copies` times; its backward pass gathers too, where autograd's own would scatter.

    Place p of the result is row order[p] // copies; row r · copies + c went to place inverse[r · copies + c].
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x_ND.index_select(0, order // copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        rows = gradients[0].index_select(0, inverse)
        return rows.view(-1, ctx.copies, rows.size(1)).sum(1) if ctx.copies > 1 else rows, None, None, None


class Experts(nn.Module):
    """Σ over the chosen experts of probability · down(gelu(gate x) · up x)."""

    def __init__(self, width: int, ffn: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.router = Router(width, experts, chosen)
        self.gate = nn.Parameter(torch.empty(experts, ffn, width))
        self.up = nn.Parameter(torch.empty(experts, ffn, width))
        self.down = nn.Parameter(torch.empty(experts, width, ffn))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.flatten(0, -2)
        routing: Routing = self.router(x_ND)
        device = x_BTD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BTD.dtype
        weights = [weight.to(dtype) for weight in (self.gate, self.up, self.down)]
        order = routing.chosen_NK.flatten().argsort(stable=True)
        inverse = order.argsort()
        rows: Tensor = _Gather.apply(x_ND.to(dtype), order, inverse, self.router.chosen)  # type: ignore[no-untyped-call]
        if device == "cpu" and not torch.compiler.is_compiling():
            rows = in_turn(rows, routing.counts_E.tolist(), *weights)
        else:
            rows = grouped(rows, routing.counts_E, *weights)
        rows = _Gather.apply(rows, inverse, order, 1)  # type: ignore[no-untyped-call]
        gates_NK = routing.gates_NK
        y_ND = (rows.view(*gates_NK.shape, -1) * gates_NK.unsqueeze(-1)).sum(1)
        return y_ND.view_as(x_BTD), routing


def in_turn(rows: Tensor, counts: list[int], gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The experts one after the other: `counts[e]` rows each, in order. `gate`, `up` (E, F, D), `down` (E, D, F).

    In bf16 each expert's rows are made a multiple of 32 with zeros. oneDNN compiles a product for each number of rows
    that it has not met of late, and routing hardly ever repeats one: the products took twice as long without.
    """
    unit = ROWS if rows.dtype == torch.bfloat16 else 1
    parts = [F.pad(x, (0, 0, 0, -x.size(0) % unit)) if x.size(0) % unit else x for x in torch.split(rows, counts)]
    weights = zip(parts, gate.unbind(), up.unbind(), down.unbind(), strict=True)
    parts = [F.linear(gelu(F.linear(x, g)) * F.linear(x, u), d) for x, g, u, d in weights]
    return torch.cat([y[:count] for y, count in zip(parts, counts, strict=True)])


def grouped(rows: Tensor, counts_E: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same as three grouped products, whose groups end where the counts say: the host does not need to know."""
    ends = counts_E.cumsum(0).to(torch.int32)
    hidden = gelu(F.grouped_mm(rows, gate.mT, offs=ends))
    return F.grouped_mm(hidden * F.grouped_mm(rows, up.mT, offs=ends), down.mT, offs=ends)


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Routing]]:
    """What the routers of `model` do, appended in the order of its layers; a model without routers adds nothing."""
    seen: list[Routing] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    handles = [router.register_forward_hook(lambda _, __, routing: seen.append(routing)) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
