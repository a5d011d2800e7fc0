"""What of all this holds on a GPU: `make gpu-check`, one script, under 8 minutes on one GPU.

It says, line by line, whether
- two runs give equal bits, eager and compiled, and resuming in the middle does too;
- 1, 2 and 4 ranks give equal bits (several ranks share the one GPU over gloo; with more GPUs, one rank each over nccl);
- a run is exact at what price: tokens/s, MFU and memory of `reduce=exact` against `reduce=fast`, eager and compiled.

Everything goes through the front door, `colossus train`, on synthetic tokens. Without a GPU it says so and exits with
2; `--cpu` runs the same script on a CPU with models of a few thousand parameters, which is how its own test runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from train import cli, hardware
from train.checks import REFUSED

RESULTS = Path(__file__).parent / "results"

SMALL = ["model=llama_nano", "data.tokenizer.vocab=4096", "batch.sequences=32", "batch.micro_batch=2", "steps=20"]
TINY = ["model=llama_micro", "model.layers=1", "model.width=32", "model.heads=2", "model.kv_heads=1", "model.ffn=64"]
TINY += ["model.context=16", "data.tokenizer.vocab=256", "batch.sequences=16", "batch.micro_batch=1", "steps=4"]
SPEED = ["model=llama_124m", "data.tokenizer.vocab=50304", "batch.sequences=128", "batch.micro_batch=16", "steps=30"]


class Check:
    """Runs `colossus train` with a name of its own for each run, and keeps what was found."""

    def __init__(self, workspace: Path, accelerator: str) -> None:
        self.workspace, self.accelerator = workspace, accelerator
        self.found: list[dict[str, Any]] = []
        self._count = 0

    def train(self, *overrides: str, name: str = "") -> dict[str, Any]:
        """The summary of a run; raises RuntimeError with what it said where it failed."""
        self._count += 1
        name = name or f"run{self._count}"
        arguments = [f"name={name}", f"runs={self.workspace}/runs", f"data.cache={self.workspace}/cache", "logger=[]"]
        arguments += ["data=synthetic", f"accelerator={self.accelerator}", "eval.every=0", "checkpoint.every=0"]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.main(["train", *arguments, *overrides])
        if code not in (0, 75):
            raise RuntimeError(f"exit code {code}: {said.getvalue().strip().splitlines()[-1]}")
        summary = json.loads((self.workspace / "runs" / name / "summary.json").read_text())
        assert isinstance(summary, dict)
        return summary

    def same_bits(self, what: str, *runs: list[str]) -> None:
        """Whether runs end with one state_sha256; a run that fails is a finding too."""
        try:
            digests = [self.train(*overrides)["state_sha256"] for overrides in runs]
            self._say({"check": what, "holds": len(set(digests)) == 1, "state_sha256": [d[:16] for d in digests]})
        except RuntimeError as error:
            self._say({"check": what, "holds": False, "error": str(error)})

    def speed(self, what: str, *overrides: str) -> None:
        try:
            started, name = time.monotonic(), f"speed{self._count}"
            summary = self.train(*overrides, "log.every=5", name=name)
            events = (self.workspace / "runs" / name / "events.jsonl").read_text().splitlines()
            memory = max(record.get("memory_bytes", 0) for record in map(json.loads, events))
            found = {key: summary[key] for key in ("tokens_per_s", "mfu", "final_loss")}
            seconds = time.monotonic() - started
            self._say({"check": what, "holds": True, **found, "memory_bytes": memory, "seconds": seconds})
        except RuntimeError as error:
            self._say({"check": what, "holds": False, "error": str(error)})

    def _say(self, finding: dict[str, Any]) -> None:
        self.found.append(finding)
        rest = {key: value for key, value in finding.items() if key not in ("check", "holds")}
        print(f"{'holds' if finding['holds'] else 'FAILS':6} {finding['check']}: {json.dumps(rest)}", flush=True)


def run_all(check: Check, small: list[str], speed: list[str]) -> None:
    for label in ("compile=false", "compile=true"):
        base = [*small, label]
        for precision in ("fp32", "bf16"):
            one = [*base, f"precision={precision}", "devices=1"]
            check.same_bits(f"run to run, {label}, {precision}", one, one)
        ranks = [[*base, "precision=bf16", f"devices={world}", "backend=gloo"] for world in (1, 2, 4)]
        check.same_bits(f"1, 2, 4 ranks over gloo, {label}, bf16", *ranks)
    gpus = len(hardware.gpus())
    if check.accelerator == "cuda" and gpus > 1:
        ranks = [[*small, "precision=bf16", f"devices={world}", "backend=nccl"] for world in (1, 2, min(gpus, 8))]
        check.same_bits(f"1, 2, {min(gpus, 8)} GPUs over nccl, bf16", *ranks)
    for label in ("compile=false", "compile=true"):
        for reduce in ("reduce=exact", "reduce=fast"):
            check.speed(f"speed, {label}, {reduce}", *speed, label, reduce, "precision=bf16", "devices=1")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="tiny models on a CPU: a test of this script, no finding")
    parser.add_argument("--out", type=Path, help="where to write the JSON (default: tests/bench/results)")
    options = parser.parse_args(arguments)
    gpus = hardware.gpus()
    if not options.cpu and not gpus:
        print("gpu_check: nvidia-smi shows no GPU here", file=sys.stderr)
        return REFUSED
    workspace = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    started = time.monotonic()
    try:
        check = Check(workspace, "cpu" if options.cpu else "cuda")
        run_all(check, TINY if options.cpu else SMALL, TINY if options.cpu else SPEED)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    device = "cpu" if options.cpu else gpus[0].name
    report = {
        "command": "make gpu-check",
        "date": datetime.date.today().isoformat(),
        "device": device,
        "devices": 1 if options.cpu else len(gpus),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "seconds": time.monotonic() - started,
        "findings": check.found,
    }
    out = options.out or RESULTS / f"gpu_check-{device.replace(' ', '_')}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{sum(finding['holds'] for finding in check.found)} of {len(check.found)} hold; written to {out}")
    return 0 if all(finding["holds"] for finding in check.found) else 1


if __name__ == "__main__":
    sys.exit(main())
