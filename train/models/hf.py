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

BLOCK = {  # our name -> transformers', or the three whose rows are those of one matrix of ours
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out": ["self_attn.o_proj"],
    "ffn_norm": ["post_attention_layernorm"],
    "ffn.gate": ["mlp.gate_proj"],
    "ffn.up": ["mlp.up_proj"],
    "ffn.down": ["mlp.down_proj"],
}
SHAPE = {
    "context": "max_position_embeddings",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def _names(shape: Llama) -> dict[str, list[str]]:
    names = {"embedding.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    if not shape.tied:
        names["head.weight"] = ["lm_head.weight"]
    for i in range(shape.layers):
        for ours, theirs in BLOCK.items():
            names[f"blocks.{i}.{ours}.weight"] = [f"model.layers.{i}.{name}.weight" for name in theirs]
    return names


def to_hf(shape: Llama, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict as transformers'. A tied matrix is there once, as the embedding; tensors are views."""
    rows = shape.kv_heads * (shape.width // shape.heads)
    result: dict[str, Tensor] = {}
    for ours, theirs in _names(shape).items():
        parts = torch.split(weights[ours], [shape.width, rows, rows]) if len(theirs) == 3 else [weights[ours]]
        result |= dict(zip(theirs, parts, strict=True))
    return result


def from_hf(shape: Llama, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' state dict as ours. Raises Refused where a weight is missing or there is one too many."""
    names = _names(shape)
    given = set(weights) - ({"lm_head.weight"} if shape.tied else set())
    for odd in sorted(given ^ {name for theirs in names.values() for name in theirs}):
        fault = "unexpected" if odd in given else "missing"
        raise Refused("model", f"weights do not match the configuration: {odd} is {fault}")
    parts = {ours: [weights[name] for name in theirs] for ours, theirs in names.items()}
    return {ours: torch.cat(found) if len(found) > 1 else found[0] for ours, found in parts.items()}


def to_hf_config(shape: Llama, vocab: int) -> dict[str, Any]:
    """What transformers reads from `config.json`; the base of the rotation in the words of versions 4 and 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        **FIXED,
        **{theirs: getattr(shape, ours) for ours, theirs in SHAPE.items()},
        "vocab_size": padded_vocab(vocab),
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.width // shape.heads,
        "rope_theta": shape.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "float32",
    }


def from_hf_config(config: Mapping[str, Any]) -> tuple[Llama, int]:
    """The shape and the vocabulary of a `config.json`. Raises Refused for what our Llama has not."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    shape = {ours: config[theirs] for ours, theirs in SHAPE.items()}
    size, vocab = shape["width"] // shape["heads"], int(config["vocab_size"])
    asked = {key: (config.get(key, supported), supported) for key, supported in FIXED.items()}
    asked["head_dim"] = (config.get("head_dim") or size, size)
    asked["rope_type"] = (rope.get("rope_type", rope.get("type", "default")), "default")
    asked["vocab_size"] = (vocab, padded_vocab(vocab))
    for key, (found, supported) in asked.items():
        if found != supported:
            raise Refused(key, f"{found} in this config.json is not supported: only {supported} is")
    return Llama(
        **shape,
        kv_heads=config.get("num_key_value_heads") or shape["heads"],
        rope_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        tied=bool(config.get("tie_word_embeddings", False)),
    ), vocab
