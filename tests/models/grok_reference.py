"""Grok-1 once more, written from the facts that are published of it, as plainly as it goes: what ours is compared with.

Every expert computes every token, and those that were not chosen count for nothing; no cache, no blocks, no
permutations, and no code of `train/`. In the precision of the weights, under their published names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Answer(NamedTuple):
    logits: Tensor  # (B, T, vocab)
    balance: Tensor  # (): the load-balancing loss, summed over layers
    z: Tensor  # (): the router's z-loss, summed over layers
    counts: Tensor  # (L, E): how often each expert was chosen


def answer(config: dict[str, Any], w: dict[str, Tensor], tokens: Tensor) -> Answer:
    table = w["language_model/in_out_embed/embeddings"]
    x = table[tokens] * config["emb_mult"]
    balance, z, counts = x.new_zeros(()), x.new_zeros(()), []
    for i in range(config["L"]):
        layer = {k.split("/", 2)[2]: v for k, v in w.items() if k.startswith(f"transformer/decoder_layer_{i}/")}
        y = attention(config, layer, norm(x, layer["rms_norm/scale"]))
        x = x + norm(y, layer["rms_norm_1/scale"])
        h = norm(x, layer["rms_norm_2/scale"])
        logits = h @ layer["router/w"]
        p = logits.softmax(-1)
        better = (p.unsqueeze(-1) < p.unsqueeze(-2)).sum(-1)  # how many experts are likelier
        chosen = better < config["k"]
        experts = [
            (gelu(h @ layer["moe/linear/w"][e]) * (h @ layer["moe/linear_v/w"][e])) @ layer["moe/linear_1/w"][e]
            for e in range(p.size(-1))
        ]
        y = torch.stack([p[..., e, None] * chosen[..., e, None] * one for e, one in enumerate(experts)]).sum(0)
        x = x + norm(y, layer["rms_norm_3/scale"])
        counts.append(chosen.flatten(0, 1).sum(0))
        share = chosen.flatten(0, 1).to(p.dtype).mean(0) / config["k"]
        balance = balance + p.size(-1) * (share * p.flatten(0, 1).mean(0)).sum()
        z = z + logits.exp().sum(-1).log().square().mean()
    x = norm(x, w["language_model/rms_norm/scale"])
    return Answer(x @ table.T * config["out_mult"], balance, z, torch.stack(counts))


def norm(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale


def gelu(x: Tensor) -> Tensor:
    y: Tensor = x / 2 * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())
    return y


def rotation(context: int, size: int) -> tuple[Tensor, Tensor]:
    """cos and sin, (context, size/2), float64."""
    frequency = 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(context, dtype=torch.float64)[:, None] * frequency
    return angle.cos(), angle.sin()


def attention(config: dict[str, Any], layer: dict[str, Tensor], x: Tensor) -> Tensor:
    cos, sin = (table.to(x.dtype) for table in rotation(x.size(1), config["hd"]))

    def heads(name: str, number: int, turn: bool) -> list[Tensor]:
        parts = list((x @ layer[f"multi_head_attention/{name}/w"]).chunk(number, -1))
        if not turn:
            return parts
        halves = [part.chunk(2, -1) for part in parts]
        return [torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in halves]

    hq, hkv = config["hq"], config["hkv"]
    queries, keys, values = heads("query", hq, True), heads("key", hkv, True), heads("value", hkv, False)
    past = torch.ones(x.size(1), x.size(1)).tril().bool()
    results = []
    for number, q in enumerate(queries):
        shared = number // (hq // hkv)
        scores = 30 * ((q @ keys[shared].mT) * config["attn_mult"] / 30).tanh()
        results.append(torch.where(past, scores, -torch.inf).softmax(-1) @ values[shared])
    joined: Tensor = torch.cat(results, -1) @ layer["multi_head_attention/linear/w"]
    return joined
