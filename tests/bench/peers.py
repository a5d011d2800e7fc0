"""Others beside us at the same work: what `colossus bench` runs; `colossus bench --help` says what it can be asked.

Two families: GPT-2 (6 layers, 384 wide, 6 heads, T = 256, 4,096 ids, 12.3 M parameters) and llama of the same depth,
width and tokens (SwiGLU of 1,024, untied, 13.8 M). Same architecture, initial weights, tokens in the same order, 4,096
of them a step, AdamW, clipping, rate; fp32 and bf16 autocast; one process with one thread and with two, and two ranks.
A forward pass takes `micro_batch` sequences of the step's 16 (nanoGPT's train.py all of them); ours has a virtual rank
for each such pass. What the contestants are, what each was given, and how to add one: `tests/bench/contestants.py`.

Each lives in a process of its own and waits while another one has its turn: A B C … C B A A B C …, so that a slow
minute of the machine hits all of them. Among them is one that multiplies large matrices, as many FLOPs as a step has:
its ratio is the share of the machine's limit that ours reaches (6 · parameters + 12 · L · d · T a token, as MFU
counts). A figure is the median, with quartiles, of the ratios to ours of the same round; the first round warms up. That
the work is the same is shown: parameters are counted, and the losses of all steps compared with ours. `steps=200` goes
on after the rounds, until each has done 200 steps, and compares these too. Figures are written after each setting, in
the place of those that their file has of it; it keeps the others.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socket
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tests.bench import bars, report
from tests.bench.contestants import CONTESTANTS, OURS, SETTINGS, Setting, checkout
from tests.bench.work import Job, Turns
from train import compose, nodes, plan
from train.checks import DONE, FAILED, Refused
from train.commands import Bench
from train.config import Train
from train.console import Console
from train.data.prepare import Prepared, prepare
from train.data.stream import Stream
from train.folder import RunFolder

SHAPES = {
    "gpt2": "model=gpt2_micro model.layers=6 model.width=384 model.heads=6 model.ffn=1536 model.context=256",
    "llama": "model=llama_micro model.layers=6 model.width=384 model.heads=6 model.kv_heads=6 model.ffn=1024 "
    "model.context=256 model.tied=false",
}
TOKENS = "data=stdlib data.tokenizer.vocab=4096"
SMALL = "model.layers=2 model.width=96 model.ffn=384 model.context=32 data=synthetic data.tokenizer.vocab=512"
SMALL += " data.synthetic_tokens=40000"
SEQUENCES = 16  # a step
WORK = f"batch.sequences={SEQUENCES} optimizer.lr=1e-3 steps=1000000 schedule=constant schedule.warmup_steps=0"
WORK += " accelerator=cpu logger=[]"

# Relative, of each step's loss. In fp32 the sums alone come in other orders, and AdamW makes more of what differs with
# every step; train.py prints four decimals besides. In bf16 operations round to 2^-8, each implementation elsewhere.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
LATER = {"fp32": 1e-2, "bf16": 3e-2}  # after the first twenty steps: the last bits have grown by then
EARLY = 20


def work(family: str, small: bool = False) -> list[str]:
    """What all do, as keys of `colossus train`."""
    return [*SHAPES[family].split(), *TOKENS.split(), *WORK.split(), *(SMALL.split() if small else ())]


def rank_main(name: str, job: Job, pipe: Connection, listener: socket | None) -> None:
    """The life of a contestant's rank."""
    warnings.simplefilter("ignore")  # peers' advice on worker counts, and on GPUs that are not there
    logging.disable(logging.WARNING)  # the same, and what else they would have one install
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that ends in mid-loop leaves behind
    torch.set_num_threads(job.threads)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for those who would take what they see
    if job.world > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job.port, "WORLD_SIZE": job.world, "NODE_RANK": 0}
        for key, value in {**where, "RANK": job.rank, "LOCAL_RANK": job.rank, "LOCAL_WORLD_SIZE": job.world}.items():
            os.environ[key] = str(value)
    contestant = CONTESTANTS[name]
    module, function = contestant.entry.split(":")
    if module == OURS:
        importlib.import_module("train.light")  # first, as in a rank of `colossus train`
    try:
        main = getattr(importlib.import_module(module), function)
        main(job, Turns(pipe), *([listener] if listener else []))
    except ImportError as error:
        pipe.send({"missing": f"{error.name or error}: {contestant.needs or 'its import fails'}"})
    except BaseException:
        pipe.send({"error": traceback.format_exc()})


class Player:
    """A contestant under way: its ranks' pipes."""

    def __init__(self, name: str, base: Job, stack: ExitStack) -> None:
        self.name, self.losses = name, list[float]()
        context = multiprocessing.get_context("spawn")
        listener = nodes.listen(nodes.here(1))
        port = listener.getsockname()[1]
        own = CONTESTANTS[name].entry == f"{OURS}:ours"
        if not own:
            listener.close()  # its port is free for theirs
        self.pipes: list[Connection] = []
        for rank in range(base.world):
            job = dataclasses.replace(base, rank=rank, port=port)
            here, there = context.Pipe()
            sent = listener if own and rank == 0 and base.world > 1 else None
            process = context.Process(target=rank_main, args=(name, job, there, sent), daemon=False)
            process.start()
            there.close()
            stack.callback(process.join, 10)
            stack.callback(here.close)
            self.pipes.append(here)
        listener.close()

    def answer(self) -> list[dict[str, Any]]:
        answers = []
        for pipe in self.pipes:
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append({"error": "it ended without a word"})
            if "error" in answers[-1]:
                raise RuntimeError(f"{self.name}: {answers[-1]['error']}")
        return answers

    def turn(self, steps: int) -> float:
        """Seconds a step."""
        for pipe in self.pipes:
            pipe.send(steps)
        answers = self.answer()
        self.losses += [statistics.fmean(each) for each in zip(*(a["losses"] for a in answers), strict=True)]
        return float(max(answer["seconds"] for answer in answers)) / steps


def write_rows(config: Train, prepared: Prepared, path: Path, steps: int) -> None:
    """The rows of so many steps in the order in which we take them, for the others to read."""
    batch, ours = config.batch, Stream.of(config, prepared)
    with path.open("wb") as file:
        for step in range(steps):
            for v in range(batch.virtual_ranks):
                for i in range(batch.micro_batches):
                    file.write(ours.micro_batch(step, v, i).astype(np.uint16).tobytes())


def race(setting: Setting, names: list[str], config: Bench, workspace: Path, console: Console) -> dict[str, Any]:
    """All contestants of a setting, a row each. One that fails is named, and the others go on; without ours it ends."""
    absent, failed = dict[str, str](), dict[str, str]()
    players: dict[str, Player] = {}
    parameters: dict[str, int] = {}

    @contextmanager
    def failing(name: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if name == "ours":
                raise
            print(error, file=sys.stderr)
            failed[name] = f"failed: {str(error).splitlines()[-1]}"
            players.pop(name, None)

    with ExitStack() as stack:
        stack.callback(console.close)
        taking = [name for name in names if CONTESTANTS[name].takes_part(setting)]
        for number, name in enumerate(taking):
            console.progress(f"{setting}: models are built", number, len(taking))
            contestant = CONTESTANTS[name]
            if contestant.nanogpt and not checkout(config):
                absent[name] = f"needs {contestant.needs}"
                continue
            job, tokens = job_of(name, setting, config, workspace)
            player = Player(name, job, stack)
            with failing(name):
                ready = player.answer()[0]
                if "missing" in ready:
                    absent[name] = f"needs {ready['missing']}"
                else:
                    parameters[name], players[name] = ready["parameters"], player
        rounds: list[dict[str, float]] = []
        for number in range(config.rounds + 1):  # the first one warms up
            rounds.append({})
            for at, name in enumerate(list(players)[:: -1 if number % 2 else 1]):
                console.progress(f"{setting}: rounds", number + at / len(taking), config.rounds + 1)
                with failing(name):
                    rounds[-1][name] = players[name].turn(config.turn)
        for at, name in enumerate(list(players)):
            with failing(name):
                while (done := len(players[name].losses)) < config.steps:
                    console.progress(f"{setting}: to step {config.steps}", at + done / config.steps, len(taking))
                    players[name].turn(1)
    losses = {name: player.losses for name, player in players.items()}
    return table(setting, tokens, rounds[1:], losses, parameters, absent, failed) | {"micro_batch": config.micro_batch}


def job_of(name: str, setting: Setting, config: Bench, workspace: Path) -> tuple[Job, int]:
    """What a contestant is told, with its rows and a run's folder laid out; and the tokens of a step."""
    contestant = CONTESTANTS[name]
    ranks = 1 if contestant.alone else setting.ranks
    overrides = [*work(setting.family, config.small), f"precision={setting.precision}", f"devices={ranks}"]
    overrides += [f"compile={str(contestant.compiled).lower()}", f"runs={workspace}", f"name={name}"]
    overrides += [f"batch.virtual_ranks={SEQUENCES // config.micro_batch}"]
    ours = plan.resolve(compose.config("train", overrides))
    prepared, _ = prepare(ours.data, seed=ours.seed, context=ours.model.context)
    rows = workspace / "train.bin"
    if not rows.exists():
        write_rows(ours, prepared, rows, 2 + max(config.steps, (config.rounds + 1) * config.turn))
    with RunFolder(ours.folder) as run:
        run.write(ours, dataclasses.asdict(prepared))
    job = Job(
        overrides=tuple(overrides),
        folder=str(ours.folder),
        rows=str(rows),
        nanogpt=checkout(config),
        vocab=prepared.vocab,
        threads=setting.threads * setting.ranks // ranks,
        rank=0,
        world=ranks,
        port=0,
        compiled=contestant.compiled,
    )
    return job, ours.tokens_per_step


def table(
    setting: Setting,
    tokens: int,
    rounds: list[dict[str, float]],
    losses: dict[str, list[float]],
    parameters: dict[str, int],
    absent: dict[str, str],
    failed: dict[str, str],
) -> dict[str, Any]:
    rows = []
    for name, own in losses.items():
        rates = [tokens / measured[name] for measured in rounds]
        ratios = [measured[name] / measured["ours"] for measured in rounds]
        apart = [abs(a - b) / b for a, b in zip(own, losses["ours"], strict=True)]
        early, late = max(apart[:EARLY]), max(apart[EARLY:], default=0.0)
        rows.append(
            {
                "contestant": name,
                "title": CONTESTANTS[name].title,
                "tokens_per_s": statistics.median(rates),
                "tokens_per_s_quartiles": quartiles(rates),
                "ours_is_faster_by_median": statistics.median(ratios),
                "ours_is_faster_by_quartiles": quartiles(ratios),
                "parameters": parameters[name],
                "last_loss": own[-1],
                "loss_apart_early": early,
                "loss_apart_later": late,
                "same_work": not CONTESTANTS[name].trains
                or bool(
                    parameters[name] == parameters["ours"]
                    and early <= TOLERANCE[setting.precision]
                    and late <= LATER[setting.precision]
                ),
            }
        )
    return {
        **setting._asdict(),
        "tokens_per_step": tokens,
        "rounds": len(rounds),
        "steps": len(losses["ours"]),
        "first_loss": losses["ours"][0],
        "rows": rows,
        "left_out": absent,
        "failed": failed,
    }


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4)[::2] if len(values) > 1 else values * 2


def show(setting: Setting, result: dict[str, Any]) -> None:
    print(f"{setting}: {result['rounds']} rounds, {result['steps']} steps, first loss {result['first_loss']:.4f}")
    for row in result["rows"]:
        low, high = row["ours_is_faster_by_quartiles"]
        print(f"  {row['title']:43} {row['tokens_per_s']:8,.0f} tokens/s", end="")
        print(f"  ours x {row['ours_is_faster_by_median']:.3f} ({low:.3f} … {high:.3f})", end="")
        print(f"  {row['parameters']:,} parameters, loss {row['last_loss']:.4f}", end="")
        print(f" apart {row['loss_apart_early']:.1e} {row['loss_apart_later']:.1e}", end="")
        print("" if row["same_work"] else "  NOT THE SAME WORK")
    for name, why in (result["left_out"] | result["failed"]).items():
        print(f"  {CONTESTANTS[name].title:43} left out, {why}")
    sys.stdout.flush()


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "lightning", "transformers", "accelerate", "litgpt", "torchtitan"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def said(config: Bench) -> str:
    """The command that asks for this, without paths of this machine."""
    words = {field.name: (getattr(config, field.name), field.default) for field in dataclasses.fields(config)}
    keys = {name: value for name, (value, usual) in words.items() if value != usual and name not in ("nanogpt", "out")}
    shown = (f"{name}={str(value).replace(' ', '')}".replace("'", "") for name, value in keys.items())
    return " ".join(["colossus bench", *shown])


def held(out: str) -> dict[Setting, dict[str, Any]]:
    """What an earlier call has left there. Raises Refused where the file holds something else."""
    path = Path(out).expanduser()
    if not out or not path.exists():
        return {}
    try:
        results = json.loads(path.read_text())["results"]
        return {Setting(*(one[field] for field in Setting._fields)): one for one in results if one["command"]}
    except (ValueError, KeyError, TypeError) as error:
        raise Refused("out", f"'{out}' is there and holds no figures of this command: choose another name") from error


def keep(out: str, found: dict[Setting, dict[str, Any]]) -> None:
    path, results = Path(out).expanduser(), [found[setting] for setting in SETTINGS if setting in found]
    commands = "; ".join(dict.fromkeys(result["command"] for result in results))
    figures = report.write(path, commands, results=results)
    path.with_suffix(".svg").write_text(bars.draw(figures))


def main(config: Bench, names: list[str], settings: list[Setting]) -> int:
    found, console = held(config.out), Console()
    of_this_call = {"command": said(config), "date": datetime.date.today().isoformat(), "versions": versions()}
    for setting in settings:
        with tempfile.TemporaryDirectory() as workspace:
            found[setting] = race(setting, names, config, Path(workspace), console) | of_this_call
        show(setting, found[setting])
        if config.out:
            keep(config.out, found)
    results = [found[setting] for setting in settings]
    equal = all(row["same_work"] for result in results for row in result["rows"])
    return DONE if equal and not any(result["failed"] for result in results) else FAILED
