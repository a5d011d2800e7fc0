"""Our loop beside a bare one on the same model: `make bench`, or `python -m tests.bench.loop_overhead`.

The bare loop is what one writes by hand for one process: the same model, tokens, micro-batches, autocast, clipping
(`clip_grad_norm_`) and fused AdamW, gradients accumulated by autograd, the loss read once a step. Ours is what a
rank runs, assembled as `colossus train` assembles it, events included; only the pipe to the supervisor is a list.
Both live in one process with one thread and take turns (A B A B); the figures are medians over the turns.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import torch

from tests.bench import report
from train import compose, events, folder, optim, plan, pulse
from train.channel import Channel
from train.config import Train
from train.data.prepare import prepare
from train.data.stream import Stream
from train.group import Place
from train.loop import fit
from train.models.build import build
from train.pulse import Pulse
from train.run import Order, assemble

CASES = {  # name: overrides, steps a turn, turns
    "tiny": (
        [
            *("model=llama_micro", "model.layers=1", "model.width=32", "model.heads=2", "model.kv_heads=2"),
            *("model.ffn=64", "model.context=16", "batch.sequences=8", "data.tokenizer.vocab=256", "precision=fp32"),
        ],
        100,
        15,
    ),
    "10M": (["model=llama_mini", "model.layers=5", "batch.sequences=32", "data.tokenizer.vocab=2048"], 2, 7),
}


class Memory(Channel):
    """A channel whose events go nowhere but through JSON, as they would."""

    def __init__(self, path: Path) -> None:
        pulse.create(path)
        self.where, self.pulse = ("start", None), Pulse(path)
        self.lines: list[str] = []

    def send(self, event: events.Event) -> None:
        self.lines.append(events.line(event.record()))

    def stop_requested(self) -> bool:
        return False

    def membership(self) -> dict[str, Any]:
        return {"epoch": 1, "members": [0], "host": "", "port": 0}


def ours(config: Train, path: Path) -> Callable[[int], None]:
    """Returns what runs n more steps."""
    prepared, _ = prepare(config.data, seed=config.seed, context=config.model.context)
    with folder.RunFolder(path) as run:
        run.write(config, dataclasses.asdict(prepared))
    where: dict[str, Any] = {"folder": str(path), "record": str(path / "events.jsonl")}
    order = Order(**where, place=Place.alone(), threads=1, writer_epoch=1, resume=False, joins=False, left_out=[])
    recovery = assemble(config, order, Memory(path / "pulse"), None)
    recovery.regroup()
    state, parts = recovery.state, recovery.parts

    def run_steps(number: int) -> None:
        more = dataclasses.replace(parts.config, steps=state.step + number)
        fit(state, dataclasses.replace(parts, config=more, due=()))

    return run_steps


def bare(config: Train) -> Callable[[int], None]:
    prepared, _ = prepare(config.data, seed=config.seed, context=config.model.context)
    batch, stream = config.batch, Stream.of(config, prepared)
    model = build(config.model, prepared.vocab, seed=config.seed, device=torch.device("cpu"))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    o = config.optimizer
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)
    parameters = list(model.parameters())
    steps_done = 0

    def run_steps(number: int) -> None:
        nonlocal steps_done
        for _ in range(number):
            total = torch.zeros(())
            for v in range(batch.virtual_ranks):
                for i in range(batch.micro_batches):
                    tokens = torch.from_numpy(stream.micro_batch(steps_done, v, i))
                    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                        loss = model(tokens[:, :-1], tokens[:, 1:]) / config.tokens_per_step
                    loss.backward()
                    total += loss.detach()
            torch.nn.utils.clip_grad_norm_(parameters, o.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = optim.learning_rate(o, config.schedule, steps_done, config.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total.item()
            steps_done += 1

    return run_steps


def turns(loops: dict[str, Callable[[int], None]], steps: int, number: int) -> Iterator[dict[str, float]]:
    """Seconds a step of each loop, turn by turn; the first turn warms up and is dropped."""
    for turn in range(number + 1):
        measured = {}
        for name, run_steps in loops.items():
            start = time.perf_counter()
            run_steps(steps)
            measured[name] = (time.perf_counter() - start) / steps
        if turn:
            yield measured


def measure(case: str, workspace: Path) -> dict[str, Any]:
    overrides, steps, number = CASES[case]
    arguments = [*overrides, "data=synthetic", "data.synthetic_tokens=1000000", "devices=1", "accelerator=cpu"]
    arguments += ["steps=100000", "logger=[]", f"data.cache={workspace}/cache", f"runs={workspace}/runs"]
    config = plan.resolve(compose.config("train", arguments))
    seconds = list(turns({"bare": bare(config), "ours": ours(config, config.folder)}, steps, number))
    ratios = [measured["bare"] / measured["ours"] for measured in seconds]
    ours_s, bare_s = (statistics.median(measured[name] for measured in seconds) for name in ("ours", "bare"))
    model = build(config.model, config.data.tokenizer.vocab, seed=0, device=torch.device("meta"))
    return {
        "case": case,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": config.precision,
        "tokens_per_step": config.tokens_per_step,
        "micro_batches_per_step": config.batch.virtual_ranks * config.batch.micro_batches,
        "ours_tokens_per_s": config.tokens_per_step / ours_s,
        "bare_tokens_per_s": config.tokens_per_step / bare_s,
        "ratio_median": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "overhead_ms_per_step_median": 1e3 * statistics.median(m["ours"] - m["bare"] for m in seconds),
        "turns": number,
    }


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as workspace:
        results = [measure(case, Path(workspace)) for case in CASES]
    for result in results:
        low, high = result["ratio_range"]
        print(f"{result['case']}: {result['parameters'] / 1e6:.2f} M parameters, {result['precision']}")
        print(f"  ours {result['ours_tokens_per_s']:,.0f}, bare {result['bare_tokens_per_s']:,.0f} tokens/s")
        print(f"  ratio {result['ratio_median']:.3f} ({low:.3f} … {high:.3f})", end=", ")
        print(f"{result['overhead_ms_per_step_median']:+.2f} ms a step")
    report.write("loop_overhead", "make bench", lightning=lightning.__version__, results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
