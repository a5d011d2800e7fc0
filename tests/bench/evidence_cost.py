"""What checksums cost a step: `make bench-evidence`, or `python -m tests.bench.evidence_cost`.

The main job's model and batch with evidence.digests off, on, and on with evidence.parameters, in one process with one
thread, taking turns (A B C, C B A); the figures are medians of each turn's ratio to the turn without evidence. Seconds
are of the processor, not of the clock: other work on the machine counts less so. As the effect is smaller than the
noise of a whole step all the same, the passes over memory that checksums are made of, and those of the guard, are
measured by themselves too.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from typing import Any

import torch

from tests.bench import report
from tests.bench.loop_overhead import ours
from train import compose, optim, plan
from train.config import Train
from train.flat import Flat
from train.models.build import build

CASES = {"off": ["evidence.digests=false"], "steps": [], "parameters": ["evidence.parameters=true"]}
STEPS, TURNS = 3, 14


def passes(config: Train, vocab: int) -> tuple[float, float]:
    """CPU seconds of a step's checksums in one process, by themselves.

    In the record: of each virtual rank's gradient, the parameters and the sum. Of the guard: of parameters and moments
    when a step is committed and before the optimizer, of parameters before the sum; each rank pays it whole.
    """
    flat = Flat(build(config.model, vocab, seed=0, device=torch.device("cpu")))
    stored = optim.Stored(optim.build(config.optimizer, flat), flat)
    gradient = flat.buffer().tensor.normal_()
    recorded, guarded = [], []
    for _ in range(50):
        started = time.process_time()
        for _ in range(config.batch.virtual_ranks + 2):
            int(flat.checksum(gradient, 0).sum())
        recorded.append(time.process_time() - started)
        started = time.process_time()
        for tensors in (None, stored.parameters(), None):
            stored.checksum(tensors)
        guarded.append(time.process_time() - started)
    return statistics.median(recorded), statistics.median(guarded)


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as workspace:
        common = ["data=synthetic", "data.synthetic_tokens=1000000", "devices=1", "accelerator=cpu", "steps=100000"]
        common += ["logger=[]", f"data.cache={workspace}/cache", f"runs={workspace}/runs"]
        configs = {
            case: plan.resolve(compose.config("train", [*common, *more, f"name={case}"]))
            for case, more in CASES.items()
        }
        loops = {case: ours(config, config.folder) for case, config in configs.items()}
        seconds = []
        for turn in range(TURNS + 1):
            measured = {}
            for case in sorted(loops, reverse=bool(turn % 2)):
                started = time.process_time()
                loops[case](STEPS)
                measured[case] = (time.process_time() - started) / STEPS
            seconds += [measured] if turn else []  # the first one warms up
    tokens = configs["off"].tokens_per_step
    alone, guard = passes(configs["off"], configs["off"].data.tokenizer.vocab)
    step = statistics.median(measured["off"] for measured in seconds)
    results: dict[str, Any] = {}
    for case in CASES:
        ratios = [measured["off"] / measured[case] for measured in seconds]
        results[case] = {
            "tokens_per_cpu_s": tokens / statistics.median(measured[case] for measured in seconds),
            "ratio_median": statistics.median(ratios),
            "ratio_quartiles": [statistics.quantiles(ratios, n=4)[0], statistics.quantiles(ratios, n=4)[2]],
            "ratio_range": [min(ratios), max(ratios)],
        }
    for case, result in results.items():
        low, high = result["ratio_quartiles"]
        ratio = f"{result['ratio_median']:.3f} ({low:.3f} … {high:.3f})"
        print(f"{case:10} {result['tokens_per_cpu_s']:,.0f} tokens per CPU second, {ratio} of what there is without")
    print(f"the checksums by themselves: {1e3 * alone:.2f} ms a step, {100 * alone / step:.2f} % of it")
    print(f"the guard by itself: {1e3 * guard:.2f} ms a step, {100 * guard / step:.2f} % of it")
    report.write(
        "evidence_cost",
        "make bench-evidence",
        model="llama_nano",
        precision=configs["off"].precision,
        tokens_per_step=tokens,
        steps_a_turn=STEPS,
        turns=TURNS,
        results=results,
        step_cpu_s=step,
        checksums_cpu_s=alone,
        checksums_share_of_a_step=alone / step,
        guard_cpu_s=guard,
        guard_share_of_a_step=guard / step,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
