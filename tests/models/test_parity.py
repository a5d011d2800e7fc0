"""Our Llama and GPT-2 against transformers' on random weights: logits, loss and gradients, fp32, to 1e-5 relative.

`-s` prints the largest differences: the table in train/models/README.md.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from train.config import Model
from train.models.build import build
from train.models.hf import to_hf
from train.models.hf_config import to_hf_config
from train.shapes import GPT2, Llama

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CPU = torch.device("cpu")
VOCAB = 250  # of 256 rows
BOUND = 1e-5  # 2^-24, times some ten roundings one after the other, in sums of some hundred terms

LLAMA: dict[str, Any] = {"context": 160, "layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "ffn": 96}
# 64 tokens before the slowing: of the 8 pairs of a head 4 turn as before, 3 slower, 1 in between
SLOWED: dict[str, Any] = {"rope_base": 500_000.0, "rope_factor": 8.0, "rope_context": 64}
SHAPES = {
    "llama, tied": Llama(**LLAMA, tied=True),
    "llama, own keys for each head": Llama(**{**LLAMA, "kv_heads": 4}, tied=False),
    "llama, another rotation": Llama(**LLAMA, rope_base=500.0),
    "llama 3.1": Llama(**LLAMA, **SLOWED, tied=False),
    "gpt2": GPT2(context=160, layers=2, width=64, heads=4, ffn=256),
    "gpt2, narrow": GPT2(context=160, positions=200, layers=3, width=48, heads=2, ffn=80, norm_eps=1e-3),
}


def theirs(shape: Model) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    config = to_hf_config(shape, VOCAB)
    if isinstance(shape, GPT2):
        model: torch.nn.Module = GPT2LMHeadModel(GPT2Config(**config))
    else:
        model = LlamaForCausalLM(LlamaConfig(**config))
    return model.eval()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("name", SHAPES)
def test_logits_loss_and_gradients_equal_transformers(name: str) -> None:
    shape = SHAPES[name]
    ours, original = build(shape, VOCAB, seed=1, device=CPU), theirs(shape)
    torch.manual_seed(0)
    for parameter in ours.parameters():
        if parameter.dim() == 1:  # gains other than 1 and biases other than 0, so that an exchanged one shows
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    missing, unexpected = original.load_state_dict(to_hf(shape, VOCAB, ours.state_dict()), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    original.tie_weights()  # type: ignore[operator]

    ids = torch.randint(0, VOCAB, (2, shape.context + 1))
    tokens, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, :7] = -100
    logits, expected = ours(tokens), original(tokens).logits
    assert logits.shape == expected.shape
    right = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    loss = ours(tokens, targets)
    torch.autograd.backward([right, loss])

    found = to_hf(shape, VOCAB, {name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    gradients = {name: p.grad for name, p in original.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    worst = max((distance(gradient, gradients[name]), name) for name, gradient in found.items())
    numbers = (distance(logits, expected), distance(loss, right), worst[0])
    print(f"\n| {name} | " + " | ".join(f"{number:.1e}" for number in numbers) + " |")
    assert max(numbers) < BOUND, worst


def test_the_slowed_rotation_is_another_one() -> None:
    """Were it not, the comparison above would show nothing."""
    tables = [build(SHAPES[name], VOCAB, seed=1, device=CPU).get_buffer("rotary") for name in ("llama 3.1",)]
    plain = Llama(**LLAMA, rope_base=SLOWED["rope_base"])
    tables.append(build(plain, VOCAB, seed=1, device=CPU).get_buffer("rotary"))
    same = (tables[0] == tables[1]).all(0).all(0)
    assert 0 < same.sum() < same.numel()
