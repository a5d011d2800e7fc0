"""Weights as transformers names them, and back: LlamaForCausalLM's, GPT2LMHeadModel's; Grok's as xAI published them.

transformers is not imported (its tests do that). The mapping cuts, joins and turns matrices and computes nothing, so a
round trip is bitwise. The rows that round our vocabulary up are zero, and stay here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from train.checks import Refused, require
from train.config import Model
from train.flops import padded_vocab
from train.models.build import VOCABULARY
from train.models.hf_config import to_hf_config
from train.models.language import LanguageModel
from train.shapes import GPT2, Grok, Llama


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter of ours, and what it is in the other layout."""

    ours: str
    theirs: tuple[str, ...]  # the tensors that its rows are those of, in this order
    rows: tuple[int, ...] = ()  # of each, where there are several
    turned: bool = False  # they have inputs before outputs


def _llama(shape: Llama) -> Iterator[Entry]:
    yield Entry("embedding.weight", ("model.embed_tokens.weight",))
    yield Entry("norm.weight", ("model.norm.weight",))
    if not shape.tied:
        yield Entry("head.weight", ("lm_head.weight",))
    keys = shape.kv_heads * (shape.width // shape.heads)
    for i in range(shape.layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        names = tuple(f"{theirs}self_attn.{one}_proj.weight" for one in "qkv")
        yield Entry(ours + "attention.qkv.weight", names, (shape.width, keys, keys))
        yield Entry(ours + "attention.out.weight", (theirs + "self_attn.o_proj.weight",))
        yield Entry(ours + "attention_norm.weight", (theirs + "input_layernorm.weight",))
        yield Entry(ours + "ffn_norm.weight", (theirs + "post_attention_layernorm.weight",))
        for one in ("gate", "up", "down"):
            yield Entry(f"{ours}ffn.{one}.weight", (f"{theirs}mlp.{one}_proj.weight",))


def _gpt2(shape: GPT2) -> Iterator[Entry]:
    yield Entry("embedding.weight", ("transformer.wte.weight",))
    yield Entry("positions.weight", ("transformer.wpe.weight",))
    linear = {"attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "ffn.up": "mlp.c_fc"}
    linear |= {"ffn.down": "mlp.c_proj"}
    for i in range(shape.layers):
        for ours, theirs in linear.items():
            yield Entry(f"blocks.{i}.{ours}.weight", (f"transformer.h.{i}.{theirs}.weight",), turned=True)
            yield Entry(f"blocks.{i}.{ours}.bias", (f"transformer.h.{i}.{theirs}.bias",))
        for ours, theirs in (("attention_norm", "ln_1"), ("ffn_norm", "ln_2")):
            for part in ("weight", "bias"):
                yield Entry(f"blocks.{i}.{ours}.{part}", (f"transformer.h.{i}.{theirs}.{part}",))
    for part in ("weight", "bias"):
        yield Entry(f"norm.{part}", (f"transformer.ln_f.{part}",))


def _grok(shape: Grok) -> Iterator[Entry]:
    """The names of github xai-org/grok-1; inputs come before outputs, the experts of a layer are stacked first."""
    yield Entry("embedding.weight", ("language_model/in_out_embed/embeddings",))
    yield Entry("norm.weight", ("language_model/rms_norm/scale",))
    rows = shape.heads * shape.head_size, *2 * (shape.kv_heads * shape.head_size,)
    norms = ("attention_norm", "attention_end", "experts_norm", "experts_end")
    for i in range(shape.layers):
        ours, theirs = f"blocks.{i}.", f"transformer/decoder_layer_{i}/"
        names = tuple(f"{theirs}multi_head_attention/{one}/w" for one in ("query", "key", "value"))
        yield Entry(ours + "attention.qkv.weight", names, rows, turned=True)
        yield Entry(ours + "attention.out.weight", (theirs + "multi_head_attention/linear/w",), turned=True)
        for number, norm in enumerate(norms):
            yield Entry(f"{ours}{norm}.weight", (f"{theirs}rms_norm{f'_{number}' if number else ''}/scale",))
        yield Entry(ours + "experts.router.weight", (theirs + "router/w",), turned=True)
        for one, name in (("gate", "linear"), ("up", "linear_v"), ("down", "linear_1")):
            yield Entry(f"{ours}experts.{one}", (f"{theirs}moe/{name}/w",), turned=True)


FAMILIES: dict[type[Model], Callable[[Any], Iterator[Entry]]] = {GPT2: _gpt2, Grok: _grok, Llama: _llama}


def entries(shape: Model) -> Iterator[Entry]:
    """How the parameters of this shape are laid out elsewhere."""
    return FAMILIES[type(shape)](shape)


def to_hf(shape: Model, vocab: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict, or our gradients, in the other layout. A tied matrix is there once; most tensors are views.

    `vocab`: the number of token ids, rows of the embedding that count.
    """
    result: dict[str, Tensor] = {}
    for entry in entries(shape):
        whole = weights[entry.ours]
        whole = whole[:vocab] if entry.ours in VOCABULARY else whole
        parts = torch.split(whole, list(entry.rows)) if entry.rows else [whole]
        result |= zip(entry.theirs, (part.mT if entry.turned else part for part in parts), strict=True)
    return result


def from_hf(shape: Model, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the other layout as ours. Raises Refused where a weight is missing or there is one too many."""
    known = list(entries(shape))
    expected = {name for entry in known for name in entry.theirs}
    given = dict(_plain(shape, weights))
    for odd in sorted(given.keys() ^ expected):
        fault = "unexpected" if odd in given else "missing"
        raise Refused("model", f"weights do not match the configuration: {odd} is {fault}")
    result: dict[str, Tensor] = {}
    for entry in known:
        parts = [given[name].mT if entry.turned else given[name] for name in entry.theirs]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if entry.ours in VOCABULARY:
            whole = F.pad(whole, (0, 0, 0, padded_vocab(whole.size(0)) - whole.size(0)))
        result[entry.ours] = whole
    return result


def _plain(shape: Model, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Without what is there twice, or is no weight: a tied matrix under its second name, masks that were once saved."""
    tied = not isinstance(shape, Llama) or shape.tied
    for name, tensor in weights.items():
        if isinstance(shape, GPT2) and not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"  # how GPT-2's own weights were published
        if not (tied and name == "lm_head.weight") and not name.endswith((".attn.bias", ".attn.masked_bias")):
            yield name, tensor


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's safetensors files, one or several with an index. Raises Refused naming the file."""
    index = folder / "model.safetensors.index.json"
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else None
        found: dict[str, Tensor] = {}
        for path in [folder / name for name in names or ["model.safetensors"]]:
            require(path.exists(), str(path), "is missing: only safetensors are read")
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise Refused(str(folder), f"its weights cannot be read ({error})") from None
    return found


@torch.no_grad()
def begin(model: LanguageModel) -> None:
    """Give `model` the weights of the folder that its shape names (`model.path`); where it names none, nothing."""
    if not model.shape.path:
        return
    weights = from_hf(model.shape, read(Path(model.shape.path)))
    fill(model, weights, model.shape.path)


@torch.no_grad()
def fill(model: LanguageModel, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy our state dict into `model`, in fp32. Raises Refused, naming `where`, for a weight of another shape."""
    for name, parameter in model.named_parameters():
        found = tuple(weights[name].shape)
        require(found == parameter.shape, where, f"{name} has {found}, the configuration {tuple(parameter.shape)}")
        parameter.copy_(weights[name])


def write(folder: Path, model: LanguageModel, eot: int) -> None:
    """`config.json` and `model.safetensors` (fp32) of a model, into a folder that is there. `eot` ends a document."""
    weights = to_hf(model.shape, model.vocab, {name: p.detach() for name, p in model.named_parameters()})
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "model.safetensors").chmod(0o644)  # the library makes it its owner's alone
    config = to_hf_config(model.shape, model.vocab) | {"bos_token_id": eot, "eos_token_id": eot}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
