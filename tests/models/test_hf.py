"""Weights and configuration go to transformers' layout and come back bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from train.checks import Refused
from train.models.build import build
from train.models.hf import from_hf, to_hf
from train.models.hf_config import from_hf_config, to_hf_config
from train.shapes import Llama

SHAPE = Llama(context=32, layers=3, width=32, heads=4, kv_heads=2, ffn=48, rope_base=500.0, norm_eps=1e-6)
UNTIED = Llama(context=32, layers=1, width=32, heads=4, kv_heads=1, ffn=48, tied=False)


@pytest.mark.parametrize("shape", [SHAPE, UNTIED])
def test_round_trip_is_bitwise(shape: Llama) -> None:
    weights = build(shape, 100, seed=3, device=torch.device("cpu")).state_dict()
    there = to_hf(shape, 100, weights)
    back = from_hf(shape, there)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert from_hf_config(to_hf_config(shape, 100)) == replace(shape, vocab=100)


def test_names_and_shapes_are_those_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**to_hf_config(UNTIED, 100))).state_dict()
    ours = to_hf(UNTIED, 100, build(UNTIED, 100, seed=0, device=torch.device("meta")).state_dict())
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_a_configuration_of_transformers_own_making_is_read() -> None:
    from transformers import LlamaConfig

    theirs = LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, intermediate_size=96
    )
    shape = from_hf_config(theirs.to_dict())
    assert isinstance(shape, Llama)
    assert (shape.width, shape.heads, shape.kv_heads, shape.layers, shape.ffn) == (64, 4, 2, 3, 96)
    assert (shape.rope_base, shape.norm_eps, shape.tied, shape.vocab) == (10_000.0, 1e-6, False, 32_000)


def test_a_missing_or_odd_weight_is_named() -> None:
    weights = to_hf(SHAPE, 100, build(SHAPE, 100, seed=3, device=torch.device("cpu")).state_dict())
    less = {k: v for k, v in weights.items() if k != "model.layers.2.self_attn.k_proj.weight"}
    with pytest.raises(Refused, match=r"model\.layers\.2\.self_attn\.k_proj\.weight is missing"):
        from_hf(SHAPE, less)
    with pytest.raises(Refused, match=r"surprise is unexpected"):
        from_hf(SHAPE, weights | {"surprise": torch.ones(1)})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mistral"}, "model_type: mistral"),
        ({"attention_bias": True}, "attention_bias: True"),
        ({"head_dim": 128}, "head_dim: 128"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "rope_type: yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type: linear"),
    ],
)
def test_what_our_llama_has_not_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(Refused, match=named):
        from_hf_config({**to_hf_config(SHAPE, 128), **change})
