"""`colossus sample`: continue a prompt with a run's model."""

from __future__ import annotations

from typing import Any

import torch

from train import trained
from train.commands import Sample
from train.data.tokenizer import Tokenizer
from train.folder import locate
from train.generate import generate
from train.models.language import LanguageModel

TOKENS = 120  # of the sample at the end of a run


def continue_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    seed: int = 0,
    tokens: int = TOKENS,
    temperature: float = 0.8,
    top_p: float = 0.95,
    **options: Any,
) -> list[str]:
    """The prompt and what the model makes of it, up to the end of the document if it comes: as often as `count`.

    `options` are further ones of `generate`.
    """
    ids = tokenizer.encode(prompt) if prompt else [tokenizer.eot]  # the end of a document begins one
    generator = torch.Generator().manual_seed(seed)
    drawn = generate(model, ids, tokens=tokens, temperature=temperature, top_p=top_p, generator=generator, **options)
    rows = drawn.tolist()
    return [prompt + tokenizer.decode(row[: row.index(tokenizer.eot)] if tokenizer.eot in row else row) for row in rows]


def sample(config: Sample) -> int:
    on = trained.device(config.accelerator)
    run = trained.load(locate(config.run), config.step, on)
    options = {key: getattr(config, key) for key in ("seed", "tokens", "temperature", "top_p", "top_k", "count")}
    texts = continue_text(run.model, run.tokenizer, config.prompt, **options)
    print("\n────\n".join(texts))
    return 0
