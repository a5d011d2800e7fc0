"""`colossus plan`: what a run would be before it begins: memory and what would make it fit, time, disk, money.

Times are the projector's (train/scale): of this machine where its GPUs have figures or `colossus probe` has measured
its CPU, and of up to eight rented GPUs at the prices of configs/economy.yaml, each with its date.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train import flops, hardware
from train.batch import shares
from train.checks import DONE, Refused, needed
from train.commands import Plan, Scale
from train.config import Sharding, Train
from train.economy import prices
from train.folder import read_json, read_train
from train.plan import device_memory, fitting, memory, resolve, vocabulary
from train.scale import here
from train.scale.hardware import Gpu, gpus
from train.scale.project import Anchor
from train.scale.workload import of_model

RENTED = 8  # GPUs of a cloud's node


def plan(config: Plan) -> int:
    """Exit code 0 whether it fits or not; `fits` says so."""
    resolved = resolve(config)
    vocab, batch = vocabulary(resolved), resolved.batch
    needed, there = memory(resolved, vocab), device_memory(resolved.accelerator, int(resolved.devices))
    tokens, per_token = resolved.steps * resolved.tokens_per_step, flops.flops_per_token(resolved.model, vocab)
    parameters, seconds = flops.parameters(resolved.model, vocab), _here(resolved, vocab)
    facts: dict[str, Any] = {
        "parameters": parameters,
        "active_parameters": flops.active_parameters(resolved.model, vocab),
        "flops_per_token": per_token,
        "tokens_per_step": resolved.tokens_per_step,
        "tokens": tokens,
        "flops": per_token * tokens,
        "accelerator": resolved.accelerator,
        "ranks": int(resolved.devices) * resolved.least_nodes,
        "virtual_ranks": batch.virtual_ranks,
        "micro_batches": batch.micro_batches,
        "micro_batch": batch.micro_batch,
        "precision": resolved.precision,
        "bytes_per_rank": needed.total,
        "bytes": asdict(needed),
        "bytes_there": there,
        "fits": needed.total <= there,
        "would_fit": [words for words, size in _smaller(resolved, vocab) if size <= there < needed.total],
        "disk_bytes": 12 * parameters * (resolved.checkpoint.keep + 1),  # fp32 weights and moments; one being written
        "step_seconds": seconds,
        "seconds": seconds and seconds * resolved.steps,
        "rented": list(_rented(resolved, vocab, auto=config.batch.micro_batch == "auto")),
    }
    config.format.tell(facts, _show)
    return DONE


def step_seconds(config: Train, vocab: int, gpu: Gpu, ranks: int) -> float:
    """A step of a resolved run as the projector predicts it; all wait for the rank with the most."""
    leaves, batch = config.batch.virtual_ranks, config.batch.sequences
    return here.seconds(
        gpu,
        of_model(config.model, vocab),
        ranks=ranks,
        batch=max(len(one) for one in shares(leaves, ranks)) * ranks * batch // leaves,
        micro_batch=int(config.batch.micro_batch),
        precision=config.precision,
        sharding=config.sharding.value,
        compiled=config.compiles,
    )


def asked(path: Path, scale: Scale) -> tuple[Train, Scale]:
    """A run's settings, and as a question to the projector: what `scale` leaves open is the run's. Raises Refused."""
    config = read_train(path / "config.yaml")
    tokens, batch = scale.tokens or float(config.steps * config.tokens_per_step), scale.batch or config.batch.sequences
    return config, replace(scale, model=config.model, vocab=_vocab(path), batch=batch, tokens=tokens)


def _vocab(path: Path) -> int:
    """The number of token ids that a run was trained on."""
    why = f"{path} has no data.json: a run must have begun before it can be projected"
    vocab = needed(read_json(path / "data.json"), "run", why).get("vocab")
    if not isinstance(vocab, int):
        raise Refused(str(path / "data.json"), "does not say how many token ids the run has")
    return vocab


def anchor(path: Path, start: dict[str, Any] | None, tokens_per_s: float | None) -> Anchor:
    """A run's own step time, and what is predicted of it where it ran. `start`: its last event of that kind."""
    if not start or not tokens_per_s:
        raise Refused("run", f"{path} has measured no throughput yet: it needs log.every steps")
    config = read_train(path / "config.yaml")
    ran = replace(config, precision=start["precision"], compile=start["compiled"])
    seconds = step_seconds(ran, _vocab(path), here.of(start["device"]), start["world"])
    return Anchor(path.resolve().name, start["world"], start["device"], config.tokens_per_step / tokens_per_s, seconds)


def _here(config: Train, vocab: int) -> float | None:
    """None where nothing is known of this machine."""
    try:
        device = here.of(hardware.gpus()[0].name if config.accelerator == "cuda" else "cpu")
        return step_seconds(config, vocab, device, int(config.devices) * config.least_nodes)
    except Refused:
        return None


def _rented(config: Train, vocab: int, auto: bool) -> Iterator[dict[str, Any]]:
    """The run on a cloud's node, in bf16, compiled if it can be: hours and dollars. Left out where it does not fit.

    `auto`: micro-batches as that GPU's memory has room for, and not this machine's.
    """
    compiled = config.sharding is not Sharding.full
    ranks, cloud = min(RENTED, config.batch.virtual_ranks), replace(config, precision="bf16", compile=compiled)
    for gpu, offers in ((gpus()[key], offers) for key, offers in prices().items() if key != "core"):
        size = fitting(config, "cuda", "bf16", int(gpu.memory)) if auto else config.batch.micro_batch
        rented = replace(cloud, accelerator="cuda", batch=replace(config.batch, micro_batch=size))
        if memory(rented, vocab).total <= gpu.memory:
            hours = config.steps * step_seconds(rented, vocab, gpu, ranks) / 3600
            for offer in offers:
                told = {"gpus": f"{ranks} {gpu.name}", "hours": hours, "usd": hours * ranks * offer["value"]}
                yield told | {key: str(offer[key]) for key in ("cloud", "date", "source", "tag")}


def _smaller(config: Train, vocab: int) -> Iterator[tuple[str, int]]:
    """Single changes that need less memory, the cheapest first, and the bytes that a rank needs then."""
    size, world = int(config.batch.micro_batch), int(config.devices) * config.least_nodes
    config = replace(config, compile=False)  # which sharding=full wants, and has no say in what is counted
    for smaller in (size // 2, 1):
        if 0 < smaller < size:
            cut = replace(config, batch=replace(config.batch, micro_batch=smaller))
            yield f"batch.micro_batch={smaller}", memory(cut, vocab).total
    again = replace(config, model=replace(config.model, checkpoint_activations="full"))
    yield "model.checkpoint_activations=full", memory(again, vocab).total
    for kind in (Sharding.optimizer, Sharding.full) if world > 1 else ():
        yield f"sharding={kind.value}", memory(replace(config, sharding=kind), vocab).total
    small = replace(again, batch=replace(config.batch, micro_batch=1), sharding=Sharding.full)
    for ranks in (n for n in (2, 4, 8, 16, 32) if world < n <= config.batch.virtual_ranks):
        words = f"sharding=full, micro_batch=1, checkpoint_activations=full on {ranks} ranks with as much memory each"
        yield words, memory(replace(small, devices=ranks, nodes=1), vocab).total


def _show(facts: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in facts.items():
        if key == "rented":
            told = "{hours:,.3g} h, {usd:,.2f} USD ({tag}, {date}): {gpus}, {cloud}".format_map
            rows = [told(one) for one in value]
        elif key == "would_fit":
            rows = [f"with {change}" for change in value] or ["nothing that is known" * (not facts["fits"])]
        elif key == "bytes":
            rows = [f"{size:,} {name}" for name, size in value.items()]
        elif value is None:
            rows = ["not known: `colossus probe` measures a CPU, a GPU needs figures in configs/hardware"]
        elif isinstance(value, bool) or not isinstance(value, int | float):
            rows = [str(value)]
        else:
            rows = [f"{value:,}" if isinstance(value, int) else f"{value:,.4g} (predicted)"]
        for row in rows:
            table.add_row(key.replace("_", " "), row)
    Console(soft_wrap=True, highlight=False).print(table)
