"""Bytes of one GPU: state by what is sharded, activations by what is recomputed.

Activations of an unfused layer are arXiv 2205.05198's: 34·s·b·h bytes, of which 10 are repeated by each tensor-parallel
rank unless norms are parallel too, and 5·a·s²·b of attention. Flash attention keeps none of the latter.
The fullest stage is the first: with 1F1B it holds pp micro-batches of L/pp layers, a little more if interleaved.
What PyTorch keeps is counted in pytorch/torchtitan @9dec370 and in torch/distributed/tensor/parallel/loss.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from train.scale import tables
from train.scale.workload import TABLES, Array, Jobs, Recompute, Sharding, Stack

GIB = 2**30
STATE = 18  # bytes a parameter: bf16 weight, fp32 gradient, master weight and two moments (Megatron's)


def state(j: Jobs) -> Array:
    """Weights, gradients and optimizer, bytes of the GPU with the most."""
    table = j.vocab * j.width / j.tp * np.where(j.pp > 1, 1, 2)
    mine = j.layer_parameters / j.ep / j.tp * np.ceil(j.layers / j.pp) + table
    # PyTorch's FSDP keeps fp32 weights, gradients and moments, all cut; gathered are both embeddings, a layer and the
    # next; under a pipeline all bf16 weights, with fp32 gradients whole until the last micro-batch
    replicas, gathered = j.dp * j.cp, np.where(j.pp > 1, 6 * mine, 2 * (2 * j.layer_parameters / j.tp + table))
    gradient = np.where(j.stack == Stack.ENGINE, 2, 4)  # in bf16 by the recipes of NeMo and Megatron-Bridge
    cut = [2 + gradient + 12 / replicas, 2 + 16 / replicas]
    whole = np.select([j.sharding == Sharding.OPTIMIZER, j.sharding == Sharding.GRADIENTS], cut, STATE)
    held: Array = np.where(j.sharding >= Sharding.WEIGHTS, mine * 16 / replicas + gathered, mine * whole)
    return held


def activations(j: Jobs) -> Array:
    """Kept for the backward pass, and the logits, bytes."""
    tokens = j.micro_batch * j.context / j.cp
    kv = 2 * j.head * j.kv_heads
    frees = (j.sharding == Sharding.GRADIENTS) & (j.pp > 1)  # Llama 3: what is computed again at little cost; assumed
    fused = (j.stack == Stack.ENGINE) | frees  # keeps no dropout masks, and of SwiGLU gate, up and their product only
    narrow = np.where(fused, j.fp8, 0)  # the inputs of products are kept as they were multiplied
    residual = (np.where(fused, 8, 10) - 2 * narrow) * j.width * np.where(j.parallel_norms > 0, 1 / j.tp, 1)
    # of Megatron's other 24 attention has 8, and a feed-forward layer four times as wide 16
    ffn = (2 + np.where(fused, 1, 2) * j.gated - np.where(frees, 1, narrow / 2)) * 2 * j.ffn
    ffn = ffn * np.where(j.experts > 1, j.chosen, 1)
    inner = (2 * j.width + (4 - narrow) * j.heads * j.head + kv + ffn) / j.tp
    scores = np.where(j.stack == Stack.MEGATRON, 5 * j.heads * j.context / j.tp, 0)
    layer = residual + inner + np.where(j.recompute == Recompute.SELECTIVE, 0, scores)
    torch = j.stack <= Stack.COMPILED
    some = torch & (j.recompute == Recompute.SELECTIVE)
    again = np.where(some | (j.recompute == Recompute.FULL), layer, 0)  # one layer at a time, in full
    # of products every second result, attention's, and the input
    kept = (4 * j.width + 4 * j.heads * j.head + kv + 2 * j.ffn * np.where(j.experts > 1, j.chosen, 1)) / j.tp
    layer = np.where(some, kept, layer)
    layer = np.where(j.recompute == Recompute.FULL, 2 * j.width * np.where(j.parallel_norms > 0, 1 / j.tp, 1), layer)
    chunks = np.where(j.pp > 1, j.chunks, 1)
    layers = j.layers * (1 + np.where(chunks > 1, (j.pp - 1) / (j.pp * chunks), 0))
    # fp32 logarithms and two gradients; cut over tensor parallel ranks one more; a fused loss has bf16, twice
    each = np.select([j.fused_loss > 0, torch & (j.tp > 1), torch], [4, 16, 12], 6)
    logits = np.where(j.pp > 1, 0, tokens * j.vocab / j.tp * each)
    return np.asarray(tokens * (layer * layers + again) + logits)


def points() -> list[dict[str, Any]]:
    """The published points of tables/memory_points.csv beside this model, GiB."""
    found = []
    for row in tables.rows(TABLES / "memory_points.csv")[1]:
        run = tables.parse(row)
        assert run.job is not None, run.why_not
        jobs = Jobs([run.job])
        parts = {"activations": activations(jobs), "peak": total(jobs)}
        predicted, measured = float(parts.get(row["what"], state(jobs))[0]) / GIB, float(row["GiB"])
        of = " ".join(row[key] for key in ("source", "model", "config"))
        off = predicted / measured - 1
        found.append({"of": of, "what": row["what"], "model": predicted, "published": measured, "error": off})
    return found


def total(j: Jobs) -> Array:
    """Bytes that a GPU needs; workspaces and communicators are put at 2 GiB, with Engine's at 4, assumed."""
    return state(j) + activations(j) + np.where(j.stack == Stack.ENGINE, 4 * GIB, 2 * GIB)
