"""Slow cables: what a step sends between hosts, and what that costs: `make bench-fabrics` (root, iproute2).

Two hosts, which are network namespaces of this machine, with two ranks each; a token bucket (`tc tbf`) at either end
of the cable between them lets so much through. Each row is one run of `colossus train` as it comes, evaluation and
checkpoints at its end only: the sum flat, inside hosts first, and that with `reduce.dtype=bf16`. Bytes are those that
the two interfaces count between two steps of the run's record, headers and all, in one direction; tokens/s is of the
median step of these. The flat sum and hosts first must leave one `state_sha256` at every speed, or the command fails.

All ranks share this machine's cores, and so do both ends of the cable: what two cores reach is the most that is seen,
whatever the bucket lets through. The cable without a bucket is the row that says how much that is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench import report
from tests.system.hosts import call, heal, joined_hosts, left, on, place, shape
from train import events
from train.summary import summarize

# A burst is what may leave at once: at least what the rate lets through between two ticks of the kernel's clock.
SPEEDS = {
    "unshaped": (),
    "10 Gbit/s": ("rate", "10gbit", "burst", "8mb", "latency", "50ms"),
    "1 Gbit/s": ("rate", "1gbit", "burst", "1mb", "latency", "50ms"),
    "100 Mbit/s": ("rate", "100mbit", "burst", "128kb", "latency", "50ms"),
}
SUMS = {
    "flat": ["reduce.hosts_first=false"],
    "hosts first": ["reduce.hosts_first=true"],
    "hosts first, bf16": ["reduce.hosts_first=true", "reduce.dtype=bf16"],
}
WORK = [
    *("model=llama_nano", "model.context=128", "data=synthetic", "data.tokenizer.vocab=2048", "batch.sequences=8"),
    *("precision=fp32", "accelerator=cpu", "nodes=2", "devices=2", "schedule.warmup_steps=2", "name=a"),
    *("eval.every=0", "eval.tokens=1024", "checkpoint.every=0", "logger=[]", "report=false"),
]
FIRST = 3  # the step after which it is measured
PATIENCE = 300.0  # seconds in which a run must get on


def measure(hosts: list[str], how: list[str], steps: int, folder: Path) -> dict[str, Any]:
    """A run on both hosts: what steps FIRST + 1 … `steps` - 1 have sent and taken, and the state that it leaves."""
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(_node(host, i, [*WORK, *how, f"steps={steps}", f"runs={folder}/{i}"]))
            for i, host in enumerate(hosts)
        ]
        record = folder / "0" / "a" / "events.jsonl"
        counted = [(_await(record, at, nodes[0]), [left(host) for host in hosts]) for at in (FIRST, steps - 1)]
        for node in nodes:
            code = node.wait(timeout=PATIENCE)
            if code != 0:
                raise RuntimeError(f"a node has ended with {code}: see {folder}")
    (first, before), (last, after) = counted
    tokens = last["tokens"] - first["tokens"]
    found = list(events.read(record))
    seconds = [one["seconds"] for one in found if one["kind"] == "step" and FIRST < one["step"] < steps]
    sent = [b - a for a, b in zip(before, after, strict=True)]
    return {
        "bytes_per_token": sum(sent) / 2 / tokens,  # in each direction
        "tokens_per_s": tokens / (steps - 1 - FIRST) / statistics.median(seconds),
        "tokens_per_s_quartiles": [tokens / (steps - 1 - FIRST) / q for q in statistics.quantiles(seconds, n=4)[::-2]],
        "state_sha256": summarize(found)["state_sha256"],
    }


@contextlib.contextmanager
def _node(host: str, index: int, overrides: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        on(host, "python", "-m", "train", *overrides), env=os.environ | place(index), stdout=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _await(record: Path, step: int, node: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The event of a step, as soon as it is there."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and node.poll() in (None, 0):
        for event in events.read(record):
            if event["kind"] == "step" and event["step"] >= step:
                return event
        time.sleep(0.01)
    raise RuntimeError(f"the run does not come to step {step}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=18, help="of each run; the first three are not measured")
    parser.add_argument("--only", default="", help="the speeds whose name has this in it")
    options = parser.parse_args()
    rows, kernel = [], call("uname", "-r").stdout.strip().partition("-")[0]
    with joined_hosts() as hosts:
        for speed, bucket in SPEEDS.items():
            if options.only not in speed:
                continue
            for host in hosts if bucket else []:
                shape(host, *bucket)
            for name, how in SUMS.items():
                with tempfile.TemporaryDirectory() as folder:
                    row = {"cable": speed, "sum": name} | measure(hosts, how, options.steps, Path(folder))
                print(
                    f"{speed:10} {name:17} {row['bytes_per_token']:9,.0f} bytes/token {row['tokens_per_s']:8,.0f} "
                    f"tokens/s  {row['state_sha256'][:12]}",
                    flush=True,
                )
                rows.append(row)
            for host in hosts if bucket else []:
                heal(host)
    report.write(
        "fabrics",
        "make bench-fabrics",
        cores=os.cpu_count(),
        kernel=kernel,
        work=" ".join(WORK),
        steps=options.steps,
        rows=rows,
    )
    exact = {row["state_sha256"] for row in rows if "bf16" not in row["sum"]}
    rounded = {row["state_sha256"] for row in rows if "bf16" in row["sum"]}
    if len(exact) > 1 or len(rounded) > 1:
        print("the states differ, which they must not")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
