"""`colossus replay`: a step of a run, computed again in one process, and whether its bits are those of the record."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice, product
from typing import Any

import torch
from rich.console import Console as Rich
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from train.checks import DONE, FAILED, Refused
from train.commands import Format
from train.commands import Replay as Config
from train.data.stream import IGNORED
from train.data.tokenizer import Tokenizer
from train.evidence import word
from train.folder import locate
from train.rerun import Checks, Rerun, different, read

EXCERPT = 100  # characters of a row that are shown
ROWS = 32  # that a table shows


@torch.no_grad()
def rows(again: Rerun, virtual_ranks: Iterable[int], most: int | None) -> list[dict[str, Any]]:
    """The sequences of the next step, forwarded one at a time without dropout: to be read, not for the bits."""
    stream, engine, found = again.parts.stream, again.engine, []
    tokenizer = Tokenizer.load(again.prepared.tokenizer)
    engine.model.eval()
    for v, i, row in islice(product(virtual_ranks, range(stream.micro_batches), range(stream.rows)), most):
        at = engine.state.step, v, i
        tokens, (source, epoch, shard, window) = stream.micro_batch(*at)[row], stream.places(*at)[row]
        ids = torch.from_numpy(tokens).unsqueeze(0).to(engine.fabric.device)
        with engine.fabric.autocast():
            inputs, targets = stream.sides(ids)
            loss = float(engine.model(inputs, targets)) / max(1, int((targets != IGNORED).sum()))
        place = {"virtual_rank": v, "micro_batch": i, "row": row, "source": source, "epoch": epoch, "shard": shard}
        document = stream.document(source, shard, window)  # the window may go on into the next ones
        text = tokenizer.decode((tokens % stream.vocab).tolist())[:EXCERPT]
        found.append({**place, "window": window, "document": document, "text": text, "loss": loss})
    engine.model.train()
    return found


def norms(again: Rerun, flat_tensor: Tensor) -> dict[str, float]:
    """L2 by layer, in the model's order: `blocks.0`, or the first part of the name."""
    named = again.engine.state.flat.named(flat_tensor.detach())
    sums: dict[str, float] = {}
    for name, _ in again.engine.model.named_parameters():
        first, second = [*name.split("."), ""][:2]
        layer = f"{first}.{second}" if second.isdigit() else first
        sums[layer] = sums.get(layer, 0.0) + float(named[name].double().square().sum())
    return {layer: square**0.5 for layer, square in sums.items()}


def replay(config: Config) -> int:
    """Exit code 0 where all bits agree, 1 where one differs."""
    run = read(config.run, locate(config.run))
    step, v, shown = config.step, config.virtual_rank, config.format is Format.table
    count = run.start(step).get("virtual_ranks", 0)
    if v >= count:
        raise Refused("virtual_rank", f"{v} is none of the {count} of this run, 0 … {count - 1}")
    if v >= 0 and "leaves" not in run.steps[step]:
        raise Refused("virtual_rank", f"no checksum of step {step} is on record: leave it out to compare loss and norm")
    again = Rerun(run, step, quiet=not shown)
    on_the_way = [number for number, bits in again.computed.items() if different(run.steps[number], bits)]
    chosen, flat = range(count) if v < 0 else [v], again.engine.state.flat
    sequences = rows(again, chosen, ROWS if shown and v < 0 else None)
    weights, recorded = norms(again, flat.parameters), run.steps[step]
    if v < 0:
        again.advance()
        computed, clip = again.computed[step], again.engine.config.optimizer.clip_norm
        scale = min(1.0, clip / (float(again.total.norm) + 1e-6)) if clip else 1.0  # the optimizer's step has clipped
        gradients = {layer: value / scale for layer, value in norms(again, again.total.gradient).items()}
    else:
        *_, buffer = again.leaf(v)
        parameters = again.checksums(flat.parameters, again.engine.config.evidence.parameters)
        leaf = {"tokens": [word(buffer.tokens)], "leaves": again.checksums(buffer.tensor)}
        computed = {"parameters": parameters, **leaf}
        recorded = {key: [value[v]] if key in leaf else value for key, value in recorded.items()}
        gradients = norms(again, buffer.tensor)
    checks = _results(recorded, computed, v)
    report: dict[str, Any] = {
        "run": config.run,
        "step": step,
        "virtual_rank": None if v < 0 else v,
        "from": again.base,
        "fingerprint": {key: {"recorded": old, "here": new} for key, (old, new) in again.foreign.items()},
        "on_the_way": on_the_way,
        "sequences": sequences,
        "layers": {layer: {"gradient": gradients[layer], "weights": weights[layer]} for layer in weights},
        "checks": checks,
        "agrees": not on_the_way and all(check["agrees"] for check in checks),
    }
    hidden = len(chosen) * again.engine.config.batch.sequences // count - len(sequences)
    config.format.tell(report, lambda report: _show(report, hidden))
    return DONE if report["agrees"] else FAILED


def _results(recorded: Checks, computed: Checks, v: int) -> list[dict[str, Any]]:
    """A line for each check: of lists, for each place in which they differ, or one for all."""
    wrong, found = different(recorded, computed), []
    for key in (key for key in recorded if key in computed):
        places: list[int | None] = [*wrong.get(key, [])]
        for at in places or [None]:
            old, new = (side[key] if at is None else side[key][at] for side in (recorded, computed))
            where = f" of virtual rank {at if v < 0 else v}" if key in ("tokens", "leaves") and at is not None else ""
            found.append({"what": f"{key}{where}", "agrees": key not in wrong, "recorded": old, "computed": new})
    return found


def _show(report: dict[str, Any], hidden: int) -> None:
    rich = Rich(soft_wrap=True, highlight=False)
    for key, both in report["fingerprint"].items():
        rich.print(f"ANOTHER MACHINE: {key} was {both['recorded']}, is {both['here']}: bits may differ for that alone")
    base = f"checkpoint {report['from']}" if report["from"] else "initialisation"
    part = "" if report["virtual_rank"] is None else f", virtual rank {report['virtual_rank']}"
    rich.print(f"step {report['step']} of {report['run']}{part}, computed from {base}")
    for row in report["sequences"]:
        place = f"virtual rank {row['virtual_rank']}, micro-batch {row['micro_batch']}, row {row['row']}"
        keys = ("source", "epoch", "shard", "window", "document")
        lies = ", ".join(f"{key} {row[key]}" for key in keys if row[key] is not None)
        rich.print(f"{place}: {lies}: loss {row['loss']:.4f}\n  │", Text(repr(row["text"])[1:-1]))
    if hidden:
        rich.print(f"… and {hidden} more: virtual_rank=N shows those of one, format=json all")
    table = Table("layer", Column("gradient", justify="right"), Column("weights", justify="right"), box=None)
    for layer, both in report["layers"].items():
        table.add_row(layer, f"{both['gradient']:.6f}", f"{both['weights']:.4f}")
    rich.print(table)
    for step in report["on_the_way"]:
        rich.print(f"step {step}, on the way, differs: see colossus replay step={step}")
    for check in report["checks"]:
        both = f"differs: recorded {check['recorded']}, computed {check['computed']}"
        rich.print(f"{check['what']:28} {'agrees' if check['agrees'] else both}", markup=False)
