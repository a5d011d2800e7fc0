"""What every model family is to the rest of the project: five methods and four attributes.

A family is a final class in a file of its own; it inherits nothing but this list. Training uses `forward`,
generation `cache` and `step`, `build.py` `fill_tables`. Nobody asks which family it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Size, Tensor, nn

from train.config import Model


@dataclass(slots=True)
class Cache:
    """Keys and values of the first `length` positions: (layers, 2, B, K, context, E)."""

    kv: Tensor
    length: int = 0

    @classmethod
    def empty(cls, like: Tensor, layers: int, sequences: int, heads: int, context: int, size: int) -> Cache:
        """Room for `sequences` whole contexts, on the device and in the precision of `like`."""
        return cls(like.new_empty(layers, 2, sequences, heads, context, size))

    def extend(self, positions: int) -> int:
        """Make so many more positions count; returns how many there were. Raises ValueError where they do not fit."""
        start, context = self.length, self.kv.size(-2)
        if start + positions > context:
            raise ValueError(f"{start + positions} positions do not fit a context of {context}")
        self.length += positions
        return start


class LanguageModel(nn.Module, ABC):
    """A decoder-only language model on one device, for token ids 0 … vocab - 1."""

    shape: Model
    vocab: int
    separator: int | None = None  # a token id: `forward` lets nothing attend across it; positions go on counting
    aside: Tensor  # float64: what the last `forward` with targets tells besides its loss, to be summed over the step

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("aside", torch.zeros(0, dtype=torch.float64), persistent=False)

    @abstractmethod
    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocabulary); with targets (-100: none) their summed cross-entropy in nats, fp32."""

    @abstractmethod
    def cache(self, sequences: int) -> Cache:
        """Room for the keys and values of `sequences` whole contexts, in the precision of the weights."""

    @abstractmethod
    def step(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        """Logits (B, vocabulary) that follow `tokens_BT`, which follow what `cache` holds; they are added to it.

        Without dropout and without a graph. Raises ValueError where they do not fit the context.
        """

    def fill_tables(self) -> None:
        """Give the buffers their values, where there are any: they are constants, and no checkpoint has them."""

    @abstractmethod
    def std(self, name: str, shape: Size) -> float:
        """Standard deviation of the first values of the matrix called `name`."""
