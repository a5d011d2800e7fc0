"""The shapes that models can have: a dataclass a family, whose fields are the keys `model.*` (no torch).

Not a part of `config.py`, because what a model looks like says nothing about how a run goes: families may come without
the core growing. Each is named in MODELS, in `flops.py` by its arithmetic and in `models/build.py` by its module.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.checks import at_least, require
from train.config import Model


@dataclass(slots=True, kw_only=True)
class Llama(Model):
    """Llama's shape (arXiv 2302.13971, 2307.09288): RMSNorm, rotary positions, grouped queries, SwiGLU."""

    family: str = "llama"
    layers: int = 4
    width: int = 256
    heads: int = 4
    kv_heads: int = 4
    ffn: int = 704  # width of the feed-forward layer
    rope_base: float = 10_000.0
    rope_factor: float = 1.0  # Llama 3.1: slow rotations are slowed down so many times more; 1: off
    rope_low: float = 1.0  # of those that turn less often than this in rope_context tokens
    rope_high: float = 4.0  # and of none that turns more often than this; gradually in between
    rope_context: int = 8192  # the context before the slowing
    norm_eps: float = 1e-5
    tied: bool = True  # one matrix for input and output embedding

    def __post_init__(self) -> None:
        Model.__post_init__(self)
        at_least(self, "model.", layers=1, width=1, heads=1, kv_heads=1, ffn=1, rope_factor=1, rope_context=1)
        require(self.width % self.heads == 0, "model.heads", f"{self.heads} heads do not divide width {self.width}")
        require((self.width // self.heads) % 2 == 0, "model.heads", "rotary positions need an even head size")
        require(self.heads % self.kv_heads == 0, "model.kv_heads", f"{self.kv_heads} do not divide {self.heads} heads")
        require(0 < self.rope_low < self.rope_high, "model.rope_low", f"{self.rope_low} is not in (0, rope_high)")


@dataclass(slots=True, kw_only=True)
class GPT2(Model):
    """GPT-2's shape (Radford et al. 2019): LayerNorm, learned positions, GELU, one matrix for both embeddings."""

    family: str = "gpt2"
    layers: int = 4
    width: int = 256
    heads: int = 4
    ffn: int = 1024  # width of the feed-forward layer
    positions: int = 0  # that the table of positions holds; 0: context
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        Model.__post_init__(self)
        at_least(self, "model.", layers=1, width=1, heads=1, ffn=1, positions=0)
        require(self.width % self.heads == 0, "model.heads", f"{self.heads} heads do not divide width {self.width}")
        why = f"{self.context} tokens have no place in a table of {self.positions}"
        require(self.positions == 0 or self.context <= self.positions, "model.context", why)


@dataclass(slots=True, kw_only=True)
class Grok(Model):
    """Grok-1's shape (github xai-org/grok-1): experts of which a router chooses, four norms a layer, capped scores."""

    family: str = "grok"
    layers: int = 4
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    experts: int = 8
    chosen: int = 2  # experts that a token goes to
    widening: float = 8.0  # of the experts, which are two thirds of this times the width, raised to a multiple of 8
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    embedding_multiplier: float | None = None  # null: the root of the width
    output_multiplier: float = 3**-0.5  # of the logits
    attention_multiplier: float | None = None  # of the scores; null: 1 / the root of the head size
    attention_cap: float = 30.0  # of the scores, by tanh; 0: none
    balance: float = 0.01  # weight of the load-balancing loss, a layer
    router_z: float = 0.001  # weight of the squared log of the router's partition function, a layer

    def __post_init__(self) -> None:
        Model.__post_init__(self)
        at_least(self, "model.", layers=1, width=1, heads=1, kv_heads=1, head_size=2, experts=1, chosen=1)
        at_least(self, "model.", attention_cap=0, balance=0, router_z=0)
        require(self.head_size % 2 == 0, "model.head_size", "rotary positions need an even head size")
        require(self.heads % self.kv_heads == 0, "model.kv_heads", f"{self.kv_heads} do not divide {self.heads} heads")
        require(self.chosen <= self.experts, "model.chosen", f"{self.chosen} of {self.experts} experts: choose fewer")
        require(self.ffn > 0, "model.widening", f"{self.widening} leaves experts without width: use a larger one")

    @property
    def ffn(self) -> int:
        """Width of an expert."""
        return -(-(int(self.widening * self.width) * 2 // 3) // 8) * 8

    @property
    def embedding_scale(self) -> float:
        return self.width**0.5 if self.embedding_multiplier is None else self.embedding_multiplier

    @property
    def score_scale(self) -> float:
        return self.head_size**-0.5 if self.attention_multiplier is None else self.attention_multiplier


@dataclass(slots=True, kw_only=True)
class HF(Model):
    """A folder as transformers saves it: shape, first weights and tokenizer are read there (models/hf_config.py)."""

    family: str = "hf"
    context: int = 0  # tokens a sequence; 0: as many as that model can

    def __post_init__(self) -> None:
        why = "model=hf needs model.path=FOLDER, with config.json and *.safetensors, or OWNER/NAME on the Hub"
        require(bool(self.path), "model.path", why)
        at_least(self, "model.", context=0)


MODELS: dict[str, type[Model]] = {"gpt2": GPT2, "grok": Grok, "hf": HF, "llama": Llama}
