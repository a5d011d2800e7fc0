"""Grok-1 as published (github xai-org/grok-1), with what training needs and inference code leaves out.

A decoder whose blocks are normalised before and after, so that each adds rows of unit size to the stream; attention
scores are capped by tanh; the feed-forward layer is a mixture of experts (`experts.py`); embeddings are multiplied on
the way in, and the tied matrix's logits on the way out.

The load-balancing loss and the router's z-loss are of one micro-batch each, so that they are the same on any number of
ranks. Their weights are per layer, and they are multiplied by the number of targets as the summed cross-entropy is. The
loss that `forward` returns does not contain them; its gradient does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.flops import padded_vocab
from train.models.experts import Experts, told
from train.models.fused import scores
from train.models.language import Cache, LanguageModel
from train.models.layers import (
    IGNORED,
    RMSNorm,
    RotaryAttention,
    checkpointed,
    documents,
    language_loss,
    rotary_table,
    with_auxiliary,
)
from train.shapes import Grok as Shape


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        s, self.balance, self.router_z = shape, shape.balance, shape.router_z
        heads = s.heads, s.kv_heads, s.head_size
        self.attention_norm = RMSNorm(s.width, s.norm_eps)
        self.attention = RotaryAttention(
            s.width, *heads, scale=s.score_scale, cap=s.attention_cap, again=s.checkpoint_activations
        )
        self.attention_end = RMSNorm(s.width, s.norm_eps)
        self.experts_norm = RMSNorm(s.width, s.norm_eps)
        self.experts = Experts(s.width, s.ffn, s.experts, s.chosen)
        self.experts_end = RMSNorm(s.width, s.norm_eps)
        self.dropout = nn.Dropout(s.dropout)
        self.again = s.checkpoint_activations == "full"

    @checkpointed
    def forward(
        self, x_BTD: Tensor, table: Tensor, auxiliary: Tensor, documents_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The stream, and the auxiliary losses so far, with its own added to both; what is told of the routing."""
        y_BTD = self.attention(self.attention_norm(x_BTD), table, documents_BT)
        x_BTD = x_BTD + self.dropout(self.attention_end(y_BTD))
        y_BTD, routing = self.experts(self.experts_norm(x_BTD))
        x_BTD = x_BTD + self.dropout(self.experts_end(y_BTD))
        return x_BTD, auxiliary + self.balance * routing.balance + self.router_z * routing.z, told(routing)

    def step(self, x_BTD: Tensor, table: Tensor, kv: Tensor, start: int) -> Tensor:
        y_BTD = self.attention.step(self.attention_norm(x_BTD), table, kv, start)
        x_BTD = x_BTD + self.attention_end(y_BTD)
        y_BTD, _ = self.experts(self.experts_norm(x_BTD))
        end_BTD: Tensor = x_BTD + self.experts_end(y_BTD)
        return end_BTD


class Grok(LanguageModel):
    """`model(tokens, targets)` is a summed loss, `model(tokens)` are logits, `model.step` continues a sequence.

    `aside` has a row for each layer: how often each expert was chosen, the balance loss and the router's z-loss.
    """

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
        self.register_buffer("rotary", torch.empty(2, shape.context, shape.head_size // 2), persistent=False)
        self.aside = torch.zeros(shape.layers, shape.experts + 2, dtype=torch.float64)

    def fill_tables(self) -> None:
        self.rotary.copy_(rotary_table(self.shape.context, self.shape.head_size, self.shape.rope_base))

    def embed(self, tokens_BT: Tensor) -> Tensor:
        x_BTD: Tensor = self.embedding(tokens_BT) * self.shape.embedding_scale
        return x_BTD

    def logits(self, x_BTD: Tensor) -> Tensor:
        x_BTD = self.norm(x_BTD) * self.shape.output_multiplier  # fewer numbers than the logits
        return scores(x_BTD, self.embedding.weight, self.vocab)

    def std(self, name: str, shape: torch.Size) -> float:
        std: float = shape[-1] ** -0.5  # the norm behind each block decides how much it adds
        return std

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        table, documents_BT = self.rotary[:, : tokens_BT.size(1)], documents(tokens_BT, self.separator)
        x_BTD = self.dropout(self.embed(tokens_BT))
        auxiliary, rows = x_BTD.new_zeros(()), []
        for block in self.blocks:
            x_BTD, auxiliary, row = block(x_BTD, table, auxiliary, documents_BT)
            rows.append(row)
        if targets_BT is None:
            return self.logits(x_BTD)
        self.aside.copy_(torch.stack(rows))
        nats = language_loss(self.logits, x_BTD, targets_BT, z=self.shape.z_loss, chunk=self.shape.loss_chunk)
        return with_auxiliary(nats, auxiliary * (targets_BT != IGNORED).sum())

    def cache(self, sequences: int) -> Cache:
        s = self.shape
        return Cache.empty(self.embedding.weight, s.layers, sequences, s.kv_heads, s.context, s.head_size)

    @torch.no_grad()
    def step(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        start = cache.extend(tokens_BT.size(1))
        table = self.rotary[:, start : cache.length]
        x_BTD = self.embed(tokens_BT)
        for block, kv in zip(self.blocks, cache.kv, strict=True):
            assert isinstance(block, Block)
            x_BTD = block.step(x_BTD, table, kv, start)
        return self.logits(x_BTD[:, -1])
