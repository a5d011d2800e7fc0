"""transformers' `config.json` as a shape of ours, and back (no torch: it is read before a run is checked).

Only what can be computed exactly is read: a field that would change the result, with a value that our family has not,
is refused by name. Grok-1 has no class in transformers; its `config.json` has the words of the other two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from train.checks import Refused, place, require
from train.config import Model, TokenizerKind, Train
from train.shapes import GPT2, HF, Grok, Llama

DECODER = {
    "context": "max_position_embeddings",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
}
WORDS: dict[str, tuple[type[Model], dict[str, str]]] = {  # model_type -> our shape; our key -> their key
    "gpt2": (
        GPT2,
        {
            "context": "n_positions",
            "layers": "n_layer",
            "width": "n_embd",
            "heads": "n_head",
            "ffn": "n_inner",
            "norm_eps": "layer_norm_epsilon",
        },
    ),
    "llama": (Llama, {**DECODER, "ffn": "intermediate_size", "norm_eps": "rms_norm_eps"}),
    "grok-1": (
        Grok,
        {
            **DECODER,
            "kv_heads": "num_key_value_heads",
            "head_size": "head_dim",
            "experts": "num_experts",
            "chosen": "num_experts_per_tok",
            "widening": "widening_factor",
            "rope_base": "rope_theta",
            "norm_eps": "rms_norm_eps",
            "embedding_multiplier": "embedding_multiplier_scale",
            "output_multiplier": "output_multiplier_scale",
            "attention_multiplier": "attn_output_multiplier",
            "attention_cap": "max_attn_value",
            "balance": "router_aux_loss_coef",
            "router_z": "router_z_loss_coef",
        },
    ),
}
FIXED: dict[str, dict[str, Any]] = {  # what is said, and the only value that is read
    "gpt2": {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "grok-1": {"tie_word_embeddings": True},
}
ROPE = {
    "rope_factor": "factor",
    "rope_low": "low_freq_factor",
    "rope_high": "high_freq_factor",
    "rope_context": "original_max_position_embeddings",
}


def to_hf_config(shape: Model, vocab: int) -> dict[str, Any]:
    """What transformers reads from `config.json`; the rotation in the words of its versions 4 and 5.

    `vocab`: the number of token ids where the shape does not say.
    """
    kind = next(name for name, (family, _) in WORDS.items() if isinstance(shape, family))
    result = {theirs: getattr(shape, ours) for ours, theirs in WORDS[kind][1].items()}
    result = {"model_type": kind, **FIXED[kind], **result, "vocab_size": shape.vocab or vocab, "torch_dtype": "float32"}
    result |= {"bos_token_id": None, "eos_token_id": None}
    match shape:
        case GPT2():
            pdrop = {"resid_pdrop": shape.dropout, "embd_pdrop": shape.dropout, "attn_pdrop": 0.0}
            places = shape.positions or shape.context
            return result | pdrop | {"architectures": ["GPT2LMHeadModel"], "n_positions": places}
        case Llama():
            rope: dict[str, Any] = {"rope_type": "default"}
            if shape.rope_factor != 1:
                rope = {"rope_type": "llama3", **{theirs: getattr(shape, ours) for ours, theirs in ROPE.items()}}
                result["rope_scaling"] = rope
            return result | {
                "architectures": ["LlamaForCausalLM"],
                "num_key_value_heads": shape.kv_heads,
                "head_dim": shape.width // shape.heads,
                "rope_theta": shape.rope_base,
                "rope_parameters": {**rope, "rope_theta": shape.rope_base},
                "tie_word_embeddings": shape.tied,
            }
        case Grok():
            scales = {"embedding_multiplier_scale": shape.embedding_scale, "attn_output_multiplier": shape.score_scale}
            return result | scales | {"intermediate_size": shape.ffn}
    raise AssertionError(kind)


def from_hf_config(config: Mapping[str, Any]) -> Model:
    """The shape in a `config.json`, its vocabulary included. Raises Refused for what our families have not."""
    kind = config.get("model_type")
    supported = ", ".join(WORDS)
    require(kind in WORDS, "model_type", f"{kind} in this config.json is not supported: only {supported} are")
    family, words = WORDS[str(kind)]
    for missing in sorted({*words.values(), "vocab_size"} - {*config, "n_inner"}):
        raise Refused(missing, "is missing in this config.json")
    for key, only in FIXED[str(kind)].items():
        _only(key, config.get(key, only), only)
    shape: dict[str, Any] = {ours: config.get(theirs) for ours, theirs in words.items()}
    shape["vocab"] = int(config["vocab_size"])
    if family is GPT2:
        shape["ffn"] = shape["ffn"] or 4 * shape["width"]
    if family is Llama:
        shape |= _llama(config, shape)
    return family(**shape)


def _only(key: str, found: Any, supported: Any) -> None:
    why = f"{found} in this config.json is not supported: only {supported} is"
    require(found == supported, key, why)


def _llama(config: Mapping[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    """What transformers has said in several ways over its versions."""
    size = shape["width"] // shape["heads"]
    _only("head_dim", config.get("head_dim") or size, size)
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in ("default", "llama3"), "rope_type", f"{kind} in this config.json is not supported: only llama3 is")
    return {
        "kv_heads": config.get("num_key_value_heads") or shape["heads"],
        "rope_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        "tied": bool(config.get("tie_word_embeddings", False)),
        **({ours: rope[theirs] for ours, theirs in ROPE.items()} if kind == "llama3" else {}),
    }


def _folder(path: str) -> Path:
    """A folder here, or else the snapshot of OWNER/NAME[@REVISION] on the Hub, fetched where it is not in its cache."""
    folder = place(path, "model.path")
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", path):
        return folder.resolve()
    name, _, revision = path.partition("@")
    try:
        import huggingface_hub as hub  # an extra; imported only where it is asked for

        found = hub.snapshot_download(
            name, revision=revision or None, allow_patterns=["*.json", "*.safetensors"], ignore_patterns="*/*"
        )
    except ImportError:
        why = "is no folder here; to look it up on the Hub: pip install -e '.[hf]' in a checkout"
        raise Refused("model.path", f"{path} {why}") from None
    except Exception as error:  # the Hub's client has dozens, for network, rights and names
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise Refused("model.path", f"{path} is no folder here, and the Hub does not give it: {line}") from None
    return Path(found)


def adopt(config: Train) -> None:
    """Let `model=hf` be the family that its folder holds, in place; its tokenizer stands where one would be trained.

    Of a name on the Hub the folder is the snapshot of one commit, which the run keeps to.

    Raises Refused, naming the key or the file.
    """
    asked = config.model
    if not isinstance(asked, HF):
        return
    folder = _folder(asked.path)
    try:
        found = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise Refused("model.path", f"{folder}/config.json cannot be read ({error.strerror}): name a folder") from None
    except ValueError as error:
        raise Refused("model.path", f"{folder}/config.json is no JSON ({error})") from None
    shape = from_hf_config(found)
    context = asked.context or shape.context
    require(context <= shape.context, "model.context", f"{context} is more than that model's {shape.context}")
    some = any(folder.glob("*.safetensors"))
    require(some, "model.path", f"{folder} holds no *.safetensors, and nothing else is read")
    if isinstance(shape, GPT2):
        shape.positions = shape.context  # all of them are kept, and go out again
    taken = {key.name: getattr(asked, key.name) for key in fields(Model) if key.name not in ("family", "vocab")}
    config.model = replace(shape, **taken | {"context": context, "path": str(folder)})
    tokenizer, own = config.data.tokenizer, folder / "tokenizer.json"
    if tokenizer.kind is TokenizerKind.bpe and own.exists():
        tokenizer = replace(tokenizer, kind=TokenizerKind.file, path=str(own))
    if tokenizer.kind is TokenizerKind.file:  # how many ids it has is known when it is read; not more than the model
        tokenizer = replace(tokenizer, vocab=shape.vocab)
    config.data.tokenizer = tokenizer
