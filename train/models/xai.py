"""Weights of Grok-1's published code (github xai-org/grok-1, Apache-2.0) in an .npz, with what it computes from them.

The file's keys: `w:<path>`, a weight under the published name, inputs before outputs, the experts of a layer stacked
first (`moe/linear` goes through GELU, `moe/linear_v` does not, `moe/linear_1` comes after both); `config`, JSON with

    vocab  d (width)  hd (head size)  hq hkv (query and key heads)  L (layers)  wide (widening)  k (experts chosen)
    emb_mult  out_mult  attn_mult (multipliers of embeddings, logits and attention scores)

and `tokens` (B, T), `logits` (B, T, vocab). How many experts there are is read from the router. Weights may have any
floating type; here they are fp32.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.checks import Refused
from train.models.build import build
from train.models.hf import fill, from_hf
from train.models.language import LanguageModel
from train.shapes import Grok

PREFIX = "w:"  # of the keys that are weights
KEYS = {  # of `config` -> ours
    "d": "width",
    "hd": "head_size",
    "hq": "heads",
    "hkv": "kv_heads",
    "L": "layers",
    "wide": "widening",
    "k": "chosen",
    "emb_mult": "embedding_multiplier",
    "out_mult": "output_multiplier",
    "attn_mult": "attention_multiplier",
}


@dataclass(frozen=True, slots=True)
class Published:
    """A model with published weights, and what the published code answers."""

    model: LanguageModel  # in eval mode, fp32, on the CPU
    tokens: Tensor  # (B, T) int64
    logits: Tensor  # (B, T, vocab) fp32


def load_npz(path: str | Path) -> Published:
    """Read such a file. Raises Refused for one that is none, or whose weights are not those of its configuration.

    >>> golden = load_npz("tests/golden/grok_a.npz")
    >>> (golden.model(golden.tokens) - golden.logits).abs().max()
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {key: file[key] for key in file.files}
        config = json.loads(str(arrays["config"]))
        tokens = torch.from_numpy(arrays["tokens"]).long()
        logits = torch.from_numpy(arrays["logits"]).float()
        experts = int(arrays[f"{PREFIX}transformer/decoder_layer_0/router/w"].shape[1])
        shape = shape_of(config, context=tokens.size(1), experts=experts)
        vocab = int(config["vocab"])
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise Refused(str(path), f"holds no weights of Grok-1's code ({type(error).__name__}: {error})") from None
    weights = {
        key.removeprefix(PREFIX): torch.from_numpy(array).float()
        for key, array in arrays.items()
        if key.startswith(PREFIX)
    }
    model = build(shape, vocab, seed=0, device=torch.device("cpu"))
    fill(model, from_hf(shape, weights), str(path))
    return Published(model.eval(), tokens, logits)


def shape_of(config: dict[str, Any], *, context: int, experts: int) -> Grok:
    """The shape that such a `config` describes, for at least `context` tokens."""
    shape = {ours: config[theirs] for theirs, ours in KEYS.items()}
    return Grok(**shape, context=max(2, context), experts=experts, vocab=int(config["vocab"]))
