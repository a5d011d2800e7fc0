"""Continuing a prompt: one forward pass over it, then one position at a time on cached keys and values.

A context that is full is not slid: rotary positions are absolute in the cache, so dropping the oldest key would
move every other. Instead the cache is rebuilt from the last half of the context, and generation goes on from
there. That costs one pass over T/2 positions every T/2 tokens, and the text before it is forgotten.

Sampling is done in fp32 on the CPU, from the caller's CPU generator: the same seed gives the same draws on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from train.models.language import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    count: int = 1,
    tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    beat: Callable[[], object] = lambda: None,
) -> Tensor:
    """`count` continuations of `prompt`, `tokens` long each: ids (count, tokens), int64, on the CPU.

    Of a prompt longer than the context its end is used. `temperature` 0 takes the likeliest token; `top_k` 0 and
    `top_p` 1 are off. `beat` is called with every token. Raises ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("an empty prompt: give at least the end-of-document token")
    context, device = model.shape.context, next(model.parameters()).device
    ids_BT = torch.tensor(prompt, dtype=torch.int64).expand(count, -1)
    cache, new_BT = model.cache(count), ids_BT[:, -context:]
    for _ in range(tokens):
        beat()
        if cache.length + new_BT.size(1) > context:
            cache, new_BT = model.cache(count), ids_BT[:, -(context // 2) :]
        new_BT = choose(model.step(new_BT.to(device), cache), temperature, top_k, top_p, generator)
        ids_BT = torch.cat((ids_BT, new_BT), 1)
    return ids_BT[:, len(prompt) :]


def choose(
    logits_BV: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """One token a row, (B, 1): drawn from what `probabilities` leaves, or the likeliest at temperature 0."""
    logits_BV = logits_BV.float().cpu()
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # nothing overflows
    return torch.multinomial(probabilities(logits_BV, top_k, top_p), 1, generator=generator)


def probabilities(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """softmax, cut to the `top_k` likeliest tokens, then to the smallest set of them that reaches `top_p`.

    Nucleus sampling (arXiv 1904.09751): the token that crosses `top_p` is in the set, so the likeliest always is.
    Rows sum to 1. Equal logits are ordered by token id.
    """
    order = logits_BV.argsort(dim=-1, descending=True, stable=True)
    p = logits_BV.gather(-1, order).softmax(-1)
    if top_k:
        p[:, top_k:] = 0
        p /= p.sum(-1, keepdim=True)
    if top_p < 1:
        p[:, 1:][(p.cumsum(-1) - p)[:, 1:] >= top_p] = 0
        p /= p.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter(-1, order, p)
