"""Parameters, FLOPs and bytes of a model, by arithmetic from its configuration: no torch, no weights.

The same numbers serve `plan` (does it fit?), `batch.micro_batch=auto` (how many sequences a forward?), the MFU that
a run reports and the projection to machines nobody here has. Tests hold them against models that are really built.

FLOPs follow the convention of PaLM, appendix B (arXiv 2204.02311): 6 for each parameter that is multiplied and
12·L·d·T for attention, a token; causality is not subtracted and recomputation not added. An embedding that is only
looked up multiplies nothing; a tied one is the output matrix as well, and counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train.checks import choice
from train.config import Model
from train.shapes import GPT2, Grok, Llama

ROWS = 64  # vocabularies are padded to a multiple: 50,257 rows are slower than 50,304 on every tensor core
CPU_TOKENS = 2048  # of a micro-batch, see auto_micro_batch
CUDA_TOKENS = 32_768  # the same, assumed


def padded_vocab(vocab: int) -> int:
    """Rows of the embedding. Those above `vocab` are zero, and stay so: their logits are cut off."""
    return -(-vocab // ROWS) * ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a family has to say about itself: everything else follows from it."""

    layers: int
    embedding: int  # parameters of the input embedding
    head: int = 0  # of the output matrix; 0 where it is tied to the embedding
    vectors: int  # of the norms' gains, and biases
    matrices: int  # of everything else
    active: int  # of `matrices`, those that one token is multiplied with
    attention: int  # L·d: layers times width of attention
    halves: int  # numbers that all layers keep a token for the backward pass in the compute precision
    singles: int  # the same, in fp32 in any precision
    scores: int  # the same, per key that a query sees, where attention keeps its scores (CPU, or not `fused`)
    positions: int = 0  # parameters of a table that is only looked up
    fused: bool = True  # a GPU has a kernel for such attention, which keeps no scores


def _llama(model: Llama, vocab: int) -> Sizes:
    d, f = model.width, model.ffn
    kv = model.width // model.heads * model.kv_heads
    matrices = model.layers * (d * (d + 2 * kv) + d * d + 3 * d * f)
    table = padded_vocab(vocab) * d
    return Sizes(
        layers=model.layers,
        embedding=table,
        head=0 if model.tied else table,
        vectors=(2 * model.layers + 1) * d,
        matrices=matrices,
        active=matrices,
        attention=model.layers * d,
        # the inputs of qkv, gate, up and out and the scaled queries (5 d), rotated keys, values (2 kv),
        # and of the feed-forward layer gate, silu(gate), up and their product (4 f)
        halves=model.layers * (5 * d + 2 * kv + 4 * f) + d,
        singles=(2 * model.layers + 1) * d,  # a norm keeps its unit vectors
        scores=model.layers * model.heads,
    )


def _gpt2(model: GPT2, vocab: int) -> Sizes:
    d, f = model.width, model.ffn
    matrices = model.layers * (4 * d * d + 2 * d * f)
    return Sizes(
        layers=model.layers,
        embedding=padded_vocab(vocab) * d,
        positions=(model.positions or model.context) * d,
        vectors=model.layers * (4 * d + 5 * d + f) + 2 * d,
        matrices=matrices,
        active=matrices,
        attention=model.layers * d,
        # the inputs of qkv, up and out and the scaled queries, keys, values (6 d), and up and gelu(up) (2 f)
        halves=model.layers * (6 * d + 2 * f) + d,
        singles=(2 * model.layers + 1) * d,  # a norm keeps its input
        scores=model.layers * model.heads,
    )


def _grok(model: Grok, vocab: int) -> Sizes:
    d, f, chosen = model.width, model.ffn, model.chosen
    q, kv = model.heads * model.head_size, model.kv_heads * model.head_size
    attention, router, expert = d * (q + 2 * kv) + q * d, d * model.experts, 3 * d * f
    return Sizes(
        layers=model.layers,
        embedding=padded_vocab(vocab) * d,
        vectors=(4 * model.layers + 1) * d,
        matrices=model.layers * (attention + router + model.experts * expert),
        active=model.layers * (attention + router + chosen * expert),
        attention=model.layers * q,
        # the inputs of qkv and out, the scaled queries, rotated keys, values; and a chosen expert's input, gate,
        # gelu(gate), up and their product, and its output
        halves=model.layers * (d + 2 * q + 2 * kv + chosen * (2 * d + 4 * f)) + d,
        singles=(4 * model.layers + 1) * d + model.layers * 4 * model.experts,
        scores=2 * model.layers * model.heads,  # before the softmax too, where they are capped
        fused=not model.attention_cap,
    )


FAMILIES: dict[str, Callable[[Any, int], Sizes]] = {"gpt2": _gpt2, "grok": _grok, "llama": _llama}


def sizes(model: Model, vocab: int) -> Sizes:
    """For `vocab` token ids, or `model.vocab` if it says so. Raises Refused for a family that is not in FAMILIES."""
    choice(model.family, "model.family", tuple(FAMILIES))
    return FAMILIES[model.family](model, model.vocab or vocab)


def parameters(model: Model, vocab: int) -> int:
    """All of them, a tied matrix once, padding rows included."""
    s = sizes(model, vocab)
    return s.embedding + s.head + s.positions + s.vectors + s.matrices


def active_parameters(model: Model, vocab: int) -> int:
    """Those that one token is multiplied with: no table that is only looked up, no expert that was not chosen."""
    s = sizes(model, vocab)
    return (s.head or s.embedding) + s.vectors + s.active


def flops_per_token(model: Model, vocab: int) -> int:
    """Of forward and backward: 6 · active parameters + 12 · L · d · T."""
    return 6 * active_parameters(model, vocab) + 12 * sizes(model, vocab).attention * model.context


def mfu(model: Model, vocab: int, tokens_per_s: float, peak_flops: float | None) -> float | None:
    """Model FLOPs utilisation, a proportion: of the dense peak of the devices that make `tokens_per_s` together.

    None where the peak is not known.
    """
    return None if peak_flops is None else flops_per_token(model, vocab) * tokens_per_s / peak_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank at the end of its forward pass, where a step needs the most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    snapshot: int = 0  # of the state, for a save in the background, where it is the device's own memory

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.snapshot


def memory(
    model: Model,
    vocab: int,
    *,
    micro_batch: int,
    precision: str = "bf16",
    accelerator: str = "cpu",
    gradient_buffers: int = 1,
    optimizer_states: int = 2,
) -> Memory:
    """An estimate for unsharded training, fp32 master weights with or without bf16 autocast, eager.

    `gradient_buffers` counts live gradients: 1, plus the unfinished subtrees of the canonical tree where a rank hosts
    several virtual ranks (aligned shares: at most log2 V + 1 in all). `optimizer_states` are fp32 numbers a parameter
    (AdamW: 2). Compiled models keep less. The allocator, the library and the process itself are not in it.
    """
    s, n = sizes(model, vocab), parameters(model, vocab)
    tokens, half = micro_batch * model.context, 2 if precision == "bf16" else 4
    # Blocks of 128 queries see keys up to their own end: T/2 + 64 on average. Fused kernels keep no scores.
    keys = min(model.context, model.context // 2 + 64) if accelerator == "cpu" or not s.fused else 0
    scores, stream = s.scores * keys * half, 4 * s.embedding // padded_vocab(model.vocab or vocab)
    kept = s.halves * half + s.singles * 4
    match model.checkpoint_activations:
        case "full":  # a layer at work, and what goes into each, in fp32
            a_token = (kept + scores) // s.layers + s.layers * stream
        case "selective":  # the scores of a layer at work
            a_token = kept + scores // s.layers
        case _:
            a_token = kept + scores
    return Memory(
        weights=n * 4 + (s.matrices + (s.head or s.embedding)) * (2 if precision == "bf16" else 0),  # autocast's copies
        gradients=n * 4 * gradient_buffers,
        optimizer=n * 4 * optimizer_states,
        activations=tokens * a_token,
        # the log-probabilities in fp32, and the logits or their gradient
        logits=min(tokens, model.loss_chunk or tokens) * padded_vocab(model.vocab or vocab) * (4 + half),
    )


def auto_micro_batch(
    model: Model,
    vocab: int,
    share: int,
    *,
    budget_bytes: int | None = None,
    accelerator: str = "cpu",
    **conditions: Any,
) -> int:
    """Sequences a forward pass: the largest divisor of a virtual rank's `share` that fits and that helps.

    On CPU a larger micro-batch stops helping once the matrices are tall enough: 4 layers of width 256 ran 4,200
    tokens/s on one core at 256 tokens, 4,700 at 512, 5,000 to 5,300 from 1,024 to 4,096, and 4,700 at 8,192, where
    the logits alone are 200 MB; width 384 the same. So 2,048. On a GPU the cap is assumed. Without a budget memory is
    not asked; `conditions` are those of `memory`. Where not even one sequence fits the answer is 1, and `plan` says
    that it does not fit.
    """
    cap = max(1, (CPU_TOKENS if accelerator == "cpu" else CUDA_TOKENS) // model.context)
    for size in range(min(share, cap), 1, -1):
        if share % size == 0:
            need = memory(model, vocab, micro_batch=size, accelerator=accelerator, **conditions)
            if budget_bytes is None or need.total <= budget_bytes:
                return size
    return 1
