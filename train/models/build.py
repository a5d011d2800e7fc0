"""From a configuration to a model whose weights depend on the seed and their own names alone.

Allocated on its device (or on the meta device: shapes, no storage), then filled once: every parameter draws
from its own CPU generator, keyed by (seed, name). So neither the order of construction, nor the device, nor how many
ranks there are, changes one bit; and a parameter keeps its values when another one is added beside it.

A family says how wide each matrix is drawn (`LanguageModel.std`); gains of norms start at 1, biases at 0. The rows that
round the vocabulary up are 0 for ever: no loss sees their logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from train.checks import choice, require
from train.config import Model
from train.models import gpt2, grok, llama
from train.models.language import LanguageModel

VOCABULARY = ("embedding.weight", "head.weight")  # matrices with a row for each token id
FAMILIES: dict[str, Callable[[Any, int], LanguageModel]] = {  # each takes its own config
    "gpt2": gpt2.GPT2,
    "grok": grok.Grok,
    "llama": llama.Llama,
}


def build(config: Model, vocab: int, *, seed: int, device: torch.device, separator: int | None = None) -> LanguageModel:
    """The model of `config` for `vocab` token ids (or `model.vocab`), initialised from `seed`, on `device`.

    On the meta device it has shapes and no values. Raises Refused for a family that is not in FAMILIES, or too few ids.
    `separator`: the id that no attention goes across, if any.
    """
    choice(config.family, "model.family", tuple(FAMILIES))
    known = config.vocab or vocab
    why = f"{known} are fewer than the tokenizer's {vocab} ids: choose another data.tokenizer"
    require(vocab <= known, "model.vocab", why)
    with device:
        model = FAMILIES[config.family](config, known)
    model.separator = separator
    if device.type != "meta":
        initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: LanguageModel, seed: int) -> None:
    """Fill every parameter and table of `model`, in place."""
    model.fill_tables()
    for name, parameter in model.named_parameters():  # a tied matrix comes once, as embedding.weight
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        parameter.copy_(initial(name, parameter.shape, seed, model.std(name, parameter.shape)))
        if name in VOCABULARY:
            parameter[model.vocab :] = 0


def initial(name: str, shape: torch.Size, seed: int, std: float) -> Tensor:
    """The first value of the matrix called `name`: fp32, on the CPU."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)
