"""What a run would be, by arithmetic: `auto` resolved against this machine, parameters, FLOPs, memory.

No torch, so an answer takes a fraction of a second, for 8 B parameters as for one million.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace

from train import flops, hardware
from train.batch import Node, fold, maximal, root, shares
from train.checks import Refused, require
from train.config import OptimizerKind, ReduceMode, Sharding, TokenizerKind, Train
from train.shapes import Grok

MAX_RANKS = 8  # that `devices=auto` starts on one node


def there(accelerator: str) -> tuple[str, int]:
    """What `accelerator` means on this machine, and how many there are: GPUs, perhaps none, or CPU cores."""
    gpus = len(hardware.gpus()) if accelerator != "cpu" else 0
    return ("cuda", gpus) if gpus or accelerator == "cuda" else ("cpu", hardware.cores())


def resolve(config: Train) -> Train:
    """Replace every `auto` by what it means on this machine; raises Refused where the run is impossible here."""
    if "wandb" in config.logger and importlib.util.find_spec("wandb") is None:
        raise Refused("logger", "wandb is not installed: pip install -e '.[wandb]' in a checkout, or leave it out")
    ids, known = vocabulary(config), config.model.vocab
    fits = not known or ids <= known or config.data.tokenizer.kind is TokenizerKind.file  # read later, and compared
    require(fits, "model.vocab", f"{known} are fewer than the tokenizer's {ids} ids: choose another data.tokenizer")
    accelerator, available = there(config.accelerator)
    require(available > 0, "accelerator", "cuda, but nvidia-smi shows no GPU here: use accelerator=cpu")
    nodes, leaves = config.least_nodes, config.batch.virtual_ranks
    ranks = leaves // nodes
    require(ranks > 0, "nodes", f"{nodes} nodes are more than batch.virtual_ranks={leaves}")
    usual = min(available, MAX_RANKS, ranks)
    devices = usual if config.devices == "auto" else int(config.devices)
    backend = config.backend if config.backend != "auto" else "nccl" if accelerator == "cuda" else "gloo"
    require(backend != "nccl" or accelerator == "cuda", "backend", "nccl needs GPUs: use backend=gloo on CPUs")
    why = f"{devices} GPUs asked for, {available} here (several ranks a GPU: backend=gloo)"
    require(backend != "nccl" or devices <= available, "devices", why)
    precision, compiled, batch = config.precision, config.compile, config.batch
    if precision == "auto":
        precision = "bf16" if accelerator == "cuda" or hardware.processor()[1] else "fp32"
    untraced = isinstance(config.model, Grok) and precision != "bf16"
    if compiled == "auto":
        compiled = accelerator == "cuda" and config.sharding is not Sharding.full and not untraced
    why = "true needs precision=bf16 with experts, whose grouped products torch traces in bf16 only: use false"
    require(not (compiled and untraced), "compile", why)
    require(compiled != "graphs" or accelerator == "cuda", "compile", "graphs are CUDA's: use true on a CPU")
    if batch.micro_batch == "auto":
        # `devices` has no say in it: a run on 1 rank and on 4 must cut the same micro-batches. Hence the memory of
        # the usual number of ranks, and the gradient buffers of a rank that hosts everything.
        batch = replace(batch, micro_batch=fitting(config, accelerator, precision, device_memory(accelerator, usual)))
    config = replace(config, accelerator=accelerator, backend=backend, devices=devices)
    why = "take the places of lost ranks, which CPU ranks with whole states do in place: use 0"
    stand_by = config.heals and accelerator == "cpu"  # on a GPU a second process would take a rank's memory
    require(stand_by or not config.recovery.spares, "recovery.spares", why)
    return replace(config, precision=precision, compile=compiled, batch=batch)


def fitting(config: Train, accelerator: str, precision: str, there: int) -> int:
    """The micro-batch that `auto` is where a rank has so many bytes."""
    return flops.auto_micro_batch(
        config.model,
        vocabulary(config),
        config.batch.sequences // config.batch.virtual_ranks,
        budget_bytes=there,
        accelerator=accelerator,
        precision=precision,
        gradient_buffers=_gradient_buffers(config.batch.virtual_ranks, 1),
    )


def device_memory(accelerator: str, devices: int) -> int:
    """Bytes that one rank may take: of the smallest GPU, or of this machine's memory shared by its ranks."""
    if accelerator == "cuda":
        return min(gpu.memory for gpu in hardware.gpus())
    return hardware.memory() // devices


def vocabulary(config: Train) -> int:
    """The number of token ids that can be known before the data is prepared: an upper bound for a trained BPE."""
    return 257 if config.data.tokenizer.kind is TokenizerKind.bytes else config.data.tokenizer.vocab


def buffers(virtual_ranks: int, hosted: Sequence[int]) -> int:
    """Gradient buffers alive at once on a rank that hosts these virtual ranks.

    While the tree is folded in order, a buffer is alive for each finished left sibling, and one for the leaf at work.
    """
    alive = most = 0

    def leaf(node: Node) -> int | None:
        nonlocal alive, most
        if not node.is_leaf:
            return None
        alive += 1
        most = max(most, alive)
        return 1

    def add(left: int, right: int) -> int:
        nonlocal alive
        alive -= 1
        return left

    for node in maximal(hosted, root(virtual_ranks)):
        fold(node, leaf, add)
    return most


def _gradient_buffers(virtual_ranks: int, world: int) -> int:
    """Flat gradients alive at once on the rank with the most. The sum itself is written over the last leaf."""
    return max(buffers(virtual_ranks, share) for share in shares(virtual_ranks, world))


def memory(config: Train, vocab: int) -> flops.Memory:
    """What a rank of this (resolved) run needs, in bytes."""
    leaves, world = config.batch.virtual_ranks, int(config.devices) * config.least_nodes
    size, precision = int(config.batch.micro_batch), config.precision
    whole = flops.memory(config.model, vocab, micro_batch=size, precision=precision, accelerator=config.accelerator)
    if config.optimizer.kind is OptimizerKind.muon:  # one moment for the matrices inside layers
        whole = replace(whole, optimizer=whole.optimizer - 4 * flops.sizes(config.model, vocab).matrices)
    if config.accelerator == "cpu":  # a GPU's lies in the host's memory; ranks deal what they write among them
        whole = replace(whole, snapshot=(whole.gradients + whole.optimizer) // world)
    leaf, node = whole.gradients, whole.gradients // (2 if config.reduce.dtype == "bf16" else 1)
    if config.reduce.mode is ReduceMode.fast:
        return whole
    if config.sharding is not Sharding.full or world == 1:
        sums = (_gradient_buffers(leaves, world) - 1) * node
        share = 1 if config.sharding is Sharding.none else world
        return replace(whole, gradients=leaf + sums, optimizer=whole.optimizer // share)
    sizes = flops.sizes(config.model, vocab)
    outside = sizes.embedding + sizes.head + sizes.positions
    gathered = 4 * (outside + sizes.matrices // sizes.layers)  # a layer, and what is in none
    return replace(
        whole,
        weights=whole.weights - leaf + leaf // world + gathered,
        gradients=leaf + buffers(leaves, range(leaves)) * node // world,  # a leaf, and chunks of the tree's sums
        optimizer=whole.optimizer // world,
    )
