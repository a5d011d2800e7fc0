"""Seconds of a training step, and where they go: a roofline of one layer, times a schedule.

A layer is four matrix products, attention, and everything else, which moves memory. Products run at a share of the best
product measured on the device; attention at a share of the same; the rest at the speed of memory, with a number of
passes that depends on whose kernels they are. A layer is never faster than the host can launch it. Communication is
added where it is not hidden. A stage's layers, the head and the bubble make the step.

The numbers that nobody publishes are the `Calibration`: fitted, once, to the runs that tables/calibration.csv names
(calibrate.py; `colossus scale show=validation` prints what they are worth on runs that they have not seen). The
constants below are not fitted: freeing them changed the held-out error by less than it scatters.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np

from train.scale.network import RING_HOP, TENSOR_HOP, bus, nodes
from train.scale.workload import HOPPER, TABLES, Array, Jobs, Recompute, Sharding, Stack, read

CALIBRATION = TABLES / "calibration.csv"
TILE = 64  # a product's side at which a tile's edges cost as much as its inside
STEP = 5e-3  # seconds a step that are nobody's: the loop, the clipped norm, the loss
SPREAD = 0.003  # of the ranks' times for the same work; the slowest of N nodes sets the pace
STRAGGLE = 0.06  # how much slower a slow node is: MegaScale's "about 10 %", arXiv 2402.15627, section 6.3
SHORT = 200  # tokens of context at which attention's start and end cost as much as its middle
OPTIMIZER = 32  # bytes a parameter: fp32 weight and two moments, read and written, a gradient read, a weight written
# Bytes a parameter and micro-batch. DeepSpeed in bf16: the gradient is added to a cleared one (6), cleared (2), cast to
# fp32 (6) and added to the sum in fp32 (12).
ACCUMULATE = {"fused": 8, "separate": 5, "deepspeed": 26}
AGAIN = 0.75  # of what the host does for a layer, forward is that much, which recomputing does again
PIPELINE, CONTEXT = 0.35, 0.3  # shares of their transfers that are not hidden
# Bytes a number, op by op, of GPT OSS's experts: put out and biased in fp32 (Megatron-LM @55198ba, experts.py); between
# the products, clamped by halves and joined (fused_bias_geglu.py: 16 forward, 20 backward), and all of that again as
# NVIDIA's recipe for H100 has it (22; Megatron-Bridge @067f987, gpt_oss_workload_base_configs.py).
BIASED, CLAMPED = 68, 58
# Seconds of the host for each expert on a GPU: its six products are launched one by one at 10 us (Transformer Engine's
# cublaslt_gemm.cu); its bias is two calls at 28 us and six kernels backward. The same figures as in launch's prior.
EXPERT, BIAS = 60e-6, 116e-6
BUFFERS = 24  # passes over the residual stream that a layer makes, forward and backward, if each op runs by itself


class Calibration(SimpleNamespace):
    """What is fitted, by the names of tables/calibration.csv, which says what each number is."""


@cache
def calibration() -> Calibration:
    """The frozen one."""
    return Calibration(**{row["name"]: float(row["value"]) for row in read(CALIBRATION)})


def step_time(jobs: Jobs, c: Calibration) -> Array:
    """Seconds a step of each job."""
    return np.asarray(sum(breakdown(jobs, c).values()))


def breakdown(j: Jobs, c: Calibration) -> dict[str, Array]:
    """Seconds a step of each job, by what they are spent on; the parts add up to the step."""
    forward, backward = _layer(j, c)
    full, core = j.recompute == Recompute.FULL, (j.recompute == Recompute.SELECTIVE) & (j.stack > Stack.COMPILED)
    again = full + 0.5 * ((j.recompute == Recompute.SELECTIVE) & ~core)
    layer = {part: forward[part] * (1 + again) + backward[part] for part in forward}
    layer["attention"] += np.where(core, forward["attention"], 0)
    # a checkpoint of PyTorch's stops computing again before the last product, whose result nobody needs
    tokens = j.micro_batch * j.context / j.cp
    down = _product(tokens, j.ffn / j.tp, j.width, _rates(j, c)[1])
    layer["products"] -= np.where(full & (j.sharding >= Sharding.GRADIENTS) & (j.experts == 1), down, 0)
    layer |= _waits(j, c, sum(layer.values()))
    seconds = np.asarray(sum(layer.values()))

    micro_batches = j.batch / j.dp / j.micro_batch
    chunks = np.where(j.pp > 1, j.chunks, 1)
    most, last = _stages(j, chunks)
    head = _head(j, c)
    stage = np.maximum(most * seconds, last * seconds + head)
    sent = 2 * chunks * tokens * j.width * 2 / np.where(j.deepspeed > 0, 1, j.tp)
    wire = np.where(j.gpus <= j.domain, j.bus, j.nic)
    hidden = np.where(j.deepspeed > 0, 1, PIPELINE)
    parts = {part: micro_batches * most * value for part, value in layer.items()}
    parts["head"] = micro_batches * (stage - most * seconds)
    parts["pipeline"] = micro_batches * np.where(j.pp > 1, sent / wire * hidden, 0)
    parts["bubble"] = (j.pp - 1) / chunks * (j.layers * seconds + head) / j.pp
    slow = SPREAD * np.sqrt(2 * np.log(np.maximum(j.gpus / 8, 1)))  # the mean of the slowest of N normal ones
    slow += STRAGGLE * (1 - (1 - c.slow_nodes) ** (j.gpus / 8))  # and whether one of them is slow for good
    parts["slowest"] = slow * np.asarray(sum(parts.values()))
    return parts | _once(j, c)


def _rates(j: Jobs, c: Calibration) -> tuple[Array, Array]:
    """FLOP/s of large products, in bf16 and in the job's precision."""
    share = np.where(j.architecture >= HOPPER, c.matmul_hopper, c.matmul_ampere)
    fp8 = j.fp8_matmul * share * c.fp8 * np.where(j.rowwise > 0, c.rowwise, 1)
    return j.matmul * share, np.where(j.fp8 > 0, fp8, j.matmul * share)


def _product(m: Array, k: Array, n: Array, rate: Array) -> Array:
    return np.asarray(2 * m * k * n / rate * (1 + TILE / m) * (1 + TILE / k) * (1 + TILE / n))


def _passes(j: Jobs, c: Calibration) -> Array:
    each = np.array([c.passes_eager, c.passes_compiled, c.passes_megatron, c.passes_engine])
    return np.asarray(each[j.stack.astype(int)])


def _layer(j: Jobs, c: Calibration) -> tuple[dict[str, Array], dict[str, Array]]:
    """Seconds of a layer's forward and backward pass over a micro-batch, without waiting for anybody."""
    tokens, moe = j.micro_batch * j.context / j.cp, j.experts > 1
    qkv = j.head * (j.heads + 2 * j.kv_heads)
    bf16, rate = _rates(j, c)
    local = j.experts / j.ep
    each = tokens * j.chosen / local
    experts = local * (
        _product(each, j.width, (1 + j.gated) * j.ffn / j.tp, rate) + _product(each, j.ffn / j.tp, j.width, rate)
    )
    products = _product(tokens, j.width, qkv / j.tp, rate) + _product(tokens, j.heads * j.head / j.tp, j.width, rate)
    products += experts * np.where(moe, c.imbalance, 1)

    attention, attention_back = _attention(j, c, bf16)

    passes = _passes(j, c)
    residual = BUFFERS * j.width * np.where(j.parallel_norms > 0, 1 / j.tp, 1)
    hidden = (5 + 3 * j.gated) * j.ffn / j.tp * np.where(moe, j.chosen, 1)
    moved = 2 * tokens * (residual + 8 * qkv / j.tp + hidden) * (passes + c.casts * j.fp8)
    moved += np.where(moe, 2 * tokens * c.routed * (1 + c.casts * j.fp8) * j.chosen * j.width, 0)
    moved += np.where(j.biased > 0, (BIASED * j.width + CLAMPED * j.ffn / j.tp) * tokens * j.chosen, 0)
    memory = moved / j.bandwidth

    inside = np.where(j.tp <= j.domain, j.bus, j.nic)
    torch = c.exposed_tensor_torch * np.where(j.async_tp > 0, c.async_tensor, 1)
    exposed = np.select([j.stack == Stack.ENGINE, j.stack == Stack.MEGATRON], [c.exposed_tensor, 1.0], torch)
    reduce = 2 * (j.tp - 1) / j.tp * tokens * j.width * 2 / inside * exposed + 2 * TENSOR_HOP * (j.tp - 1)
    # one after attention, one after the feed-forward layer: of every token sent to an expert
    tensor = np.where(j.tp > 1, reduce * (1 + np.where(moe, j.chosen, 1)), 0)

    wide = bus(j.ep, j.tp * j.cp, j.domain, j.bus, j.nic)
    routed = np.where(j.ep > 1, 4 * tokens * j.chosen * j.width / j.tp * (j.ep - 1) / j.ep / wide, 0)
    wide = np.where(j.tp * j.cp <= j.domain, j.bus, j.nic)
    keys = 4 * j.kv_heads * j.head / j.tp * tokens * (j.cp - 1) / wide * CONTEXT

    forward = (products, attention, 0.4 * memory, tensor, routed, keys)
    backward = (2 * products, attention_back, 0.6 * memory, tensor, routed, 2 * keys)
    names = ("products", "attention", "memory", "tensor", "experts", "context")
    return dict(zip(names, forward, strict=True)), dict(zip(names, backward, strict=True))


def _attention(j: Jobs, c: Calibration, bf16: Array) -> tuple[Array, Array]:
    """Forward and backward. Flash attention skips what causality masks and computes its forward again."""
    share = np.select(
        [j.architecture < HOPPER, j.stack == Stack.ENGINE, j.first_flash > 0],
        [c.flash_ampere, c.flash_engine, c.flash_first],
        c.flash_second,
    )
    scores = 4 * j.micro_batch * j.context**2 / j.cp * j.heads * j.head / j.tp
    flash = scores / 2 / (share * j.matmul) * (1 + SHORT / j.context)
    heads = j.micro_batch * j.heads / j.tp
    two = 2 * heads * _product(j.context, j.head, j.context, bf16)
    written = 2 * heads * j.context**2 * c.score_passes / j.bandwidth
    kept = j.stack == Stack.MEGATRON
    return np.where(kept, two + written / 3, flash), np.where(kept, 2 * two + written * 2 / 3, 2.5 * flash)


def _waits(j: Jobs, c: Calibration, layer: Array) -> dict[str, Array]:
    """What a layer waits for: the host that launches it, parameters on their way, its gradient's accumulation."""
    host = c.launch * np.where(j.recompute == Recompute.FULL, 1 + AGAIN, 1) * np.where(j.experts > 1, 2, 1)
    host += np.where(j.experts > 1, (EXPERT + BIAS * j.biased) * j.experts / j.ep, 0)
    host = np.where(j.architecture > 0, host, 0)  # a CPU is the host
    launched = (layer**4 + host**4) ** 0.25  # the longer one, rounded where they are close
    mine = j.layer_parameters / j.ep / j.tp
    collectives = np.select([j.sharding == Sharding.WEIGHTS, j.sharding == Sharding.GRADIENTS], [3.0, 2.0], 0.0)
    # stages of a pipeline keep their weights gathered and sum their gradients with the last micro-batch
    collectives = np.where(j.pp > 1, 0, collectives)
    wide = bus(j.dp, j.tp * j.cp, j.domain, j.bus, j.nic)
    ring = mine * 2 * (j.dp - 1) / j.dp / wide + RING_HOP * nodes(j.dp, j.tp * j.cp, j.domain)
    gathers = np.where(j.dp > 1, collectives * ring, 0)
    gathered = (launched**4 + gathers**4) ** 0.25 + c.interference * gathers
    each = np.where(j.stack == Stack.ENGINE, ACCUMULATE["fused"], ACCUMULATE["separate"])
    each = np.where((j.deepspeed > 0) & (j.bf16 > 0), ACCUMULATE["deepspeed"], each)
    added = np.where(collectives == 0, mine * each / j.bandwidth, 0)
    return {"host": launched - layer, "gathers": gathered - launched, "accumulation": added}


def _stages(j: Jobs, chunks: Array) -> tuple[Array, Array]:
    """Layers of the fullest stage and of the last one, which has the head.

    Where layers do not divide, but do with the embedding and the head as one each, both ends have one less.
    """
    even = j.layers % (j.pp * chunks) == 0
    ends = (j.layers + 2) % (j.pp * chunks) == 0
    most = np.select([even, ends], [j.layers / j.pp, (j.layers + 2) / j.pp], np.ceil(j.layers / j.pp))
    return most, np.select([even, ends], [most, most - 1], np.floor(j.layers / j.pp))


def _head(j: Jobs, c: Calibration) -> Array:
    """The output matrix and the loss of a micro-batch, forward and backward."""
    tokens = j.micro_batch * j.context / j.cp
    bf16, _ = _rates(j, c)
    passes = _passes(j, c)
    logits = tokens * j.vocab / j.tp * BUFFERS * (0.5 + 0.5 * passes) / j.bandwidth
    return 3 * _product(tokens, j.width, j.vocab / j.tp, bf16) + logits


def _once(j: Jobs, c: Calibration) -> dict[str, Array]:
    """What happens once a step: the sum of gradients that is not hidden, the optimizer, the rest."""
    both = j.vocab * j.width / j.tp * np.where(j.pp > 1, 1, 2)  # the embeddings of a stage at an end of the pipeline
    mine = j.layer_parameters / j.ep / j.tp * j.layers / j.pp + both
    replicas = j.dp * j.cp
    wide = bus(replicas, j.tp, j.domain, j.bus, j.nic)
    # bytes: DeepSpeed's fp32 gradients both ways and weights; fp32 gradients and bf16 weights; both ways in fp32, bf16
    cut = (j.sharding == Sharding.OPTIMIZER) | ((j.sharding >= Sharding.GRADIENTS) & (j.pp > 1))
    each = np.select(
        [j.deepspeed > 0, cut], [np.where(j.bf16 > 0, 10, 4), 6], np.where(j.stack <= Stack.COMPILED, 8, 4)
    )
    summed = (replicas - 1) / replicas * mine * each / wide
    exposed = np.where(cut & (j.deepspeed == 0), c.exposed_gradients, 1)
    kept = mine / np.where(j.sharding >= Sharding.OPTIMIZER, replicas, 1)
    return {
        "gradients": np.where(cut | (j.sharding == Sharding.NOTHING), summed * exposed, 0),
        "optimizer": kept * OPTIMIZER / j.bandwidth,
        "rest": np.full(len(j), STEP),
    }
