"""How long survivors stand still under torchft when a rank is killed: `make bench-torchft`, beside `make bench-stall`.

torchft (`pip install torchft`; 0.2.0 was measured) has a lighthouse say, step by step, which replicas take part: those
that are left go on, and a replacement gets the state from one of them. The job is the smallest one that does that: a
replica a process, gloo, an all-reduce of as many bytes as a model has gradients, weights and two moments as state, and
a sleep in the place of the computation. A killed process is started again at once; it imports torch and torchft and
nothing else. What a step had computed is lost with it under torchft and not counted here. Of each kill, in seconds
without that step's own time: from it to the next step that a survivor commits, and to the first that the replacement
does. The lighthouse takes a silent replica for lost after `--heartbeat` milliseconds; its own default is 5,000.
"""

from __future__ import annotations

import argparse
import importlib.util
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
from tests.bench.torchrun import lines
from train.ledger import quantile

JOB = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from torch.distributed import TCPStore
from torchft import Manager, ProcessGroupGloo
folder, size, compute, rank, life = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5]
torch.set_num_threads(1)
state = {"weights": torch.zeros(3 * size)}
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
manager = Manager(
    pg=ProcessGroupGloo(timeout=timedelta(seconds=10)), min_replica_size=1, rank=0, world_size=1,
    load_state_dict=lambda received: state["weights"].copy_(received["weights"]), state_dict=lambda: dict(state),
    store_addr="127.0.0.1", store_port=store.port, replica_id=f"replica-{rank}", hostname="127.0.0.1",
    timeout=timedelta(seconds=10), quorum_timeout=timedelta(seconds=30), connect_timeout=timedelta(seconds=10),
)
gradient = torch.ones(size)
while True:
    manager.start_quorum()
    time.sleep(compute)
    manager.allreduce(gradient).wait()
    if manager.should_commit():
        state["weights"][0] += 1
        with (folder / f"steps-{rank}-{life}").open("a") as log:
            log.write(f"{time.time()} {manager.current_step()} {manager.num_participants()}\\n")
"""
SETTLED = 10  # steps of all ranks between a replacement's first one and the next kill


class Job:
    def __init__(self, ranks: int, size: int, compute: float, lighthouse: str, folder: Path) -> None:
        (folder / "job.py").write_text(JOB)
        self._folder, self._lives = folder, [0] * ranks
        self._arguments = [str(folder / "job.py"), str(folder), str(size), str(compute)]
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._environment["TORCHFT_LIGHTHOUSE"] = lighthouse
        self.processes = [self._start(rank) for rank in range(ranks)]

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, *self._arguments, str(rank), str(self._lives[rank])]
        return subprocess.Popen(
            command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def steps(self, rank: int) -> list[float]:
        """When the rank's process committed each of its steps."""
        return lines(self._folder / f"steps-{rank}-{self._lives[rank]}")[::3]

    def committed(self) -> dict[int, tuple[float, int]]:
        """When each step of the job was first committed, and by how many replicas it was computed."""
        rows = [lines(path) for path in self._folder.glob("steps-*")]
        found: dict[int, tuple[float, int]] = {}
        for at, step, replicas in (tuple(row[i : i + 3]) for row in rows for i in range(0, len(row) // 3 * 3, 3)):
            found[int(step)] = min(found.get(int(step), (at, int(replicas))), (at, int(replicas)))
        return dict(sorted(found.items()))

    def tend(self) -> None:
        """torchft's own way out of trouble: a process ends, and is replaced."""
        for rank, process in enumerate(self.processes):
            if process.poll() is not None:
                self._lives[rank] += 1
                self.processes[rank] = self._start(rank)

    def settle(self) -> None:
        """Until every rank has taken part for a while."""
        while any(len(self.steps(rank)) < SETTLED for rank in range(len(self.processes))):
            self.tend()
            time.sleep(0.02)

    def kill(self, rank: int) -> float:
        at = time.time()
        os.killpg(self.processes[rank].pid, signal.SIGKILL)
        self.processes[rank].wait()
        self._lives[rank] += 1
        self.processes[rank] = self._start(rank)
        return at

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def stalls(job: Job, count: int) -> list[tuple[float, float]]:
    """Of each of `count` kills of random ranks: the survivors' stall, and when the replacement is back."""
    rng, found = random.Random(0), []
    for _ in range(count):
        job.settle()
        lost = rng.randrange(len(job.processes))
        stays = (lost + 1) % len(job.processes)
        usual = statistics.median(b - a for a, b in pairwise(job.steps(stays)[-SETTLED:]))
        time.sleep(rng.random() * usual)
        at = job.kill(lost)
        time.sleep(2 * usual)  # a step that was about to end
        while not (after := [t for t in job.steps(stays) if t > at + 1.5 * usual]):
            time.sleep(0.01)
        while not (back := job.steps(lost)):
            time.sleep(0.01)
        found.append((max(0.0, after[0] - at - usual), back[0] - at - usual))
    return found


def main() -> int:
    if importlib.util.find_spec("torchft") is None:
        print("torchft is not here: .venv/bin/python -m pip install torchft")
        return 2
    os.environ.setdefault("RUST_LOG", "error")  # the lighthouse tells of every heartbeat
    from torchft.coordination import LighthouseServer

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=8, help="kills of each kind of job")
    parser.add_argument("--compute", type=float, default=0.05, help="seconds of a step before its all-reduce")
    parser.add_argument("--heartbeat", type=int, default=1000, help="milliseconds after which a silent replica is lost")
    options = parser.parse_args()
    rows = []
    for parameters in (668_544, 2_000_000):
        for ranks in (2, 4):
            lighthouse = LighthouseServer(
                bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=100, heartbeat_timeout_ms=options.heartbeat
            )
            with tempfile.TemporaryDirectory() as folder:
                job = Job(ranks, parameters, options.compute, lighthouse.address(), Path(folder))
                try:
                    seconds = stalls(job, options.count)
                finally:
                    job.end()
            lighthouse.shutdown()
            row = {"parameters": parameters, "ranks": ranks, "kills": len(seconds)}
            for name, values in (("stall_s", [s for s, _ in seconds]), ("back_s", [b for _, b in seconds])):
                row[name] = {"p50": quantile(values, 0.5), "worst": max(values)}  # type: ignore[assignment]
            rows.append(row)
            print(row, flush=True)
    given = f" ARGS='{' '.join(sys.argv[1:])}'" if len(sys.argv) > 1 else ""
    head = {"compute_s": options.compute, "heartbeat_timeout_ms": options.heartbeat}
    report.write("torchft", f"make bench-torchft{given}", **head, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
