"""What exactness costs: `make bench-price`, or `python -m tests.bench.price`; of the sum alone: `make bench-sum`.

Beside the best inexact run that we can write (as many virtual ranks as ranks, the largest micro-batch, the backend's
all-reduce in buckets that overlap the backward, no checksums) runs the exact one, and between the two every step of
the way, so that the parts of the price add up. All variants live in the same processes, one thread a rank, on the
same model and tokens, and take turns, the best run before each of the others; a figure is the median of the ratios
of neighbouring steps. On a GPU deterministic kernels are a part of their own; on a CPU there is nothing to force.

The sum alone is a smaller part than the noise of eight turns: it gets thirty by itself, in each of which the two steps
come in the other order than in the one before.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from tests import dist
from tests.bench import report
from train import compose, engine, optim, plan
from train.batch import micro_batch_seed
from train.config import Train
from train.group import Group
from train.models.build import build
from train.ranks import Ranks

SEQUENCES, LARGEST = 64, 8  # of the global batch; of a forward pass: more were not faster here
BEST = "fast sum, free micro-batch"
VARIANTS = {  # from the best inexact run to the exact one, a change at a time
    BEST: ["reduce=fast", "batch.virtual_ranks={world}", "evidence.digests=false"],
    "exact sum": ["batch.virtual_ranks={world}", "evidence.digests=false"],
    "exact sum, V = 8": ["evidence.digests=false"],
    "exact": [],
    "exact, sharding=optimizer": ["sharding=optimizer"],
    "exact, reduce.dtype=bf16": ["reduce.dtype=bf16"],
}


def config_of(overrides: list[str], world: int) -> Train:
    more = [override.format(world=world) for override in overrides]
    shape = [f"batch.sequences={SEQUENCES}", f"devices={world}", "accelerator=cpu", "data=synthetic", "name=price"]
    config = plan.resolve(compose.config("train", [*shape, *more]))
    config.batch.micro_batch = min(LARGEST, SEQUENCES // config.batch.virtual_ranks)
    return config


def trainer(config: Train, ranks: Ranks) -> tuple[Callable[[], None], Callable[[], int]]:
    """A step of training, and the bytes of the gradient buffers it keeps."""
    model = build(config.model, config.data.tokenizer.vocab, seed=0, device=torch.device("cpu"))
    flat, reducer = engine.laid_out(config, ranks, model)
    optimizer = optim.build(config.optimizer, flat)
    shape = (int(config.batch.micro_batch), config.model.context + 1)
    done = 0

    def step() -> None:
        nonlocal done
        for v, buffer in reducer.leaves():
            for i in range(config.batch.micro_batches):
                torch.default_generator.manual_seed(micro_batch_seed(0, done, v, i))
                tokens = torch.randint(config.data.tokenizer.vocab, shape)
                with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                    loss = model(tokens[:, :-1], tokens[:, 1:]) / config.tokens_per_step
                loss.backward()
                buffer.loss += loss.detach()
        total = reducer.finish()
        flat.step(optimizer.step, total.gradient, total.norm, config.optimizer.clip_norm)
        reducer.spread()
        float(total.loss)
        done += 1

    def held() -> int:
        return sum(b.tensor.numel() * b.tensor.element_size() for b in [*reducer._free, *reducer._taken])

    return step, held


def measure(group: Group, names: list[str], turns: int) -> dict[str, Any]:
    """Seconds of a step of each variant, and of the best one's step beside it, by turn."""
    ranks = Ranks.default()
    loops = {name: trainer(config_of(VARIANTS[name], group.world), ranks) for name in names}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}

    def timed(name: str) -> float:
        ranks.all_gather(torch.zeros(1))  # all begin at once
        began = time.perf_counter()
        loops[name][0]()
        return time.perf_counter() - began

    for turn in range(turns + 1):  # the first one warms up
        for name in loops:
            order = [BEST, name][:: 1 if turn % 2 else -1]
            one, other = timed(order[0]), timed(order[1])
            if turn:
                seconds[name].append((one, other) if turn % 2 else (other, one))
    return {"seconds": seconds, "gradients": {name: held() for name, (_, held) in loops.items()}}


def report_of(world: int, names: list[str], turns: int) -> dict[str, Any]:
    measured = dist.run("tests.bench.price:measure", world, names=names, turns=turns)[0]
    config = config_of([], world)
    rows = []
    for name, seconds in measured["seconds"].items():
        ratios = [best / own for best, own in seconds]
        rows.append(
            {
                "variant": name,
                "tokens_per_s": config.tokens_per_step / statistics.median(own for _, own in seconds),
                "of_best_median": statistics.median(ratios),
                "of_best_quartiles": statistics.quantiles(ratios, n=4)[::2],
                "gradient_buffers_bytes": measured["gradients"][name],
            }
        )
    return {
        "ranks": world,
        "model": "llama_nano",
        "precision": config.precision,
        "tokens_per_step": config.tokens_per_step,
        "turns": turns,
        "variants": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sum", action="store_true", help="the exact sum alone, beside the backend's all-reduce")
    options = parser.parse_args()
    dist.TIMEOUT = 3600.0
    names, turns = ([BEST, "exact sum"], 30) if options.sum else (list(VARIANTS), 8)
    results = [report_of(world, names, turns) for world in (2, 4)]
    for result in results:
        print(f"{result['ranks']} ranks, {result['tokens_per_step']:,} tokens a step, {result['precision']}")
        for row in result["variants"]:
            low, high = row["of_best_quartiles"]
            print(f"  {row['variant']:28} {row['tokens_per_s']:8,.0f} tokens/s", end="")
            print(f"  {row['of_best_median']:.3f} of the best (quartiles {low:.3f} … {high:.3f})", end="")
            print(f"  {row['gradient_buffers_bytes'] / 2**20:.0f} MiB of gradients")
    name, command = ("sum", "make bench-sum") if options.sum else ("price", "make bench-price")
    report.write(name, command, cores=torch.get_num_threads(), results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
