"""How fast this machine's ranks add up a vector, by its size and their number, and how fast its disk is: for the probe.

A ring moves 2·(W−1)/W of a vector of n bytes through every rank in 2·(W−1) messages, so that
seconds = hop · 2(W−1) + n · 2(W−1)/W / speed: two numbers, fitted to the medians with equal weight for equal ratios.
More ranks than cores share them: speed is that of W ranks on W cores, where there are as many.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from train.processes import forkserver

SIZES = tuple(4**k << 10 for k in range(8))  # bytes: 1 KiB to 16 MiB
REPEATS = 9
PATIENCE = timedelta(seconds=60)
FILE = 128 << 20  # bytes written to the disk and read again

Row = dict[str, Any]


def sums(ranks: list[int], progress: Callable[[str, int, int], None]) -> list[Row]:
    """Median seconds of an all-reduce for each number of ranks and each size; gloo over loopback."""
    context, rows = forkserver(), []
    for done, world in enumerate(ranks):
        progress("adding up", done, len(ranks))
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = context.Pipe(duplex=False)
            members = [
                context.Process(target=_member, args=(i, world, f"{folder}/store", theirs)) for i in range(world)
            ]
            for member in members:
                member.start()
            theirs.close()
            try:
                medians = json.loads(ours.recv_bytes()) if ours.poll(2 * PATIENCE.total_seconds()) else []
            except EOFError:
                medians = []
            finally:
                for member in members:
                    member.kill()
                    member.join()
        rows += [{"ranks": world, "bytes": size, "seconds": t} for size, t in zip(SIZES, medians, strict=False)]
    return rows


def _member(rank: int, world: int, store: str, connection: Connection) -> None:
    """In a process of its own, forked with torch imported. The first one answers."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=PATIENCE)
    medians = []
    for size in SIZES:
        vector, times = torch.zeros(size // 4), []
        for _ in range(REPEATS + 1):  # the first one opens connections
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(vector)
            times.append(time.perf_counter() - began)
        medians.append(statistics.median(times[1:]))
    if rank == 0:
        connection.send_bytes(json.dumps(medians).encode())


def fit(rows: list[Row], cores: int) -> tuple[float, float]:
    """Seconds a message, and bytes/s of a rank with a core of its own."""
    world = np.array([row["ranks"] for row in rows], float)
    size, seconds = np.array([row["bytes"] for row in rows], float), np.array([row["seconds"] for row in rows])
    terms = np.stack([2 * (world - 1), size * 2 * (world - 1) / world], 1) * np.maximum(1, world / cores)[:, None]
    hop, inverse = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(rows)), rcond=None)[0]
    return max(float(hop), 1e-9), 1 / max(float(inverse), 1e-15)


def disk(folder: Path) -> tuple[float, float]:
    """Bytes/s written until they are on the disk, and read when memory has forgotten them."""
    path, data = folder / f".probe-{os.getpid()}", os.urandom(1 << 20)
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(FILE >> 20):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            wrote = time.perf_counter() - began
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
        return FILE / wrote, FILE / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)
