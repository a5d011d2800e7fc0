"""What the commands take besides `train`: their keys, types, defaults and checks; and the table of all schemas."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from train.checks import at_least, at_most, choice, require, seconds, utf8
from train.config import ACCELERATORS, GROUPS, Data, Model, TokenizerKind, Train
from train.shapes import MODELS


class Format(Enum):
    table = "table"
    json = "json"

    def tell(self, found: Any, show: Callable[[Any], None]) -> None:
        """What a command has found, for programs or, by `show`, for people."""
        (show if self is Format.table else lambda found: print(json.dumps(found)))(found)


@dataclass(slots=True, kw_only=True)
class Plan(Train):
    """`colossus plan`: a training run, by arithmetic alone."""

    format: Format = Format.table


@dataclass(slots=True, kw_only=True)
class Drill(Train):
    """`colossus drill`: a run under faults on order and its twin without any, as runs/NAME and runs/NAME-twin.

    Exit code 0 where every fault has struck and was survived, and not one bit of the result has changed.
    """

    format: Format = Format.table


@dataclass(slots=True, kw_only=True)
class Sample:
    """`colossus sample`: continue a prompt with a run's model."""

    run: str = MISSING  # a folder, or a name under runs/
    step: int = -1  # of the checkpoint; -1: the newest
    prompt: str = ""  # what the text begins with; empty: a new document
    tokens: int = 200  # at most, after the prompt
    count: int = 1  # samples, each with a seed of its own
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # draw from the likeliest tokens that have this share together; 1: from all
    seed: int = 0
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        at_least(self, "", tokens=1, count=1, temperature=0, top_k=0)
        utf8(self.prompt, "prompt")
        require(0 <= self.seed < 2**63, "seed", f"{self.seed} is not in 0 … 2^63-1")
        at_most(self, count=10_000)
        require(0 < self.top_p <= 1, "top_p", f"{self.top_p} is not in (0, 1]")
        choice(self.accelerator, "accelerator", ACCELERATORS)


@dataclass(slots=True, kw_only=True)
class Evaluate:
    """`colossus eval`: bits per byte and perplexity of a run's model on its validation set, or on `data`."""

    run: str = MISSING  # a folder, or a name under runs/
    step: int = -1
    data: Data | None = None  # data=…: another corpus, all of it (its val*.bin, of .bin files), in the run's tokens
    tokens: int = 0  # of the validation set, or of that corpus; 0: all
    micro_batch: int = 8
    accelerator: str = "auto"
    format: Format = Format.table

    def __post_init__(self) -> None:
        at_least(self, "", tokens=0, micro_batch=1)
        at_most(self, micro_batch=10_000)
        given = self.data is not None and self.data.tokenizer.kind in (TokenizerKind.bytes, TokenizerKind.file)
        require(not given, "data.tokenizer", "is the run's own, which its model knows: leave it out")
        choice(self.accelerator, "accelerator", ACCELERATORS)


class Layout(Enum):
    hf = "hf"  # config.json, model.safetensors and a tokenizer; grok's weights under the names of xAI's code


@dataclass(slots=True, kw_only=True)
class Export:
    """`colossus export`: a run's model and tokenizer as a folder that transformers loads, and `model=hf`."""

    run: str = MISSING  # a folder, or a name under runs/
    step: int = -1  # of the checkpoint; -1: the newest
    format: Layout = Layout.hf
    out: str = ""  # a new folder; empty: hf, in the run's


@dataclass(slots=True, kw_only=True)
class Runs:
    """`colossus runs`: the runs under a folder, a line each."""

    runs: str = "runs"  # the folder of run folders
    format: Format = Format.table


@dataclass(slots=True, kw_only=True)
class Verify:
    """`colossus verify`: every byte of a run's checkpoints, read and compared. Exit code 1 where one is damaged."""

    run: str = MISSING  # a folder, or a name under runs/
    step: int = -1  # -1: all
    format: Format = Format.table


@dataclass(slots=True, kw_only=True)
class Replay:
    """`colossus replay`: compute a step of a run again, in one process, and compare the bits with the run's record.

    Exit code 0 where all agree, 1 where one differs.
    """

    run: str = MISSING  # a folder, or a name under runs/
    step: int = MISSING
    virtual_rank: int = -1  # this part of the step only; -1: all of it
    format: Format = Format.table

    def __post_init__(self) -> None:
        require(self.step >= 1, "step", f"{self.step} is no step: the first one is 1")
        require(self.virtual_rank >= -1, "virtual_rank", f"{self.virtual_rank} is no virtual rank (-1: all)")


@dataclass(slots=True, kw_only=True)
class Diff:
    """`colossus diff`: the first step at which two runs part, where in it, and why. Exit code 1 where they part."""

    run: Any = MISSING  # [a,b]: folders, or names under runs/
    recompute: bool = True  # compute steps again where the records do not say enough
    format: Format = Format.table

    def __post_init__(self) -> None:
        two = isinstance(self.run, list) and len(self.run) == 2
        require(two, "run", f"'{self.run}' does not name two runs: write run=[a,b]")


@dataclass(slots=True, kw_only=True)
class Resize:
    """`colossus resize`: so many ranks for a run that is under way, from the end of a step on."""

    run: str = MISSING  # a folder, or a name under runs/
    devices: int = MISSING  # ranks on this node from then on

    def __post_init__(self) -> None:
        at_least(self, "", devices=1)


MOST_SEQUENCES = 10**6  # a step: what is searched for grows with them


@dataclass(slots=True, kw_only=True)
class Scale:
    """`colossus scale`: what a job would be on a cluster that is not here, with the projector's error beside it.

    `table=IN.csv out=OUT.csv` predicts the rows of published runs, `show=validation` says what the projector is worth,
    `show=claims` what figures say of public statements. Of the plan, what is left out (0) is searched for. `run=` takes
    model, batch and tokens from a finished run, and its measured step time against what this model says of the machine
    it ran on: all that is predicted is scaled by that.
    """

    model: Model = MISSING
    cluster: dict[str, Any] = MISSING  # a variant of configs/cluster; cluster.gpus.h100_sxm.value=1000 changes it
    run: str = ""  # a folder, or a name under runs/: project this run
    workload: str = ""  # a published model instead of model=: gpt3_175b, llama3_405b, grok1_314b, …
    vocab: int = 128_256  # of model=
    context: int = 0  # tokens a sequence; 0: the model's own
    batch: int = 0  # sequences a step, all of them; 0: 2048, or those of run=
    tokens: float = 0.0  # of the whole training; 0: 20 an active parameter (arXiv 2203.15556)
    gpus: int = 0  # of the cluster's, at most; 0: all
    tp: int = 0  # tensor parallel
    pp: int = 0  # pipeline parallel
    cp: int = 0  # context parallel
    ep: int = 0  # expert parallel
    micro_batch: int = 0  # sequences a forward pass
    recompute: str = "auto"  # auto | none | selective | full
    sharding: str = "optimizer"  # what data parallelism cuts: nothing | optimizer | gradients | weights
    precision: str = "bf16"  # bf16 | fp8
    utilization: float = 0.40  # MFU of the constant-MFU estimate beside it
    show: str = "plan"  # plan | validation | claims
    table: str = ""  # a CSV of runs in the published format
    out: str = ""  # where that goes with predictions; of a plan: a page NAME.html, NAME.csv or NAME.json
    format: Format = Format.table

    def __post_init__(self) -> None:
        at_least(self, "", vocab=2, context=0, batch=0, gpus=0, tp=0, pp=0, cp=0, ep=0, micro_batch=0)
        at_most(self, vocab=10**8, context=10**8, batch=MOST_SEQUENCES)
        require(0 <= self.tokens < 1e18, "tokens", f"{self.tokens:g} is no number of tokens")
        require(0 < self.utilization < 1, "utilization", f"{self.utilization} is not in (0, 1)")
        choice(self.recompute, "recompute", ("auto", "none", "selective", "full"))
        choice(self.precision, "precision", ("bf16", "fp8"))
        choice(self.show, "show", ("plan", "validation", "claims"))
        choice(self.sharding, "sharding", ("nothing", "optimizer", "gradients", "weights"))
        plain = self.table or not self.out or self.out.endswith((".html", ".csv", ".json"))
        require(bool(plain), "out", f"'{self.out}' is no .html, .csv or .json")
        require(not (self.run and self.workload), "workload", "run= brings its own model: leave one of them out")


@dataclass(slots=True, kw_only=True)
class Probe:
    """`colossus probe`: what this node's devices can do, measured on all of them at once.

    `check=true` is for before a run: exit code 1, and a line for each device that is slow, or computes other bits than
    the others or than it did a moment ago. Else a CPU's figures, with its ranks' sums and disk, are kept for
    `colossus scale cluster=here`.
    """

    devices: int | str = "auto"  # as many as `colossus train` would use
    accelerator: str = "auto"
    seconds: float = 3.0  # of each measurement
    check: bool = False
    format: Format = Format.table

    def __post_init__(self) -> None:
        choice(self.accelerator, "accelerator", ACCELERATORS)
        require(self.devices == "auto" or isinstance(self.devices, int), "devices", "is neither auto nor a number")
        if isinstance(self.devices, int):
            at_least(self, "", devices=1)
        require(self.seconds > 0, "seconds", f"{self.seconds} is no time: use a number above 0")


@dataclass(slots=True, kw_only=True)
class Bench:
    """`colossus bench`: others beside us at the same work, in turns. Exit code 1 where one failed or did other work."""

    contestants: Any = ""  # [ours,litgpt,…]; empty: all. ours always takes part
    settings: Any = ""  # bf16, llama-1x2, [gpt2-bf16-1x1,…]: those with all words of one; empty: all
    rounds: int = 7  # of turns, after one that warms up
    turn: int = 1  # steps in it
    micro_batch: int = 4  # sequences of a forward pass, of the 16 of a step, where a contestant may choose
    steps: int = 0  # go on after the rounds, until each has done so many
    small: bool = False  # a model of no size: do all still do the same work?
    nanogpt: str = ""  # a checkout of it; empty: what NANOGPT says
    out: str = ""  # NAME.json for the figures, and NAME.svg beside it for a plot; empty: neither

    def __post_init__(self) -> None:
        at_least(self, "", rounds=1, turn=1, steps=0)
        require(self.micro_batch in (1, 2, 4, 8), "micro_batch", f"is {self.micro_batch}: use 1, 2, 4 or 8")
        require(not self.out or self.out.endswith(".json"), "out", f"'{self.out}' is no .json")


@dataclass(slots=True, kw_only=True)
class Report:
    """`colossus report`: a run, or several side by side, as one HTML file that needs nothing else."""

    run: Any = MISSING  # a folder, or a name under runs/; [a,b,…]: several
    out: str = ""  # the file; empty: report.html in the run's folder, of several one beside the first's

    def __post_init__(self) -> None:
        require(bool(self.names) and all(self.names), "run", "names no run: write run=NAME, or run=[a,b]")

    @property
    def names(self) -> list[str]:
        return [str(name) for name in self.run] if isinstance(self.run, list) else [str(self.run)]


@dataclass(slots=True, kw_only=True)
class Watch:
    """`colossus watch`: a run while it goes on, in the terminal; ends with it. It only reads the run's folder."""

    run: str = MISSING  # a folder, or a name under runs/
    every: float = 1.0  # seconds between looks
    web: bool = False  # its report instead, for a browser on this machine, made anew every few seconds
    port: int = 0  # of web=true, on 127.0.0.1; 0: any that is free

    def __post_init__(self) -> None:
        require(self.every > 0, "every", f"{self.every} is no time: use a number above 0")
        require(0 <= self.port < 65_536, "port", f"{self.port} is no port: use 0 … 65535")


class Place(Enum):
    local = "local"  # this machine
    slurm = "slurm"  # a cluster, by sbatch
    skypilot = "skypilot"  # clouds, by sky
    kubernetes = "kubernetes"  # a cluster with Kubeflow Trainer v2, by kubectl
    compose = "compose"  # containers on one machine, by docker compose


# Which places heed a key; elsewhere it is refused.
HEEDED = {
    **dict.fromkeys(("gpus", "cpus"), (Place.slurm, Place.skypilot, Place.kubernetes)),
    **dict.fromkeys(("time", "partition", "account"), (Place.slurm,)),
    **dict.fromkeys(("spot", "infra"), (Place.skypilot,)),
    **dict.fromkeys(("image", "mounts"), (Place.skypilot, Place.kubernetes, Place.compose)),
    "gpu": (Place.slurm, Place.skypilot),
    "grace": (Place.slurm, Place.kubernetes, Place.compose),
    "restarts": (Place.kubernetes, Place.compose),
    "namespace": (Place.kubernetes,),
}


@dataclass(slots=True, kw_only=True)
class Target:
    """A place and what is asked of it, a node at a time. One's own belong into ./configs/target."""

    kind: Place = MISSING
    gpus: int = 0  # a node; 0: none
    gpu: str = ""  # their kind, as the place calls it: H100
    cpus: int = 0  # a node; 0: as many as the place gives
    time: str = ""  # slurm: the limit after which the job is queued again, such as 2h
    grace: int = 120  # seconds to save in, from being asked to stop to being ended
    partition: str = ""  # slurm
    account: str = ""  # slurm
    image: str = ""  # of docker/Dockerfile, with a registry from which the nodes can fetch it
    mounts: list[str] = field(default_factory=list)  # SOURCE:/there: a bucket, folder or claim, for data and runs
    spot: bool = True  # skypilot: machines that can be taken away, at a lower price
    infra: str = ""  # skypilot: aws, gcp/us-central1, k8s/my-context
    namespace: str = "default"  # kubernetes
    restarts: int = 100  # of the whole job, before it fails

    def __post_init__(self) -> None:
        at_least(self, "target.", gpus=0, cpus=0, grace=10, restarts=0)
        for key in fields(self)[1:]:
            default = key.default_factory() if callable(key.default_factory) else key.default
            places, value = HEEDED[key.name], getattr(self, key.name)
            names = ", ".join(place.name for place in places)
            require(value == default or self.kind in places, f"target.{key.name}", f"is for {names} only: leave it out")
            plain = not isinstance(value, str) or re.fullmatch(r"[\w./:@+-]*", value)
            require(bool(plain), f"target.{key.name}", f"'{value}' has letters that no place takes")
        for mount in self.mounts:
            source, colon, there = mount.rpartition(":")
            good = bool(source and colon) and re.fullmatch(r"(/[\w.-]+)+", there)
            require(bool(good), "target.mounts", f"'{mount}' is not SOURCE:/there")
        require(not self.gpu or self.gpus > 0, "target.gpu", "needs target.gpus=N too")
        seconds(self.time, "target.time")

    @property
    def places(self) -> list[str]:
        """Where things are mounted."""
        return [mount.rpartition(":")[2] for mount in self.mounts]


@dataclass(slots=True, kw_only=True)
class Launch(Train):
    """`colossus launch`: a training job somewhere else. The keys are those of `colossus train`, and the target's.

    With --multirun, slurm gets one array, other places a job for each combination.
    """

    target: Target = MISSING
    dry: bool = False  # print what would be submitted, and do not


SCHEMAS: dict[str, type] = {"train": Train, "plan": Plan, "sample": Sample, "eval": Evaluate, "runs": Runs}
SCHEMAS |= {"drill": Drill, "verify": Verify, "replay": Replay, "diff": Diff, "resize": Resize, "export": Export}
SCHEMAS |= {"scale": Scale, "probe": Probe, "launch": Launch, "report": Report, "watch": Watch, "bench": Bench}


@functools.cache
def register() -> None:
    """Tell Hydra the schemas; the YAML files name them in their defaults."""
    store = ConfigStore.instance().store
    for name, schema in SCHEMAS.items():
        store(name=f"{name}_schema", node=schema)
    for family, model in MODELS.items():
        store(group="model", name=f"schema_{family}", node=model)
    for group, node in {**GROUPS, "target": Target}.items():
        store(group=group, name="schema", node=node)
