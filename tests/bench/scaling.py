"""More ranks, the same work or more of it: `make bench-scaling`, or `python -m tests.bench.scaling`.

The model and step of `tests.bench.peers`, ours alone, bf16, one thread a rank, as `colossus train` runs it: 1, 2, 4 and
8 ranks. Strong: 16 sequences a step, whoever computes them. Weak: 8 sequences a rank. All live at the same time and
take turns, in an order that is reversed every other round; efficiency is of tokens/s beside one rank in the same round,
divided by the ranks. Ranks beyond the machine's cores share them: such a row says how much that costs, not how it would
scale, and is marked. No network is between the ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench import peers, report
from tests.bench.work import Job
from train import compose, plan
from train.data.prepare import prepare
from train.folder import RunFolder

RANKS = (1, 2, 4, 8)


def player(ranks: int, sequences: int, workspace: Path, stack: ExitStack) -> peers.Player:
    overrides = [
        *peers.work("gpt2"),
        f"batch.sequences={sequences}",
        f"name=ranks-{ranks}",
        f"devices={ranks}",
        f"runs={workspace}",
    ]
    overrides += ["precision=bf16", "compile=false"]
    config = plan.resolve(compose.config("train", overrides))
    prepared, _ = prepare(config.data, seed=config.seed, context=config.model.context)
    with RunFolder(config.folder) as run:
        run.write(config, dataclasses.asdict(prepared))
    about = {"vocab": prepared.vocab, "threads": 1, "rank": 0, "world": ranks, "port": 0}
    job = Job(overrides=tuple(overrides), folder=str(config.folder), rows="", nanogpt="", **about)  # type: ignore[arg-type]
    found = peers.Player("ours", job, stack)
    found.answer()
    return found


def measure(weak: bool, rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as workspace, ExitStack() as stack:
        sequences = {ranks: 8 * ranks if weak else 16 for ranks in RANKS}
        players = {ranks: player(ranks, sequences[ranks], Path(workspace), stack) for ranks in RANKS}
        rates = []
        for number in range(rounds + 1):  # the first one warms up
            turns = {ranks: players[ranks].turn(1) for ranks in RANKS[:: -1 if number % 2 else 1]}
            rates.append({ranks: 256 * sequences[ranks] / seconds for ranks, seconds in turns.items()})
    rows = []
    for ranks in RANKS:
        shares = [rate[ranks] / rate[1] / ranks for rate in rates[1:]]
        rows.append(
            {
                "weak": weak,
                "ranks": ranks,
                "cores_shared": ranks > (os.cpu_count() or 1),
                "tokens_per_step": 256 * sequences[ranks],
                "tokens_per_s": statistics.median(rate[ranks] for rate in rates[1:]),
                "efficiency_median": statistics.median(shares),
                "efficiency_quartiles": statistics.quantiles(shares, n=4)[::2] if rounds > 1 else shares * 2,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("strong", "weak"), help="one of the two")
    options = parser.parse_args()
    rows = [
        row
        for kind in ("strong", "weak")
        if options.only in (None, kind)
        for row in measure(kind == "weak", options.rounds)
    ]
    for row in rows:
        low, high = row["efficiency_quartiles"]
        print(
            f"{'weak' if row['weak'] else 'strong':6} {row['ranks']} ranks {row['tokens_per_s']:8,.0f} tokens/s", end=""
        )
        print(f"  efficiency {row['efficiency_median']:.3f} ({low:.3f} … {high:.3f})", end="")
        print(f"  more ranks than {os.cpu_count()} cores" if row["cores_shared"] else "")
    report.write("scaling", "make bench-scaling", cores=os.cpu_count(), rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
