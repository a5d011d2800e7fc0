"""Others beside us at the same work: `make bench-peers`, or `python -m tests.bench.peers`.

Same architecture (GPT-2: 6 layers, 384 wide, 6 heads, T = 256, 4,096 ids, no dropout), initial weights, tokens in the
same order, 4,096 of them a step, AdamW, clipping, rate; fp32 and bf16 autocast; one process with one thread and with
two, and two ranks. What the contestants are, what each was given, and how to add one: `tests/bench/contestants.py`.

Each lives in a process of its own and waits while another one has its turn: A B C … C B A A B C …, so that a slow
minute of the machine hits all of them. Among them is one that multiplies large matrices, as many FLOPs as a step has:
its ratio is the share of the machine's limit that ours reaches (6 · parameters + 12 · L · d · T a token, as MFU
counts). A figure is the median, with quartiles, of the ratios to ours of the same round; the first round warms up. That
the work is the same is shown: parameters are counted, and the losses of all steps compared with ours. `--steps 200`
goes on after the rounds, until each has done 200 steps, and compares these too.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import multiprocessing
import os
import statistics
import sys
import tempfile
import traceback
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socket
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.bench import contestants, report
from tests.bench.contestants import CONTESTANTS, Contestant, Job, Turns
from train import compose, nodes, plan
from train.config import Train
from train.data.prepare import Prepared, prepare
from train.engine import stream
from train.folder import RunFolder

SHAPE = "model=gpt2_micro model.layers=6 model.width=384 model.heads=6 model.ffn=1536 model.context=256"
WORK = f"{SHAPE} batch.sequences=16 data=stdlib data.tokenizer.vocab=4096 optimizer.lr=1e-3 steps=1000000"
WORK += " schedule=constant schedule.warmup_steps=0 accelerator=cpu logger=[]"

# Relative, of each step's loss. In fp32 the sums alone come in other orders, and AdamW makes more of what differs with
# every step; train.py prints four decimals besides. In bf16 operations round to 2^-8, each implementation elsewhere.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
LATER = {"fp32": 1e-2, "bf16": 3e-2}  # after the first twenty steps: the last bits have grown by then
EARLY = 20


class Setting(NamedTuple):
    precision: str
    ranks: int
    threads: int  # of a rank

    def __str__(self) -> str:
        ranks, threads = ("s" * (number > 1) for number in self[1:])
        return f"{self.precision}, {self.ranks} rank{ranks} x {self.threads} thread{threads}"


SETTINGS = [Setting(p, *shape) for shape in ((1, 1), (1, 2), (2, 1)) for p in ("bf16", "fp32")]


def rank_main(name: str, job: Job, pipe: Connection, listener: socket | None) -> None:
    """The life of a contestant's rank."""
    contestants.quiet()
    torch.set_num_threads(job.threads)
    if job.world > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job.port, "WORLD_SIZE": job.world, "NODE_RANK": 0}
        for key, value in {**where, "RANK": job.rank, "LOCAL_RANK": job.rank, "LOCAL_WORLD_SIZE": job.world}.items():
            os.environ[key] = str(value)
    contestant = CONTESTANTS[name]
    try:
        contestant.main(job, Turns(pipe), *([listener] if contestant.main is contestants.ours else []))
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
        own = CONTESTANTS[name].main is contestants.ours
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


def config_of(setting: Setting, workspace: Path, name: str, contestant: Contestant) -> tuple[list[str], Train]:
    overrides = [*WORK.split(), f"precision={setting.precision}", f"devices={setting.ranks}", f"name={name}"]
    overrides += [f"compile={str(contestant.compiled).lower()}", f"runs={workspace}"]
    return overrides, plan.resolve(compose.config("train", overrides))


def write_rows(config: Train, prepared: Prepared, path: Path, steps: int) -> None:
    """The rows of so many steps in the order in which we take them, for the others to read."""
    batch, ours = config.batch, stream(config, prepared)
    with path.open("wb") as file:
        for step in range(steps):
            for v in range(batch.virtual_ranks):
                for i in range(batch.micro_batches):
                    file.write(ours.micro_batch(step, v, i).astype(np.uint16).tobytes())


def race(setting: Setting, names: list[str], options: argparse.Namespace, workspace: Path) -> dict[str, Any]:
    """All contestants of a setting, a row each."""
    absent: dict[str, str] = {}
    players: list[Player] = []
    parameters: dict[str, int] = {}
    with ExitStack() as stack:
        for name in names:
            contestant = CONTESTANTS[name]
            if setting.ranks > 1 and not contestant.several:
                continue
            if contestant.nanogpt and not options.nanogpt:
                absent[name] = contestant.needs
                continue
            overrides, config = config_of(setting, workspace, f"{name}-{SETTINGS.index(setting)}", contestant)
            prepared, _ = prepare(config.data, seed=config.seed, context=config.model.context)
            rows = workspace / "train.bin"
            if not rows.exists():
                write_rows(config, prepared, rows, 2 + max(options.steps, (options.rounds + 1) * options.turn))
            with RunFolder(config.folder) as run:
                run.write(config, dataclasses.asdict(prepared))
            base = Job(
                overrides=tuple(overrides),
                folder=str(config.folder),
                rows=str(rows),
                nanogpt=options.nanogpt,
                vocab=prepared.vocab,
                threads=setting.threads,
                rank=0,
                world=setting.ranks,
                port=0,
                compiled=contestant.compiled,
            )
            player = Player(name, base, stack)
            ready = player.answer()[0]
            if "missing" in ready:
                absent[name] = ready["missing"]
                continue
            parameters[name] = ready["parameters"]
            players.append(player)
        rounds: list[dict[str, float]] = []
        for number in range(options.rounds + 1):  # the first one warms up
            order = players[:: -1 if number % 2 else 1]
            rounds.append({player.name: player.turn(options.turn) for player in order})
        for player in players if options.steps else ():
            if (more := options.steps - len(player.losses)) > 0:
                player.turn(more)
    return table(setting, config, rounds[1:], {p.name: p.losses for p in players}, parameters, absent)


def table(
    setting: Setting,
    config: Train,
    rounds: list[dict[str, float]],
    losses: dict[str, list[float]],
    parameters: dict[str, int],
    absent: dict[str, str],
) -> dict[str, Any]:
    rows = []
    for name, own in losses.items():
        ratios = [measured[name] / measured["ours"] for measured in rounds]
        apart = [abs(a - b) / b for a, b in zip(own, losses["ours"], strict=True)]
        early, late = max(apart[:EARLY]), max(apart[EARLY:], default=0.0)
        rows.append(
            {
                "contestant": name,
                "title": CONTESTANTS[name].title,
                "tokens_per_s": config.tokens_per_step / statistics.median(measured[name] for measured in rounds),
                "ours_is_faster_by_median": statistics.median(ratios),
                "ours_is_faster_by_quartiles": statistics.quantiles(ratios, n=4)[::2]
                if len(ratios) > 1
                else ratios * 2,
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
        "tokens_per_step": config.tokens_per_step,
        "rounds": len(rounds),
        "steps": len(losses["ours"]),
        "first_loss": losses["ours"][0],
        "rows": rows,
        "left_out": absent,
    }


def show(setting: Setting, result: dict[str, Any]) -> None:
    print(f"{setting}: {result['rounds']} rounds, {result['steps']} steps, first loss {result['first_loss']:.4f}")
    for row in result["rows"]:
        low, high = row["ours_is_faster_by_quartiles"]
        print(f"  {row['title']:38} {row['tokens_per_s']:8,.0f} tokens/s", end="")
        print(f"  ours x {row['ours_is_faster_by_median']:.3f} ({low:.3f} … {high:.3f})", end="")
        print(f"  {row['parameters']:,} parameters, loss {row['last_loss']:.4f}", end="")
        print(f" apart {row['loss_apart_early']:.1e} {row['loss_apart_later']:.1e}", end="")
        print("" if row["same_work"] else "  NOT THE SAME WORK")
    for name, why in result["left_out"].items():
        print(f"  {CONTESTANTS[name].title:38} left out, needs {why}")
    sys.stdout.flush()


def versions() -> dict[str, str]:
    found = {}
    for name in ("lightning", "transformers", "accelerate"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=int, default=1, help="steps of a turn")
    parser.add_argument("--steps", type=int, default=0, help="go on after the rounds until so many steps are done")
    parser.add_argument("--only", default="", help="contestants, separated by commas; ours always takes part")
    parser.add_argument("--settings", default="", help="only settings whose name holds this, such as 'bf16, 1 rank '")
    parser.add_argument("--nanogpt", default=os.environ.get("NANOGPT", ""), help="a checkout of nanoGPT")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    options.nanogpt = str(Path(options.nanogpt).expanduser().resolve()) if options.nanogpt else ""
    chosen = options.only.split(",") if options.only else list(CONTESTANTS)
    if odd := set(chosen) - set(CONTESTANTS):
        parser.error(f"no contestant is called {', '.join(sorted(odd))}: there are {', '.join(CONTESTANTS)}")
    names = [name for name in CONTESTANTS if name in chosen or name == "ours"]
    results = []
    for setting in SETTINGS:
        if options.settings in str(setting):
            with tempfile.TemporaryDirectory() as workspace:
                results.append(race(setting, names, options, Path(workspace)))
            show(setting, results[-1])
    if not options.dry:
        report.write("peers", "make bench-peers", versions=versions(), results=results)
    return 0 if all(row["same_work"] for result in results for row in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
