"""One step of a large model, and its peak memory beside what `plan` counts: `make bench-large`.

Built, stepped and left, in a process by itself, as a rank of a run assembles it; nothing is saved, because a checkpoint
takes one more copy of the state. A sequence of 128 tokens, one virtual rank, AdamW, fp32. The peak is what the kernel
counts (`ru_maxrss`), less that of the same process before the model is built: the interpreter, torch and the data.
"""

from __future__ import annotations

import math
import resource
import subprocess
import sys
import time

from tests.bench import report
from train import compose, plan

MODELS = ("llama_1b", "grok_small")
KEYS = ["batch.sequences=1", "batch.virtual_ranks=1", "model.context=128", "devices=1", "accelerator=cpu"]
KEYS += ["precision=fp32", "steps=1", "schedule.warmup_steps=0"]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step(name: str, keys: list[str]) -> None:
    """Print parameters, the plan's bytes, the measured ones, seconds to build and to step, loss and gradient norm."""
    import torch

    from train import loop, trained
    from train.data.prepare import prepare
    from train.engine import Engine
    from train.group import Group, Place
    from train.telemetry import Recorder

    config = plan.resolve(compose.config("train", [f"model={name}", *KEYS, *keys]))
    prepared, _ = prepare(config.data, seed=config.seed, context=config.model.context)
    group = Group(Place.alone("cpu"), trained.precision(config.precision, torch.device("cpu")))
    before, started = peak(), time.perf_counter()
    engine = Engine.build(config, prepared, group, threads=1)
    built = time.perf_counter()
    recorder = Recorder(config, engine.fabric, lambda _: None, prepared.vocab, engine.model.aside.shape)
    total, _ = loop.step(engine.state, engine.parts(recorder))
    loss, norm = float(total.loss), float(total.norm)
    assert math.isfinite(loss), loss
    assert norm > 0
    planned = plan.memory(config, prepared.vocab).total
    count = sum(parameter.numel() for parameter in engine.model.parameters())
    seconds = round(built - started, 1), round(time.perf_counter() - built, 1)
    print("figures", count, planned, peak() - before, before, *seconds, round(loss, 4), round(norm, 4))


def main() -> None:
    keys = [argument for argument in sys.argv[1:] if "=" in argument]
    if names := [argument for argument in sys.argv[1:] if argument in MODELS]:
        return step(names[0], keys)
    rows = {}
    for name in MODELS:
        command = [sys.executable, "-m", "tests.bench.large", name, *keys]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1].split()
        parameters, planned, measured, before = map(int, said[1:5])
        build, seconds, loss, norm = map(float, said[5:])
        rows[name] = {
            "parameters": parameters,
            "plan_bytes": planned,
            "measured_bytes": measured,
            "measured_of_plan": round(measured / planned, 3),
            "process_before_bytes": before,
            "seconds_to_build": build,
            "seconds_a_step": seconds,
            "loss": loss,
            "gradient_norm": norm,
        }
        print(f"{name}: {parameters:,} parameters, plan {planned / 2**30:.2f} GiB, measured {measured / 2**30:.2f} GiB")
    report.write("large", "make bench-large", keys=[*KEYS, *keys], models=rows)


if __name__ == "__main__":
    main()
