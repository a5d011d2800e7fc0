"""What a save costs a step: `make bench-save`, or `python -m tests.bench.background_save`.

100 M parameters' state (float32 weights and two moments, 1.2 GB) on 1 and on 2 ranks, each with one thread, while a
loop like training's goes on: products of matrices, and between ranks an all-reduce. A save is begun once a round, by
the same `Saver` that a run has. Printed, as medians over the rounds:

    wait    what the step that saves waits, beside the time of a bare copy of the same bytes into a like buffer
    extra   how much longer the loop takes, from the save's beginning until it is whole, than the same work without,
            beside what must be paid anyway: the copy, and the writing threads' own CPU time (hashing and writing)
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from tests import dist
from tests.bench import report
from train import checkpoint
from train.config import Checkpoint
from train.flat import Piece
from train.group import Group
from train.saver import Saver

LAYERS, WIDTH = 24, 2048  # 24 x 2048 x 2048 = 100.7 M parameters
ROUNDS = 3


class Timed(Saver):
    """A saver that notes the CPU seconds of its thread."""

    cpu = 0.0

    def _work(self, *args: Any) -> None:
        before = time.thread_time()
        super()._work(*args)
        self.cpu = time.thread_time() - before


def on_rank(group: Group, root: str) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    saved = threading.Event()
    generator = torch.Generator().manual_seed(0)
    state = []
    for kind, prefix in (("model", ""), ("optimizer", "exp_avg."), ("optimizer", "exp_avg_sq.")):
        for layer in range(LAYERS):
            tensor = torch.rand(WIDTH, WIDTH, generator=generator)
            state.append(Piece(kind, f"{prefix}{layer}", tensor.shape, 0, tensor.view(-1), replicated=True))
    about, policy = {"writer_epoch": 1}, Checkpoint(keep=1)
    saver = Timed(Path(root), group, about=about, policy=policy, send=lambda event: saved.set())
    saver.regrouped(state, 0)
    a, done = torch.rand(768, 768, generator=generator), torch.zeros(1)

    def work(steps: int) -> float:
        """Seconds of `steps` steps."""
        start = time.perf_counter()
        for _ in range(steps):
            for _ in range(8):
                torch.mm(a, a)
            group.all_reduce(a.clone())
        return time.perf_counter() - start

    share = checkpoint.deal(state, group.rank, range(group.world))
    bare = checkpoint.Snapshot(share)
    figures: dict[str, list[float]] = {"copy": [], "wait": [], "extra": [], "cpu": [], "wall": [], "paid": []}
    work(8)
    for number in range(ROUNDS + 1):
        group.barrier()
        pace = work(16) / 16
        start = time.perf_counter()
        bare.take(share)
        copy = time.perf_counter() - start
        group.barrier()
        saved.clear()
        done.zero_()
        start = time.perf_counter()
        saver.save(number + 1, state, {})
        wait = time.perf_counter() - start
        steps = 0
        while not done.item():  # until rank 0 has committed; all ranks stop after the same step
            work(4)
            steps += 4
            done = group.all_reduce(torch.tensor([float(saved.is_set())]))
        wall = time.perf_counter() - start
        saver._join()
        cpu = group.all_reduce(torch.tensor([saver.cpu])).item() / group.world
        pace = (pace + work(16) / 16) / 2
        if number:  # the first round warms up
            for name, value in zip(figures, (copy, wait, wall - steps * pace, cpu, wall, copy + cpu), strict=True):
                figures[name].append(value)
    saver.finish()
    return figures


def main() -> int:
    dist.TIMEOUT = 900.0
    results = []
    for world in (1, 2):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as root:
            figures = dist.run("tests.bench.background_save:on_rank", world, root=root)[0]
        middle = {f"{name}_s": round(statistics.median(values), 4) for name, values in figures.items()}
        wait = [a / b for a, b in zip(figures["wait"], figures["copy"], strict=True)]
        extra = [a / b for a, b in zip(figures["extra"], figures["paid"], strict=True)]
        results.append(
            {
                "ranks": world,
                "parameters": LAYERS * WIDTH * WIDTH,
                "bytes": 12 * LAYERS * WIDTH * WIDTH,
                **middle,
                "wait_over_copy": statistics.median(wait),
                "wait_over_copy_range": [min(wait), max(wait)],
                "extra_over_copy_and_cpu": statistics.median(extra),
                "extra_over_copy_and_cpu_range": [min(extra), max(extra)],
                "rounds": ROUNDS,
            }
        )
        last = results[-1]
        print(f"{world} rank{'s' * (world > 1)}, {last['bytes'] / 1e9:.2f} GB:")
        print(f"  the step waits {middle['wait_s']:.3f} s, a copy takes {middle['copy_s']:.3f} s")
        print(
            f"  whole after {middle['wall_s']:.2f} s, which cost {middle['extra_s']:.2f} s of the loop's time:", end=" "
        )
        print(f"copy + CPU of writing and hashing are {middle['paid_s']:.2f} s")
    report.write("background_save", "make bench-save", results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
