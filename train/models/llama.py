"""Llama: a decoder of pre-normalised attention and SwiGLU blocks (arXiv 2302.13971, 2307.09288).

The model is single-device code. It returns the *sum* of the loss over its tokens, because a sum is what can be
added up in any grouping of micro-batches and divided once, by the step's global token count.

Query, key and value are one matrix, rows in that order, each in the layout of transformers (rotary pairs are the two
halves of a head), so `hf.py` maps weights by cutting, never by permuting. One product and one rotation instead of three
and two are 15 % of a small model's step on CPU. Gate and up stay apart: silu on half of a wider matrix reads with
a stride, 8.2 ms against 3.9 a layer, more than the wider product saves.

First values keep the variance of what they multiply: normal(0, 1/sqrt(inputs)), which is 1 for an embedding, whose
input is one token, and 1/sqrt(width) where it is tied and the output matrix too. The two projections of a block that
write to the residual stream are divided by sqrt(2 · layers), so that the stream does not grow with depth. GPT-2's
0.02 for everything fits a width of 2,500; at a width of 256 (4 layers, 80 to 90 s of one core, Python, AdamW at 3e-3,
one seed) it gave 2.20 bits per byte instead of 1.94, tied 2.32 instead of 2.17, mostly for the embedding's sake. An
output matrix that starts at zero gave 2.56.

Two paths: `forward` trains and scores whole sequences; `step` continues them with a `Cache` of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.flops import padded_vocab
from train.models.fused import scores
from train.models.language import Cache, LanguageModel
from train.models.layers import Linear, RMSNorm, RotaryAttention, checkpointed, documents, language_loss, rotary_table
from train.shapes import Llama as Shape

RESIDUAL = ("attention.out.weight", "ffn.down.weight")  # names that end so write to the residual stream


class FeedForward(nn.Module):
    """down(silu(gate x) · up x) (arXiv 2002.05202)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = Linear(shape.width, shape.ffn)
        self.up = Linear(shape.width, shape.ffn)
        self.down = Linear(shape.ffn, shape.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))
        return y_BTD


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.width, shape.norm_eps)
        heads = shape.heads, shape.kv_heads, shape.width // shape.heads
        self.attention = RotaryAttention(shape.width, *heads, again=shape.checkpoint_activations)
        self.ffn_norm = RMSNorm(shape.width, shape.norm_eps)
        self.ffn = FeedForward(shape)
        self.dropout = nn.Dropout(shape.dropout)
        self.again = shape.checkpoint_activations == "full"

    @checkpointed
    def forward(self, x_BTD: Tensor, table: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), table, documents_BT))
        y_BTD: Tensor = x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))
        return y_BTD

    def step(self, x_BTD: Tensor, table: Tensor, kv: Tensor, start: int) -> Tensor:
        x_BTD = x_BTD + self.attention.step(self.attention_norm(x_BTD), table, kv, start)
        y_BTD: Tensor = x_BTD + self.ffn(self.ffn_norm(x_BTD))
        return y_BTD


class Llama(LanguageModel):
    """`model(tokens, targets)` is a summed loss, `model(tokens)` are logits, `model.step` continues a sequence."""

    rotary: Tensor  # (2, context, E/2)

    def __init__(self, shape: Shape, vocab: int) -> None:
        super().__init__()
        self.shape: Shape = shape
        self.vocab = vocab
        rows = padded_vocab(vocab)
        self.embedding = nn.Embedding(rows, shape.width, _weight=torch.empty(rows, shape.width))
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, shape.norm_eps)
        self.head = None if shape.tied else Linear(shape.width, rows)
        self.register_buffer("rotary", torch.empty(2, shape.context, shape.width // shape.heads // 2), persistent=False)

    def fill_tables(self) -> None:
        s = self.shape
        slowed = {"factor": s.rope_factor, "low": s.rope_low, "high": s.rope_high, "original": s.rope_context}
        self.rotary.copy_(rotary_table(s.context, s.width // s.heads, s.rope_base, **slowed))

    def logits(self, x_BTD: Tensor) -> Tensor:
        # A tied matrix is used twice rather than owned twice: two names for it would part when the model is moved.
        weight = self.embedding.weight if self.head is None else self.head.weight
        return scores(self.norm(x_BTD), weight, self.vocab)

    def std(self, name: str, shape: torch.Size) -> float:
        if name == "embedding.weight":
            return shape[1] ** -0.5 if self.shape.tied else 1.0
        std: float = shape[1] ** -0.5
        return std / (2 * self.shape.layers) ** 0.5 if name.endswith(RESIDUAL) else std

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        table, documents_BT = self.rotary[:, : tokens_BT.size(1)], documents(tokens_BT, self.separator)
        x_BTD = self.dropout(self.embedding(tokens_BT))
        for block in self.blocks:
            x_BTD = block(x_BTD, table, documents_BT)
        if targets_BT is None:
            return self.logits(x_BTD)
        return language_loss(self.logits, x_BTD, targets_BT, z=self.shape.z_loss, chunk=self.shape.loss_chunk)

    def cache(self, sequences: int) -> Cache:
        s = self.shape
        return Cache.empty(self.embedding.weight, s.layers, sequences, s.kv_heads, s.context, s.width // s.heads)

    @torch.no_grad()
    def step(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        start = cache.extend(tokens_BT.size(1))
        table = self.rotary[:, start : cache.length]
        x_BTD = self.embedding(tokens_BT)
        for block, kv in zip(self.blocks, cache.kv, strict=True):
            assert isinstance(block, Block)
            x_BTD = block.step(x_BTD, table, kv, start)
        return self.logits(x_BTD[:, -1])
