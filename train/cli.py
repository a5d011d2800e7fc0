"""`colossus`: the table of commands, and what they have in common – help, exit codes, refusals in one line."""

from __future__ import annotations

import atexit
import errno
import gc
import importlib
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, NamedTuple, get_type_hints

from omegaconf import DictConfig

from train import compose
from train.channel import REQUESTS
from train.checks import DONE, FAILED, REFUSED, Refused
from train.commands import SCHEMAS, Launch
from train.config import Train
from train.shapes import MODELS

INTERRUPTED = 130  # Ctrl-C, or another request to stop, in a command that saves nothing or has not begun

atexit.register(gc.freeze)  # or the collector looks through all that is left, for a tenth of a short command's time


class Command(NamedTuple):
    summary: str
    entry: str  # module:function, imported when the command is called; it takes the configuration, returns a code
    example: str


COMMANDS = {
    "train": Command("train a model, or go on with a run of its name", "train.job:train", "model=llama_mini"),
    "plan": Command("what a training run would be: memory, time, disk, money", "train.outlook:plan", "model=llama_1b"),
    "drill": Command("a run under faults and its twin without: are the bits equal?", "train.drill:drill", "devices=4"),
    "sample": Command("continue a prompt with a run's model", "train.sample:sample", "run=llama_nano prompt='def f('"),
    "eval": Command("bits per byte and perplexity of a run's model", "train.evaluate:main", "run=llama_nano"),
    "export": Command("a run's model as transformers loads it", "train.export:export", "run=llama_nano format=hf"),
    "verify": Command("read every byte of a run's checkpoints", "train.verify:verify", "run=llama_nano"),
    "replay": Command("compute a step again: do the bits agree?", "train.replay:replay", "run=llama_nano step=100"),
    "diff": Command("where two runs part, and why", "train.diff:diff", "run=[w1,w2]"),
    "resize": Command("more or fewer ranks for a run under way", "train.resize:resize", "run=llama_nano devices=4"),
    "probe": Command("what this node's devices can do; is one sick or slow?", "train.probe:probe", "check=true"),
    "launch": Command("train somewhere else", "train.launch.submit:launch", "target=slurm nodes=2 target.gpus=8"),
    "scale": Command("what a job would be on a large cluster", "train.projector:scale", "cluster=llama3_16k"),
    "report": Command("a run, or several, as one page to look at", "train.report.command:report", "run=[w1,w2]"),
    "watch": Command("a run while it goes on; web=true: in a browser", "train.watch:watch", "run=llama_nano"),
    "bench": Command("others beside us at the same work", "train.bench:bench", "settings=bf16 rounds=5"),
    "runs": Command("list the runs", "train.runs:runs", "format=json"),
}

COMPUTE = ("sample", "eval", "export", "replay", "diff")  # in this process, by lightning.fabric
GROUPS = ("model", "data", "optimizer", "schedule", "reduce", "resume", "faults", "cluster", "target", "experiment")


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done; 2 refused, nothing started; 75 stopped on request, saved; else a failure with its cause."""
    previous = {number: signal.signal(number, signal.default_int_handler) for number in REQUESTS}
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without our signs shows others
    try:
        return _guarded(lambda: _dispatch(sys.argv[1:] if arguments is None else arguments))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _dispatch(arguments: list[str]) -> int:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise Refused("torchrun", "run `colossus train devices=N` instead: it starts its ranks itself")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return DONE
    name, flags = arguments[0], {argument for argument in arguments[1:] if argument.startswith("-")}
    overrides = [argument for argument in arguments[1:] if not argument.startswith("-")]
    if name not in COMMANDS:
        raise Refused(name, f"no such command{compose.did_you_mean(name, list(COMMANDS))} (try colossus --help)")
    for flag in sorted(flags - {"-h", "--help", "-m", "--multirun", "--cfg"}):
        raise Refused(flag, "no such flag: there are --help, --cfg and --multirun; the rest is key=value")
    if flags & {"-h", "--help"}:
        print(help_text(name))
        return DONE
    if "--cfg" in flags:
        print(compose.text(name, overrides), end="")
        return DONE
    module, function = COMMANDS[name].entry.split(":")
    if name in COMPUTE and "lightning" not in sys.modules:
        importlib.import_module("train.light")  # first, or all of lightning comes along
    run = getattr(importlib.import_module(module), function)
    several = bool(flags & {"-m", "--multirun"})
    if SCHEMAS[name] is Launch:
        return int(run(compose.jobs(name, overrides, several=several)))
    if several:
        if not issubclass(SCHEMAS[name], Train):
            raise Refused("--multirun", f"sweeps are for train, plan, drill and launch: call {name} for each value")
        return compose.sweep(name, overrides, lambda config: _guarded(lambda: run(config)))
    return int(run(compose.config(name, overrides)))


def _guarded(run: Callable[[], int]) -> int:
    """The exit code of a command, or of one job of a sweep."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except Refused as refusal:
        print("colossus:", " ".join(str(refusal).splitlines()), file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if error.filename is None:
            if error.errno not in (errno.EPIPE, errno.ENOSPC):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes
        if error.errno != errno.EPIPE:  # else who reads our output, `head` perhaps, has seen enough
            print(f"colossus: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return FAILED


def overview() -> str:
    lines = ["colossus COMMAND [key=value …]    data-parallel LLM training, exact for any number of ranks", ""]
    lines += [f"  {name:8} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "  colossus train           the main job: a small model on real text, on all cores or GPUs"]
    lines += ["  colossus report run=…    what became of it, on one page; colossus runs: which there are"]
    lines += ["  colossus train --help    its keys; --cfg prints the configuration, --multirun sweeps"]
    return "\n".join(lines)


def help_text(name: str) -> str:
    """What a command does, its config groups, and each of its keys with type, default and meaning."""
    command, schema = COMMANDS[name], SCHEMAS[name]
    doc = inspect.cleandoc(schema.__doc__ or "").replace("\n", "\n  ")
    lines = [f"colossus {name} [key=value …]    {command.summary}", "", f"  {doc}", ""]
    lines += [f"  e.g.  colossus {name} {command.example}", ""]
    with compose.hydra():
        keys = {item.name for item in fields(schema)} | ({"experiment"} if issubclass(schema, Train) else set())
        groups = {group: compose.options(group) for group in GROUPS if group in keys}
        values = compose.values(name)
    if groups:
        lines += ["Groups (group=variant):"]
        lines += [f"  {group:12} {', '.join(variants)}" for group, variants in groups.items() if variants] + [""]
    lines += ["Keys (key=default, meaning):", *(_line(key, values, why) for key, why in _keys(schema))]
    if name == "train":
        lines += ["", "Flags: --cfg (print the configuration), --multirun (sweep over key=a,b), --help"]
        lines += ["Exit codes: 0 done; 2 refused, nothing started; 75 stopped on request, saved; else a failure"]
    return "\n".join(lines)


def _keys(schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Keys with their meaning, taken from the comment behind the field: one place to write it."""
    source = "".join(inspect.getsource(base) for base in reversed(schema.__mro__[:-1]))
    comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", source, re.M))
    hints = get_type_hints(schema)
    for item in fields(schema):
        kind = hints[item.name]
        if prefix == "" and item.name == "model":
            yield from {key: why for model in MODELS.values() for key, why in _keys(model, "model.")}.items()
        elif isinstance(kind, type) and is_dataclass(kind):
            yield from _keys(kind, f"{prefix}{item.name}.")
        else:
            choices = kind if isinstance(kind, type) and issubclass(kind, Enum) else ()
            yield f"{prefix}{item.name}", comments.get(item.name, "") or " | ".join(choice.name for choice in choices)


def _line(key: str, values: dict[str, Any], meaning: str) -> str:
    value = values.get(key)
    plain = "" if value is None or isinstance(value, DictConfig) else str(value).replace(" ", "")
    shown = value.name if isinstance(value, Enum) else plain
    return f"  {key + '=' + shown:32} {meaning}".rstrip()
