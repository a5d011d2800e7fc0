"""GPT-2: a decoder of pre-normalised attention and GELU blocks with learned positions (Radford et al. 2019).

As transformers has it: biases everywhere, the tanh form of GELU, one matrix for both embeddings. Query, key and value
are one matrix, rows in that order. First values follow `llama.py`, where the reasons are; positions are drawn as wide
as the tokens that they are added to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.flops import padded_vocab
from train.models.fused import gelu, scores
from train.models.language import Cache, LanguageModel
from train.models.layers import LayerNorm, Linear, attention, cached_attention, checkpointed, documents, language_loss
from train.shapes import GPT2 as Shape

RESIDUAL = ("attention.out.weight", "ffn.down.weight")  # names that end so write to the residual stream


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.attention = shape.heads, attention(shape.checkpoint_activations)
        self.qkv = Linear(shape.width, 3 * shape.width, bias=True)
        self.out = Linear(shape.width, shape.width, bias=True)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, T, E)."""
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        return q, k, v

    def merge(self, y_BHTE: Tensor) -> Tensor:
        y_BTD: Tensor = self.out(y_BHTE.transpose(1, 2).flatten(2))
        return y_BTD

    def forward(self, x_BTD: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        return self.merge(self.attention(*self.project(x_BTD), documents_BT))

    def step(self, x_BTD: Tensor, kv: Tensor, start: int) -> Tensor:
        """T new positions after `start` known ones, whose keys and values are in `kv` (2, B, H, context, E)."""
        return self.merge(cached_attention(*self.project(x_BTD), kv, start))


class FeedForward(nn.Module):
    """down(gelu(up x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = Linear(shape.width, shape.ffn, bias=True)
        self.down = Linear(shape.ffn, shape.width, bias=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.down(gelu(self.up(x_BTD)))
        return y_BTD


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(shape.width, shape.norm_eps)
        self.attention = Attention(shape)
        self.ffn_norm = LayerNorm(shape.width, shape.norm_eps)
        self.ffn = FeedForward(shape)
        self.dropout = nn.Dropout(shape.dropout)
        self.again = shape.checkpoint_activations == "full"

    @checkpointed
    def forward(self, x_BTD: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), documents_BT))
        y_BTD: Tensor = x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))
        return y_BTD

    def step(self, x_BTD: Tensor, kv: Tensor, start: int) -> Tensor:
        x_BTD = x_BTD + self.attention.step(self.attention_norm(x_BTD), kv, start)
        y_BTD: Tensor = x_BTD + self.ffn(self.ffn_norm(x_BTD))
        return y_BTD


class GPT2(LanguageModel):
    """`model(tokens, targets)` is a summed loss, `model(tokens)` are logits, `model.step` continues a sequence."""

    def __init__(self, shape: Shape, vocab: int) -> None:
        super().__init__()
        self.shape: Shape = shape
        self.vocab = vocab
        rows, places = padded_vocab(vocab), shape.positions or shape.context
        self.embedding = nn.Embedding(rows, shape.width, _weight=torch.empty(rows, shape.width))
        self.positions = nn.Embedding(places, shape.width, _weight=torch.empty(places, shape.width))
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = LayerNorm(shape.width, shape.norm_eps)

    def embed(self, tokens_BT: Tensor, start: int = 0) -> Tensor:
        x_BTD: Tensor = self.embedding(tokens_BT) + self.positions.weight[start : start + tokens_BT.size(1)]
        return x_BTD

    def logits(self, x_BTD: Tensor) -> Tensor:
        return scores(self.norm(x_BTD), self.embedding.weight, self.vocab)

    def std(self, name: str, shape: torch.Size) -> float:
        std: float = shape[1] ** -0.5
        return std / (2 * self.shape.layers) ** 0.5 if name.endswith(RESIDUAL) else std

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        documents_BT = documents(tokens_BT, self.separator)
        x_BTD = self.dropout(self.embed(tokens_BT))
        for block in self.blocks:
            x_BTD = block(x_BTD, documents_BT)
        if targets_BT is None:
            return self.logits(x_BTD)
        return language_loss(self.logits, x_BTD, targets_BT, z=self.shape.z_loss, chunk=self.shape.loss_chunk)

    def cache(self, sequences: int) -> Cache:
        s = self.shape
        return Cache.empty(self.embedding.weight, s.layers, sequences, s.heads, s.context, s.width // s.heads)

    @torch.no_grad()
    def step(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        start = cache.extend(tokens_BT.size(1))
        x_BTD = self.embed(tokens_BT, start)
        for block, kv in zip(self.blocks, cache.kv, strict=True):
            assert isinstance(block, Block)
            x_BTD = block.step(x_BTD, kv, start)
        return self.logits(x_BTD[:, -1])
