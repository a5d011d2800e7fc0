"""`colossus sample`: continue a prompt with a run's model."""

from __future__ import annotations

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
    tokens: int = TOKENS,
    count: int = 1,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
) -> list[str]:
    """`count` texts: the prompt and what the model makes of it, up to the end of the document if it comes."""
    ids = tokenizer.encode(prompt) if prompt else [tokenizer.eot]  # the end of a document begins one
    generator = torch.Generator().manual_seed(seed)
    rows = generate(
        model,
        ids,
        count=count,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    ).tolist()
    return [prompt + tokenizer.decode(row[: row.index(tokenizer.eot)] if tokenizer.eot in row else row) for row in rows]


def sample(config: Sample) -> int:
    on = trained.device(config.accelerator)
    run = trained.load(locate(config.run), config.step, on)
    texts = continue_text(
        run.model,
        run.tokenizer,
        config.prompt,
        tokens=config.tokens,
        count=config.count,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )
    print("\n────\n".join(texts))
    return 0
