"""How long a job stands still under torchrun when a rank is killed: `make bench-torchrun`, beside `make bench-stall`.

torchrun's agent restarts all ranks when one fails; they read the last checkpoint and go on. The job is the smallest one
that does that honestly: gloo, an all-reduce of as many bytes as a model has gradients, a checkpoint of weights and two
moments after every step, so that nothing is computed again, and a sleep in the place of the computation. It imports
torch and numpy and nothing else: a real job imports more, and compiles. Ranks that do not find each other within ten
seconds after a restart end, and are started once more: with gloo's half hour two of them waited for ever. With the
agent's own store (`TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`) they find each other more often than with the default.
Of each kill, in seconds: from it to the end of the next step of rank 0, without that step's own time. Where no step
follows within `--patience` seconds the row says so, and has the kills before.
"""

from __future__ import annotations

import argparse
import contextlib
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
from typing import Any

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


def steps(log: Path, count: int, moment: float, patience: float) -> list[float]:
    """When the first `count` steps after a moment ended; fewer where there are no more within so many seconds."""
    end = time.monotonic() + patience
    while len(found := [t for t in lines(log) if t > moment]) < count and time.monotonic() < end:
        time.sleep(0.02)
    return found[:count]


def stalls(ranks: int, size: int, compute: float, count: int, patience: float, folder: Path) -> list[float]:
    """Seconds without a step at each of `count` kills of random ranks, beside what a step takes; up to the one after
    which no more steps were taken."""
    (folder / "job.py").write_text(JOB)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["--max-restarts=1000", str(folder / "job.py"), str(folder), str(size), str(compute)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    agent = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rng, found, log = random.Random(0), [], folder / "steps"
    try:
        for _ in range(count):
            if len(last := steps(log, 10, time.time(), patience)) < 10:
                break
            usual = statistics.median(b - a for a, b in pairwise(last))
            pid = int((folder / f"pid-{rng.randrange(ranks)}").read_text())
            time.sleep(rng.random() * usual)
            at = time.time()
            os.kill(pid, signal.SIGKILL)
            time.sleep(2 * usual)  # a step that was about to end
            if not (after := steps(log, 1, at + 2 * usual, patience)):
                break
            found.append(after[0] - at - usual)
    finally:
        agent.terminate()
        try:
            agent.wait(60)
        except subprocess.TimeoutExpired:  # it waits for ranks that wait for each other
            for pid in [agent.pid, *(int(path.read_text()) for path in folder.glob("pid-*"))]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=8, help="kills of each kind of job")
    parser.add_argument("--compute", type=float, default=0.05, help="seconds of a step before its all-reduce")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for the next step")
    parser.add_argument("--parameters", type=int, nargs="+", default=[668_544, 2_000_000])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for parameters in arguments.parameters:
        for ranks in (2, 4):
            with tempfile.TemporaryDirectory() as folder:
                each = (arguments.compute, arguments.count, arguments.patience, Path(folder))
                seconds = stalls(ranks, parameters, *each)
            stall = {"p50": quantile(seconds, 0.5), "worst": max(seconds)} if seconds else None
            rows.append({"parameters": parameters, "ranks": ranks, "kills": len(seconds), "stall_s": stall})
            if len(seconds) < arguments.count:
                rows[-1]["stuck"] = f"no step within {arguments.patience:g} s of kill {len(seconds) + 1}"
            print(rows[-1], flush=True)
    given = f" ARGS='{' '.join(sys.argv[1:])}'" if len(sys.argv) > 1 else ""
    report.write(
        "torchrun",
        f"make bench-torchrun{given}",
        load_average=os.getloadavg()[0],
        compute_s=arguments.compute,
        rows=rows,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
