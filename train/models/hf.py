"""Our Llama's weights and configuration as transformers' LlamaForCausalLM has them, and back.

Pure functions of dictionaries: transformers is not imported (its tests do that). The mapping cuts and joins rows and
copies nothing else, so a round trip is bitwise. The padding rows of the vocabulary are exported with the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from train.config import Llama, Refused
from train.flops import padded_vocab

BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.out": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
QKV = ("q_proj", "k_proj", "v_proj")


def _names(shape: Llama) -> dict[str, str]:
    """Our name -> transformers' name, for the weights that map one to one."""
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not shape.tied:
        names["head.weight"] = "lm_head.weight"
    for i in range(shape.layers):
        names |= {f"blocks.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in BLOCK.items()}
    return names


def _qkv(i: int) -> tuple[str, list[str]]:
    return f"blocks.{i}.attention.qkv.weight", [f"model.layers.{i}.self_attn.{name}.weight" for name in QKV]


def to_hf(shape: Llama, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict as transformers'. A tied matrix is there once, as the embedding; tensors are views."""
    result = {theirs: weights[ours] for ours, theirs in _names(shape).items()}
    size = shape.width // shape.heads
    rows = [shape.width, shape.kv_heads * size, shape.kv_heads * size]
    for i in range(shape.layers):
        ours, theirs = _qkv(i)
        result |= dict(zip(theirs, torch.split(weights[ours], rows), strict=True))
    return result


def from_hf(shape: Llama, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' state dict as ours. Raises Refused where a weight is missing or there is one too many."""
    names = _names(shape)
    expected = {*names.values(), *(name for i in range(shape.layers) for name in _qkv(i)[1])}
    given = set(weights) - ({"lm_head.weight"} if shape.tied else set())
    if given != expected:
        odd = sorted(given ^ expected)
        raise Refused("model", f"weights do not match the configuration: {odd[0]} is {_fault(odd[0], given)}")
    result = {ours: weights[theirs] for ours, theirs in names.items()}
    for i in range(shape.layers):
        ours, theirs = _qkv(i)
        result[ours] = torch.cat([weights[name] for name in theirs])
    return result


def _fault(name: str, given: set[str]) -> str:
    return "unexpected" if name in given else "missing"


def to_hf_config(shape: Llama, vocab: int) -> dict[str, Any]:
    """What transformers reads from `config.json`; the base of the rotation in the words of versions 4 and 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": padded_vocab(vocab),
        "max_position_embeddings": shape.context,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.width // shape.heads,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
    }


def from_hf_config(config: Mapping[str, Any]) -> tuple[Llama, int]:
    """The shape and the vocabulary of a `config.json`. Raises Refused for what our Llama has not."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads, width = config["num_attention_heads"], config["hidden_size"]
    asked = {
        "model_type": (config["model_type"], "llama"),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "head_dim": (config.get("head_dim") or width // heads, width // heads),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
        "vocab_size": (config["vocab_size"], padded_vocab(config["vocab_size"])),
    }
    for key, (found, supported) in asked.items():
        if found != supported:
            raise Refused(key, f"{found} in this config.json is not supported: only {supported} is")
    shape = Llama(
        context=config["max_position_embeddings"],
        layers=config["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        ffn=config["intermediate_size"],
        rope_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        norm_eps=config["rms_norm_eps"],
        tied=bool(config.get("tie_word_embeddings", False)),
    )
    return shape, int(config["vocab_size"])
