"""`colossus replay`: a step of a run, computed again in one process, and whether its bits are those of the record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console as Rich
from rich.table import Table
from rich.text import Text
from torch import Tensor

from train import record
from train.commands import Replay as Config
from train.config import DONE, FAILED, Refused
from train.console import Console
from train.data.tokenizer import Tokenizer
from train.folder import locate
from train.record import Checks
from train.rerun import Rerun

EXCERPT = 100  # characters of a row that are shown
ROWS = 32  # that a table shows


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence of a step: where it lies, how it begins, and what the model makes of it."""

    virtual_rank: int
    micro_batch: int
    row: int
    source: int
    epoch: int
    shard: int
    window: int
    document: int | None  # of the shard; the window may go on into the next ones
    text: str
    loss: float  # nats per token, without dropout


@torch.no_grad()
def rows(again: Rerun, virtual_ranks: Iterable[int], most: int | None) -> list[Row]:
    """The sequences of the next step, forwarded one at a time: to be read, not for the bits."""
    stream, engine = again.parts.stream, again.engine
    found: list[Row] = []
    tokenizer = Tokenizer.load(again.prepared.tokenizer)
    engine.model.eval()
    step = engine.state.step
    order = [(v, i) for v in virtual_ranks for i in range(engine.config.batch.micro_batches)]
    for v, i in order:
        for row, (tokens, place) in enumerate(
            zip(stream.micro_batch(step, v, i), stream.places(step, v, i), strict=True)
        ):
            if most is not None and len(found) == most:
                break
            ids = torch.from_numpy(tokens).unsqueeze(0).to(engine.fabric.device)
            with engine.fabric.autocast():
                loss = float(engine.model(ids[:, :-1], ids[:, 1:])) / stream.context
            source, epoch, shard, window = place
            text = tokenizer.decode(tokens.tolist())[:EXCERPT]
            at = stream.document(source, shard, window)
            found.append(Row(v, i, row, source, epoch, shard, window, at, text, loss))
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
    run = record.read(config.run, locate(config.run))
    step, v, shown = config.step, config.virtual_rank, config.format == "table"
    count = run.start(step).get("virtual_ranks", 0)
    if v >= count:
        raise Refused("virtual_rank", f"{v} is none of the {count} of this run, 0 … {count - 1}")
    console = Console()

    def tell(done: int, steps: int) -> None:
        if shown:
            console.progress(f"computing {steps} steps on the way", done, steps)

    again = Rerun(run, step - 1, tell)
    console.close()
    again.settle(step)
    on_the_way = [number for number in again.computed if again.different(number)]
    chosen = range(count) if v < 0 else [v]
    sequences = rows(again, chosen, ROWS if shown and v < 0 else None)
    weights, recorded = norms(again, again.engine.state.flat.parameters), again.recorded(step)
    if v < 0:
        again.advance(step)
        computed, clip = again.computed[step], again.engine.config.optimizer.clip_norm
        norm = float(again.total.norm)
        scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0  # the optimizer's step has clipped it
        gradients = {layer: value / scale for layer, value in norms(again, again.total.gradient).items()}
    else:
        computed, gradient = again.leaf(v)
        gradients = norms(again, gradient)
        parts = {key: [recorded[key][v]] for key in ("tokens", "leaves") if key in recorded}
        recorded = {key: recorded[key] for key in ("parameters",) if key in recorded} | parts
    checks = _results(recorded, computed, v)
    report: dict[str, Any] = {
        "run": config.run,
        "step": step,
        "virtual_rank": None if v < 0 else v,
        "from": again.base,
        "fingerprint": {key: {"recorded": old, "here": new} for key, (old, new) in again.foreign.items()},
        "on_the_way": on_the_way,
        "sequences": [asdict(row) for row in sequences],
        "layers": {layer: {"gradient": gradients[layer], "weights": weights[layer]} for layer in weights},
        "checks": checks,
        "agrees": not on_the_way and all(check["agrees"] for check in checks),
    }
    if shown:
        _show(report, hidden=len(chosen) * again.engine.config.batch.sequences // count - len(sequences))
    else:
        print(json.dumps(report))
    return DONE if report["agrees"] else FAILED


def _results(recorded: Checks, computed: Checks, v: int) -> list[dict[str, Any]]:
    """A line for each check: of lists, for each place in which they differ, or one for all."""
    wrong, found = record.different(recorded, computed), []
    for key in recorded.keys() & computed.keys():
        places: list[int | None] = [*wrong.get(key, [])]
        for at in places or [None]:
            old, new = (side[key] if at is None else side[key][at] for side in (recorded, computed))
            where = f" of virtual rank {at if v < 0 else v}" if key in ("tokens", "leaves") and at is not None else ""
            found.append({"what": f"{key}{where}", "agrees": key not in wrong, "recorded": old, "computed": new})
    return sorted(found, key=lambda check: list(recorded).index(check["what"].split(" of ")[0]))


def where(row: Mapping[str, Any]) -> str:
    """A sequence in words: its place in the step, and where it lies."""
    document = "" if row["document"] is None else f", document {row['document']}"
    place = f"virtual rank {row['virtual_rank']}, micro-batch {row['micro_batch']}, row {row['row']}"
    return (
        f"{place}: source {row['source']}, epoch {row['epoch']}, shard {row['shard']}, window {row['window']}{document}"
    )


def _show(report: dict[str, Any], hidden: int) -> None:
    rich = Rich(soft_wrap=True, highlight=False)
    for key, both in report["fingerprint"].items():
        rich.print(f"ANOTHER MACHINE: {key} was {both['recorded']}, is {both['here']}: bits may differ for that alone")
    base = f"checkpoint {report['from']}" if report["from"] else "initialisation"
    part = "" if report["virtual_rank"] is None else f", virtual rank {report['virtual_rank']}"
    rich.print(f"step {report['step']} of {report['run']}{part}, computed from {base}")
    for row in report["sequences"]:
        rich.print(f"{where(row)}: loss {row['loss']:.4f}\n  │", Text(repr(row["text"])[1:-1]))
    if hidden:
        rich.print(f"… and {hidden} more: virtual_rank=N shows those of one, format=json all")
    table = Table(box=None)
    for column in ("layer", "gradient", "weights"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer, both in report["layers"].items():
        table.add_row(layer, f"{both['gradient']:.6f}", f"{both['weights']:.4f}")
    rich.print(table)
    for step in report["on_the_way"]:
        rich.print(f"step {step}, on the way, differs: see colossus replay step={step}")
    for check in report["checks"]:
        both = f"differs: recorded {check['recorded']}, computed {check['computed']}"
        rich.print(f"{check['what']:28} {'agrees' if check['agrees'] else both}", markup=False)
