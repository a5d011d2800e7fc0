"""How long a job stands still under torchrun when a rank is killed: `make bench-torchrun`, beside `make bench-stall`.

torchrun's agent restarts all ranks when one fails; they read the last checkpoint and go on. The job is the smallest one
that does that honestly: gloo, an all-reduce of as many bytes as a model has gradients, a checkpoint of weights and two
moments after every step, so that nothing is computed again, and a sleep in the place of the computation. It imports
torch and numpy and nothing else: a real job imports more, and compiles. Ranks that do not find each other within ten
seconds after a restart end, and are started once more: with gloo's half hour two of them waited for ever. Of each kill,
in seconds: from it to the end of the next step of rank 0, without that step's own time.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from tests.bench import report
from train.ledger import quantile

JOB = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import numpy as np, torch, torch.distributed as dist
folder, size, compute = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=10))
rank = dist.get_rank()
state, gradient, step = np.zeros(3 * size, np.float32), torch.ones(size), 0
if (folder / "state.npy").exists():
    state = np.load(folder / "state.npy", allow_pickle=False)
    step = int(state[0])
(folder / f"pid-{rank}").write_text(str(os.getpid()))
while True:
    time.sleep(compute)
    dist.all_reduce(gradient)
    step += 1
    state[0] = step
    if rank == 0:
        np.save(folder / "draft.npy", state)
        os.replace(folder / "draft.npy", folder / "state.npy")
        with (folder / "steps").open("a") as log:
            log.write(f"{time.time()}\\n")
    dist.barrier()
"""


def lines(path: Path) -> list[float]:
    return [float(line) for line in path.read_text().split()] if path.exists() else []


def stalls(ranks: int, size: int, compute: float, count: int, folder: Path) -> list[float]:
    """Seconds without a step at each of `count` kills of random ranks, beside what a step takes."""
    (folder / "job.py").write_text(JOB)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["--max-restarts=1000", str(folder / "job.py"), str(folder), str(size), str(compute)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    agent = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rng, found = random.Random(0), []
    try:
        for _ in range(count):
            seen = len(lines(folder / "steps"))
            while len(lines(folder / "steps")) < seen + 10:
                time.sleep(0.01)
            last = lines(folder / "steps")[-10:]
            usual = statistics.median(b - a for a, b in pairwise(last))
            pid = int((folder / f"pid-{rng.randrange(ranks)}").read_text())
            time.sleep(rng.random() * usual)
            at = time.time()
            os.kill(pid, signal.SIGKILL)
            time.sleep(2 * usual)  # a step that was about to end
            while not (after := [t for t in lines(folder / "steps") if t > at + 2 * usual]):
                time.sleep(0.01)
            found.append(after[0] - at - usual)
    finally:
        agent.terminate()
        agent.wait(30)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=8, help="kills of each kind of job")
    parser.add_argument("--compute", type=float, default=0.05, help="seconds of a step before its all-reduce")
    arguments = parser.parse_args()
    rows = []
    for parameters in (668_544, 2_000_000):
        for ranks in (2, 4):
            with tempfile.TemporaryDirectory() as folder:
                seconds = stalls(ranks, parameters, arguments.compute, arguments.count, Path(folder))
            half, worst = quantile(seconds, 0.5), max(seconds)
            stall = {"p50": half, "worst": worst}
            rows.append({"parameters": parameters, "ranks": ranks, "kills": len(seconds), "stall_s": stall})
            print(f"{parameters:,} parameters, {ranks} ranks: p50 {half:.2f} s, worst {worst:.2f} s of {len(seconds)}")
    report.write("torchrun", "make bench-torchrun", compute_s=arguments.compute, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
