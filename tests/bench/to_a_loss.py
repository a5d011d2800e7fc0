"""Time and tokens to a loss on the main job's corpus, ours beside nanoGPT's: `make bench-loss NANOGPT=PATH`.

Ours is `colossus train` as it comes. nanoGPT's is its own train.py on the same tokens, in a model as deep and as wide
(which is its GPT-2 with tied embeddings), with the same sequences a step for as many steps, and the settings that its
README gives for small models on a CPU (config/train_shakespeare_char.py without dropout; decay over all steps, a tenth
of the rate at the end), at each of some learning rates, the best of which counts. It computes in float32, the only
precision that it has on a CPU. Both use all cores: two ranks of a thread here, two threads there.

Scored is the same part of the validation set, in bits per byte. Seconds are steps times the median step, evaluations
and start-up aside.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests import nanogpt
from tests.bench import report
from train import cli, compose, events, hardware, plan, trained
from train.config import Train
from train.data.prepare import Prepared
from train.data.store import Store
from train.data.stream import Validation
from train.evaluate import evaluate
from train.shapes import Llama

EVERY = 40  # steps between evaluations
TARGETS = (2.0, 1.8, 1.7, 1.6, 1.5)  # bits per byte
EDITS = [
    nanogpt.Edit(r"for split in \['train', 'val'\]", "for split in ['val']", "what is not shown takes time"),
    nanogpt.Edit(r"train loss \{losses\['train'\]", "train loss {losses['val']", "there is none any more"),
    nanogpt.Edit(r"'train/loss': losses\['train'\]|\"train/loss\": losses\['train'\]", "'train/loss': 0", "likewise"),
    nanogpt.Edit(r"^import os$", "import itertools\nimport os", "for the next one"),
    nanogpt.Edit(
        r"^(    )(ix = torch\.randint\(.*)$",
        r"\1\2\n\1if split == 'val': ix = [next(places) % (block_size * batch_size * eval_iters) for _ in ix]",
        "the same windows as ours, one after the other",
    ),
    nanogpt.Edit(r"^def get_batch", "places = itertools.count(0, block_size)\ndef get_batch", "for that"),
]
BABY = {"beta2": 0.99, "warmup_iters": 100, "grad_clip": 1.0, "weight_decay": 0.1, "dropout": 0.0, "bias": False}
Curve = dict[str, Any]  # name, parameters, seconds a step, tokens a step, points: [step, bits per byte]


def ours(config: Train, folder: Path) -> tuple[Curve, Prepared, Validation]:
    """Our run, and what it was trained and scored on."""
    words = [
        f"runs={folder}",
        "name=ours",
        f"steps={config.steps}",
        f"eval.every={EVERY}",
        "eval.sample=0",
        "report=false",
        "logger=[]",
    ]
    assert cli.main(["train", *words]) == 0
    run = folder / "ours"
    records = list(events.read(run / "events.jsonl"))
    points = [[r["step"], r["bpb"]] for r in records if r["kind"] == "eval" and not r["whole"]]
    on = trained.device("cpu")
    last = trained.load(run, -1, on)
    shape: dict[str, Any] = {"context": config.model.context, "micro_batch": config.eval.micro_batch}
    validation = Validation(last.prepared, tokens=config.eval.tokens, **shape)
    points.append([last.step, evaluate(last.model, validation, trained.fabric(last, on)).bpb])
    seconds = statistics.median(r["seconds"] for r in records if r["kind"] == "step")
    parameters = sum(p.numel() for p in last.model.parameters())
    curve = {"name": "colossus train", "parameters": parameters, "step_s": seconds, "points": points}
    return curve, last.prepared, validation


def theirs(config: Train, validation: Validation, folder: Path, source: Path, rate: float) -> Curve:
    """nanoGPT's train.py; `folder` has its data already."""
    where = folder / f"nanogpt-{rate:g}"
    shutil.copytree(folder / "data", where / "data")
    for name in ("model.py", "configurator.py"):
        shutil.copy(source / name, where)
    vocabulary = nanogpt.Edit(r"else 50304$", f"else {validation.vocab}", "the corpus's own tokens")
    (where / "train.py").write_text(nanogpt.edited((source / "train.py").read_text(), [*EDITS, vocabulary]))
    model, batch = config.model, config.batch.sequences
    assert isinstance(model, Llama)
    settings: dict[str, Any] = {
        **{"dataset": "corpus", "device": "cpu", "dtype": "float32", "compile": False, "out_dir": "out"},
        **{"n_layer": model.layers, "n_head": model.heads, "n_embd": model.width, "block_size": model.context},
        **{"batch_size": batch, "gradient_accumulation_steps": 1, "eval_interval": EVERY, "log_interval": 1},
        **{"eval_iters": validation.tokens // (model.context * batch), "max_iters": config.steps},
        **{"lr_decay_iters": config.steps, "learning_rate": rate, "min_lr": rate / 10, **BABY},
    }
    command = [sys.executable, "-u", "train.py", *(f"--{key}={value}" for key, value in settings.items())]
    threads = {"OMP_NUM_THREADS": str(hardware.cores())}
    done = subprocess.run(command, cwd=where, env={**os.environ, **threads}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert validation.bytes is not None
    per_byte = validation.tokens / np.log(2) / validation.bytes
    points = [
        [int(step), float(loss) * per_byte]
        for step, loss in re.findall(r"^step (\d+):.*val loss ([\d.]+)$", done.stdout, re.M)
    ]
    seconds = statistics.median(float(ms) / 1000 for ms in re.findall(r"time ([\d.]+)ms", done.stdout))
    found = re.search(r"number of parameters: ([\d.]+)M", done.stdout)
    assert found is not None
    name = f"nanoGPT's train.py, rate {rate:g}"
    return {"name": name, "parameters": round(float(found[1]) * 1e6), "step_s": seconds, "points": points[1:]}


def write_data(prepared: Prepared, validation: Validation, folder: Path) -> None:
    """The corpus as nanoGPT reads it."""
    (data := folder / "data" / "corpus").mkdir(parents=True)
    shards = Store(prepared.stores[0], "train").shards
    np.concatenate([shard.tokens for shard in shards]).astype(np.uint16).tofile(data / "train.bin")
    validation.ids.astype(np.uint16).tofile(data / "val.bin")


def reached(curve: Curve, target: float, tokens: int) -> dict[str, float] | None:
    """Where a curve first comes to so many bits per byte, between two evaluations."""
    before: list[float] | None = None
    for step, score in curve["points"]:
        if score <= target:
            share = 1.0 if before is None else (before[1] - target) / (before[1] - score)
            at = step if before is None else before[0] + share * (step - before[0])
            return {"tokens": at * tokens, "seconds": at * curve["step_s"]}
        before = [step, score]
    return None


def picture(curves: list[Curve], tokens: int) -> str:
    """Bits per byte against tokens and against seconds, as SVG."""
    wide, high, left, top = 400, 260, 50, 40
    scores = [score for curve in curves for _, score in curve["points"]]
    low, peak = min(scores) - 0.05, min(max(scores), 3.0)
    parts = []
    scales = {
        "million tokens": [tokens / 1e6 for _ in curves],
        "seconds of two cores": [curve["step_s"] for curve in curves],
    }
    for panel, (title, scale) in enumerate(scales.items()):
        x0 = left + panel * (wide + 70)
        far = max(curve["points"][-1][0] * each for curve, each in zip(curves, scale, strict=True))
        parts.append(f'<text x="{x0 + wide / 2}" y="{top + high + 34}" text-anchor="middle">{title}</text>')
        for i in range(5):
            x, value = x0 + wide * i / 4, far * i / 4
            parts.append(f'<text x="{x:.0f}" y="{top + high + 17}" text-anchor="middle">{value:.3g}</text>')
        for i in range(5):
            y, value = top + high * i / 4, peak - (peak - low) * i / 4
            parts.append(f'<path class="grid" d="M{x0} {y:.0f}h{wide}"/>')
            parts.append(f'<text x="{x0 - 6}" y="{y + 4:.0f}" text-anchor="end">{value:.2f}</text>')
        for i, curve in enumerate(curves):
            points = [
                (x0 + wide * step * scale[i] / far, top + high * (peak - min(score, peak)) / (peak - low))
                for step, score in curve["points"]
            ]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline class="c{min(i, 3)}" points="{line}"/>')
    for i, curve in enumerate(curves):
        x = left + i * 210
        parts.append(f'<path class="c{min(i, 3)}" d="M{x} 14h18"/><text x="{x + 24}" y="18">{curve["name"]}</text>')
    style = (
        "text{font:12px system-ui,sans-serif;fill:#6e7681}path,polyline{fill:none;stroke-width:2}"
        ".grid{stroke:#9aa3b0;stroke-opacity:.25;stroke-width:1}.c0{stroke:#2f7fd6}.c1{stroke:#d9822b}"
        ".c2{stroke:#8256c4}.c3{stroke:#2a8f6d}"
    )
    size = f"0 0 {left + 2 * wide + 90} {top + high + 44}"
    body = "".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}"><style>{style}</style>{body}</svg>\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nanogpt", default=os.environ.get("NANOGPT", ""), help="a clone of nanoGPT")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 6e-3], help="of nanoGPT")
    parser.add_argument("--steps", type=int, default=0, help="0: the main job's")
    options = parser.parse_args()
    source = Path(options.nanogpt).expanduser()
    if not (source / "train.py").exists():
        print("nanoGPT is not here: git clone https://github.com/karpathy/nanoGPT, and NANOGPT=that folder")
        return 2
    config = plan.resolve(compose.config("train", ["name=ours", *([f"steps={options.steps}"] * bool(options.steps))]))
    tokens = config.tokens_per_step
    with tempfile.TemporaryDirectory() as workspace:
        folder = Path(workspace)
        curve, prepared, validation = ours(config, folder)
        curves = [curve]
        write_data(prepared, validation, folder)
        for rate in options.rates:
            curves.append(theirs(config, validation, folder, source, rate))
            print(curves[-1]["name"], curves[-1]["points"][-1], f"{curves[-1]['step_s']:.3f} s a step", flush=True)
    rows = [{"bpb": target, **{c["name"]: reached(c, target, tokens) for c in curves}} for target in TARGETS]
    load = os.getloadavg()[0]
    report.write("to_a_loss", "make bench-loss", tokens_a_step=tokens, load_average=load, rows=rows, curves=curves)
    report.RESULTS.joinpath("to_a_loss.svg").write_text(picture(curves, tokens))
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
