"""What of all this holds on a GPU: `make gpu-check`, one script, under 8 minutes on one GPU.

It says, line by line, whether
- two runs give equal bits, eager and compiled;
- 1, 2 and 4 ranks give equal bits (several ranks share the one GPU over gloo; with more GPUs, one rank each over nccl);
- a run is exact at what price: tokens/s, MFU and memory of llama_124m with `reduce=fast` and `reduce=exact`, eager and
  compiled, and of what lies between: deterministic kernels, eight virtual ranks, checksums;
- deterministic kernels cost much: each operation by itself, with and without (`gpu_kernels.py`);
- it is fast: llama_350m, llama_1b, both ways, and grok_small; llama_124m and llama_nano with CUDA graphs; gpt2_124m
  beside nanoGPT's own train.py, compiled, with as many tokens a step (`--nanogpt PATH`, a checkout); llama_124m beside
  torchtitan's trainer, where it is installed.

Everything goes through the front door, `colossus train`, on synthetic tokens. What does not begin within the time is
left out, and named. Without a GPU it says so and exits with 2; `--cpu` runs the same script on a CPU with models of a
few thousand parameters, which is how its own test runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from train import cli, hardware
from train.bench import ROOT
from train.checks import REFUSED

RESULTS = Path(__file__).parent / "results"

SMALL = ["model=llama_nano", "data.tokenizer.vocab=4096", "batch.sequences=32", "batch.micro_batch=2", "steps=20"]
TINY = ["model=llama_micro", "model.layers=1", "model.width=32", "model.heads=2", "model.kv_heads=1", "model.ffn=64"]
TINY += ["model.context=16", "data.tokenizer.vocab=256", "batch.sequences=16", "batch.micro_batch=1", "steps=4"]
TINY += ["eval.micro_batch=256"]  # or most of a run would be its last evaluation
LIMIT = 440.0  # seconds after which nothing more begins: eight minutes, less a run
PATIENCE = 240  # seconds for train.py, which compiles first, and for all kernels
WARM = 10  # iterations of train.py that are not timed

BEST, EXACT = "the best inexact run", "exact"
KERNELS = "deterministic kernels, one by one"
PARTS = {  # each with what the one before it has, and one thing more
    BEST: ["reduce=fast", "batch.virtual_ranks=1", "evidence.digests=false"],
    "deterministic kernels": ["batch.virtual_ranks=1", "evidence.digests=false"],
    "eight virtual ranks": ["evidence.digests=false"],
    EXACT: [],
}


class Speed(NamedTuple):
    """A row of tokens/s."""

    what: str
    overrides: list[str]


WIDE = ["data.tokenizer.vocab=50304", "precision=bf16", "devices=1"]
SHAPES = {
    "llama_124m": ["model=llama_124m", "batch.sequences=128", "batch.micro_batch=16", "steps=30", *WIDE],
    "llama_350m": ["model=llama_350m", "batch.sequences=64", "batch.micro_batch=8", "steps=30", *WIDE],
    "llama_1b": ["model=llama_1b", "batch.sequences=32", "batch.micro_batch=4", "steps=20", *WIDE],
    "grok_small": ["model=grok_small", "batch.sequences=64", "batch.micro_batch=8", "steps=20", *WIDE],
    "llama_nano": [*SMALL, "steps=60", "precision=bf16", "devices=1"],  # launches take longer than its kernels
    "gpt2_124m": ["model=gpt2_124m", "batch.sequences=128", "batch.micro_batch=16", "steps=30", *WIDE],
}
# As many tokens a step as gpt2_124m has above.
TRAIN_PY: dict[str, Any] = {"device": "cuda", "compile": True, "batch_size": 16, "gradient_accumulation_steps": 8}


def speeds() -> list[Speed]:
    """What is measured on a GPU, in the order of what one wants to know first."""
    rows = [("gpt2_124m", EXACT, "true"), *(("llama_124m", part, "true") for part in PARTS)]
    rows += [(model, part, "true") for model in ("llama_1b", "llama_350m") for part in (BEST, EXACT)]
    rows += [("grok_small", EXACT, "true"), *(("llama_124m", part, "false") for part in (BEST, EXACT))]
    rows += [("llama_124m", EXACT, "graphs"), *(("llama_nano", EXACT, how) for how in ("false", "true", "graphs"))]
    return [
        Speed(f"{model}, compile={compiled}, {part}", [*SHAPES[model], *PARTS[part], f"compile={compiled}"])
        for model, part, compiled in rows
    ]


class Check:
    """Runs `colossus train` with a name of its own for each run, and keeps what was found."""

    def __init__(self, workspace: Path, accelerator: str, limit: float = LIMIT) -> None:
        """`limit`: seconds from now on in which runs may begin."""
        self.workspace, self.accelerator = workspace, accelerator
        self.found: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self._ends, self._count = time.monotonic() + limit, 0

    def train(self, *overrides: str, name: str = "") -> dict[str, Any]:
        """The summary of a run; raises RuntimeError with what it said where it failed."""
        self._count += 1
        name = name or f"run{self._count}"
        arguments = [f"name={name}", f"runs={self.workspace}/runs", f"data.cache={self.workspace}/cache", "logger=[]"]
        arguments += ["data=synthetic", f"accelerator={self.accelerator}", "checkpoint.every=0", "report=false"]
        arguments += ["eval.every=0", "eval.tokens=4096", "eval.sample=0"]  # a run evaluates at its end in any case
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.main(["train", *arguments, *overrides])
        if code not in (0, 75):
            raise RuntimeError(f"exit code {code}: {said.getvalue().strip().splitlines()[-1]}")
        summary = json.loads((self.workspace / "runs" / name / "summary.json").read_text())
        assert isinstance(summary, dict)
        return summary

    def late(self, what: str) -> bool:
        """Whether there is no time left for this, which is then named as left out."""
        if time.monotonic() < self._ends:
            return False
        self.leave_out(f"{what}: no time left")
        return True

    def same_bits(self, what: str, *runs: list[str]) -> None:
        """Whether runs end with one state_sha256; a run that fails is a finding too."""
        if self.late(what):
            return
        with self._failing(what):
            digests = [self.train(*overrides)["state_sha256"] for overrides in runs]
            self._say({"check": what, "holds": len(set(digests)) == 1, "state_sha256": [d[:16] for d in digests]})

    def speed(self, what: str, *overrides: str) -> None:
        if self.late(what):
            return
        with self._failing(what):
            started, name = time.monotonic(), f"speed{self._count}"
            summary = self.train(*overrides, "log.every=5", name=name)
            events = (self.workspace / "runs" / name / "events.jsonl").read_text().splitlines()
            memory = max(record.get("memory_bytes", 0) for record in map(json.loads, events))
            found = {key: summary[key] for key in ("tokens_per_s", "mfu", "final_loss")}
            seconds = time.monotonic() - started
            self._say({"check": what, "holds": True, **found, "memory_bytes": memory, "seconds": seconds})

    def nanogpt(self, what: str, checkout: Path, vocab: int, **settings: Any) -> None:
        """tokens/s of nanoGPT's train.py, as it is, with these of its settings and a model of its defaults'."""
        if self.late(what):
            return
        data = self.workspace / "nanogpt"
        data.mkdir(exist_ok=True)
        for part in ("train", "val"):
            np.random.default_rng(0).integers(0, vocab, 1_000_000).astype(np.uint16).tofile(data / f"{part}.bin")
        settings = {"max_iters": 3 * WARM, "eval_interval": 10**6, "eval_iters": 1, "log_interval": 1, **settings}
        given = [f"--{key}={value}" for key, value in {"dataset": data, "out_dir": data, **settings}.items()]
        command = [sys.executable, "train.py", "--bias=True", *given]  # GPT-2 has biases
        with self._failing(what):
            done = ran(command, checkout)
            times = [float(found) for found in re.findall(r"^iter \d+: .*time ([\d.]+)ms", done.stdout, re.M)][WARM:]
            if done.returncode or not times:
                raise failure(done)
            tokens = settings["batch_size"] * settings["gradient_accumulation_steps"] * settings.get("block_size", 1024)
            self._say({"check": what, "holds": True, "tokens_per_s": 1000 * tokens / statistics.median(times)})

    def says(self, what: str, module: str, *arguments: str) -> None:
        """The findings that a module prints, a line each, in a process of its own, whose memory is free afterwards.

        One that is but a string says why there is none.
        """
        if self.late(what):
            return
        with self._failing(what):
            done = ran([sys.executable, "-m", f"tests.bench.{module}", *arguments], ROOT)
            for found in map(json.loads, done.stdout.splitlines()):
                if isinstance(found, str):
                    self.leave_out(f"{what}: {found}")
                else:
                    self._say({"check": what, "holds": True, **found})
            if done.returncode:
                raise failure(done)

    def torchtitan(self, what: str, *overrides: str) -> None:
        """tokens/s of torchtitan's trainer, with the shape, batch and numbers that `colossus train` has with these."""
        self.says(what, "gpu_torchtitan", "data=synthetic", f"accelerator={self.accelerator}", *overrides)

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """What goes wrong is a finding, too."""
        try:
            yield
        except RuntimeError as error:
            self._say({"check": what, "holds": False, "error": str(error)})

    def leave_out(self, what: str) -> None:
        self.left_out.append(what)
        print(f"left out: {what}", flush=True)

    def _say(self, finding: dict[str, Any]) -> None:
        self.found.append(finding)
        rest = {key: value for key, value in finding.items() if key not in ("check", "holds")}
        print(f"{'holds' if finding['holds'] else 'FAILS':6} {finding['check']}: {json.dumps(rest)}", flush=True)


def ran(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A process, when it has ended; raises RuntimeError where it takes too long."""
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {PATIENCE} s") from None


def failure(done: subprocess.CompletedProcess[str]) -> RuntimeError:
    said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
    return RuntimeError(f"exit code {done.returncode}: {said[-1]}")


def bits(check: Check, small: list[str]) -> None:
    for label in ("compile=false", "compile=true"):
        base = [*small, label]
        for precision in ("fp32", "bf16"):
            one = [*base, f"precision={precision}", "devices=1"]
            check.same_bits(f"run to run, {label}, {precision}", one, one)
        ranks = [[*base, "precision=bf16", f"devices={world}", "backend=gloo"] for world in (1, 2, 4)]
        check.same_bits(f"1, 2, 4 ranks over gloo, {label}, bf16", *ranks)
    if check.accelerator == "cuda":
        ranks = [[*small, "precision=bf16", "compile=graphs", f"devices={n}", "backend=gloo"] for n in (1, 2)]
        check.same_bits("1, 2 ranks over gloo, compile=graphs, bf16", *ranks)
    gpus = len(hardware.gpus())
    if check.accelerator == "cuda" and gpus > 1:
        ranks = [[*small, "precision=bf16", f"devices={world}", "backend=nccl"] for world in (1, 2, min(gpus, 8))]
        check.same_bits(f"1, 2, {min(gpus, 8)} GPUs over nccl, bf16", *ranks)


def run_all(check: Check, small: list[str], rows: list[Speed], checkout: Path | None) -> None:
    bits(check, small)
    cuda = check.accelerator == "cuda"
    check.says(KERNELS, "gpu_kernels", *["--cpu"] * (not cuda))
    if checkout and cuda:
        check.nanogpt("gpt2_124m, nanoGPT's train.py, compiled", checkout, 50304, **TRAIN_PY)
    else:
        check.leave_out("nanoGPT: --nanogpt PATH, a checkout, on a GPU")
    how = [*SHAPES["llama_124m"], "compile=true"] if cuda else [*small, "precision=fp32"]
    check.torchtitan("llama_124m, torchtitan, compiled" if cuda else "tiny, torchtitan", *how)
    for row in rows:
        check.speed(row.what, *row.overrides)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="tiny models on a CPU: a test of this script, no finding")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, to run its train.py beside ours")
    parser.add_argument("--out", type=Path, help="where to write the JSON (default: tests/bench/results)")
    options = parser.parse_args(arguments)
    if options.nanogpt and not (options.nanogpt / "train.py").exists():
        parser.error(f"--nanogpt: '{options.nanogpt}' holds no train.py: it is no checkout of nanoGPT")
    gpus = hardware.gpus()
    if not options.cpu and not gpus:
        print("gpu_check: nvidia-smi shows no GPU here", file=sys.stderr)
        return REFUSED
    workspace = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    started = time.monotonic()
    try:
        check = Check(workspace, "cpu" if options.cpu else "cuda")
        tiny = [Speed(f"tiny, {part}", [*TINY, *how]) for part, how in PARTS.items()]
        run_all(check, TINY if options.cpu else SMALL, tiny if options.cpu else speeds(), options.nanogpt)
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
        "left_out": check.left_out,
    }
    out = options.out or RESULTS / f"gpu_check-{device.replace(' ', '_')}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{sum(finding['holds'] for finding in check.found)} of {len(check.found)} hold; written to {out}")
    return 0 if all(finding["holds"] for finding in check.found) else 1


if __name__ == "__main__":
    sys.exit(main())
