"""The configuration of a training run: every key that a user can set, its type, its default and its checks.

YAML under `configs/` holds values, in groups; the dataclasses below are the schema above them. A command's
configuration is composed once, in the process that the user started, before torch is imported: a bad key is
refused in a fraction of a second, by name. Ranks are handed the resolved one, which the run folder keeps as
`config.yaml`; nothing changes it any more.

Bad values are refused where they are born: each dataclass checks itself, and raises `Refused`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from train.checks import at_least, choice, no_secret, place, require, seconds, utf8

_HERE = Path(__file__).parent
CONFIGS = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"  # in a wheel; in a checkout


# --------------------------------------------------------------------------------------------------- model


@dataclass(slots=True, kw_only=True)
class Model:
    """What every model family has: the families are in shapes.py."""

    family: str = MISSING
    context: int = 256  # tokens a sequence
    dropout: float = 0.0
    z_loss: float = 0.0  # weight of the squared log of the softmax's partition function, such as 1e-4; 0: off
    loss_chunk: int = 0  # tokens whose logits stand in memory at a time, computed twice; 0: of all tokens, once
    vocab: int = 0  # token ids that it knows; 0: those of the tokenizer
    checkpoint_activations: str = "none"  # computed again in the backward pass: selective (attention's scores), full
    path: str = ""  # model=hf: the folder, laid out as transformers does, or OWNER/NAME[@REVISION] on the Hub

    def __post_init__(self) -> None:
        at_least(self, "model.", context=2, vocab=0, z_loss=0, loss_chunk=0)
        choice(self.checkpoint_activations, "model.checkpoint_activations", ("none", "selective", "full"))
        require(0 <= self.dropout < 1, "model.dropout", f"{self.dropout} is not in [0, 1)")


# ---------------------------------------------------------------------------------------------------- data


class SourceKind(Enum):
    stdlib = "stdlib"  # the Python standard library's own sources on this machine
    text = "text"  # files and folders: text, .jsonl, .gz, .zst
    hf = "hf"  # a Hugging Face dataset
    bin = "bin"  # nanoGPT's .bin token files, read as they are
    synthetic = "synthetic"  # random tokens from the seed, for benchmarks
    mix = "mix"  # several of these, by weight


class TokenizerKind(Enum):
    bytes = "bytes"
    bpe = "bpe"  # byte-level BPE, trained on a sample of the corpus
    file = "file"  # any tokenizer.json
    none = "none"  # bin and synthetic: ids below `vocab` that stand for no text


@dataclass(slots=True, kw_only=True)
class Tokenizer:
    kind: TokenizerKind = TokenizerKind.bpe
    vocab: int = 2048
    path: str = ""

    def __post_init__(self) -> None:
        if self.kind is TokenizerKind.bpe:
            require(257 <= self.vocab <= 65_536, "data.tokenizer.vocab", f"{self.vocab} is not in 257 … 65,536")
        if self.kind is TokenizerKind.none:
            require(2 <= self.vocab <= 2**31, "data.tokenizer.vocab", f"{self.vocab} is not in 2 … 2^31")
        if self.kind is TokenizerKind.file:
            require(bool(self.path), "data.tokenizer.path", "name the tokenizer.json that kind=file should load")


@dataclass(slots=True, kw_only=True)
class Source:
    """Where documents come from. `path` is a file, a folder or a list of them; the rest is for `hf`."""

    kind: SourceKind = MISSING
    path: Any = None  # str or list of str
    name: str = ""  # hf: "HuggingFaceFW/fineweb-edu", or a local folder laid out like one
    revision: str = "main"  # hf: pinned to its commit before anything is read
    files: str = ""  # hf: a pattern of the files to take, such as "sample/10BT/*.parquet"
    field: str = "text"  # the column or JSON key that holds a document's text
    prompt_field: str = ""  # the one that holds what comes before it: read, and in no loss; empty: nothing does
    limit: int = 0  # hf: at most so many files; 0 takes them all
    weight: float = 1.0  # share in a mix

    def paths(self) -> list[str]:
        several = isinstance(self.path, list | tuple)
        return [] if self.path is None else list(map(str, self.path if several else [self.path]))

    def __post_init__(self) -> None:
        if self.kind in (SourceKind.text, SourceKind.bin):
            require(bool(self.paths()), "data.path", f"data={self.kind.value} needs data.path=FILE_OR_FOLDER")
            for path in self.paths():
                require(place(path, "data.path").exists(), "data.path", f"no such file or folder: {path}")
        if self.kind is SourceKind.hf:
            require(bool(self.name), "data.name", "data=hf needs data.name=OWNER/DATASET (or a local folder)")
        fields = not self.prompt_field or self.kind in (SourceKind.text, SourceKind.hf)
        require(fields, "data.prompt_field", f"data={self.kind.value} has no fields: for text (.jsonl) and hf only")
        require(self.weight > 0, "data.weight", f"{self.weight} is no weight: use a number above 0")


@dataclass(slots=True, kw_only=True)
class Data(Source):
    """The corpus of a run: one source, or a mix of `parts` by weight, and how it becomes tokens."""

    parts: dict[str, Source] = field(default_factory=dict)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    validation: float = 0.05  # share of documents: one in 20, by sha256 of their content
    shard_tokens: int = 100_000_000  # a store is written in shards of at most so many tokens
    synthetic_tokens: int = 4_000_000
    mask_documents: bool = False  # documents in one window do not attend to each other
    cache: str = ""  # where prepared tokens are kept; empty: $XDG_CACHE_HOME/pocket-colossus

    def __post_init__(self) -> None:
        why = "a corpus has either one kind or several parts: use data=mix with data.parts, or another data=…"
        require(bool(self.parts) == (self.kind is SourceKind.mix), "data.parts", why)
        mixed = [name for name, part in self.parts.items() if part.kind is SourceKind.mix]
        require(not mixed, "data.parts", f"'{', '.join(mixed)}' is itself a mix: give each part a kind of its own")
        Source.__post_init__(self)
        require(0 < self.validation <= 0.5, "data.validation", f"{self.validation} is no share above 0 and up to 0.5")
        at_least(self, "data.", shard_tokens=1024, synthetic_tokens=1024)
        place(self.cache, "data.cache")


# ------------------------------------------------------------------------------------------------ training


@dataclass(slots=True, kw_only=True)
class Batch:
    """The batch law's constants: V virtual ranks, each running k micro-batches of `micro_batch` sequences."""

    sequences: int = 64  # the whole global batch
    virtual_ranks: int = 8
    micro_batch: int | str = "auto"  # sequences per forward
    weights: Any = "even"  # how fast each rank is, such as [3,1]; auto: measured at the start and while it runs

    def __post_init__(self) -> None:
        if isinstance(self.weights, str):
            known = self.weights in ("even", "auto")
            require(known, "batch.weights", f"'{self.weights}' is neither even, auto nor a list of numbers")
        else:
            numbers = all(isinstance(w, int | float) and w > 0 for w in self.weights)
            require(numbers, "batch.weights", f"{list(self.weights)} are no weights: use numbers above 0")
        at_least(self, "batch.", virtual_ranks=1, sequences=1)
        share, rest = divmod(self.sequences, self.virtual_ranks)
        why = f"{self.sequences} do not divide among {self.virtual_ranks} virtual ranks (batch.virtual_ranks)"
        require(rest == 0, "batch.sequences", f"{why}: use a multiple of {self.virtual_ranks}")
        if isinstance(self.micro_batch, int):
            why = f"{self.micro_batch} does not divide the {share} sequences of a virtual rank"
            require(self.micro_batch >= 1 and share % self.micro_batch == 0, "batch.micro_batch", why)
        else:
            require(self.micro_batch == "auto", "batch.micro_batch", f"'{self.micro_batch}' is neither auto nor N")

    @property
    def micro_batches(self) -> int:
        """k: micro-batches a virtual rank runs in a step (after `micro_batch` has been resolved)."""
        assert isinstance(self.micro_batch, int)
        return self.sequences // self.virtual_ranks // self.micro_batch


class OptimizerKind(Enum):
    adamw = "adamw"
    muon = "muon"  # the matrices inside layers; AdamW for the rest


@dataclass(slots=True, kw_only=True)
class Optimizer:
    kind: OptimizerKind = MISSING
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    muon_lr: float = 0.02  # muon: of the matrices inside layers, on the schedule of lr, which is AdamW's
    momentum: float = 0.95  # muon: Nesterov's
    clip_norm: float = 1.0  # of the whole gradient; 0 switches clipping off

    def __post_init__(self) -> None:
        for key in ("lr", "muon_lr"):
            rate = getattr(self, key)
            require(rate > 0, f"optimizer.{key}", f"{rate} is no learning rate: use a number above 0")
        for key in ("beta1", "beta2", "momentum"):
            require(0 <= (beta := getattr(self, key)) < 1, f"optimizer.{key}", f"{beta} is not in [0, 1)")
        require(self.eps > 0, "optimizer.eps", f"{self.eps} must be above 0")
        at_least(self, "optimizer.", weight_decay=0, clip_norm=0)


class ScheduleKind(Enum):
    cosine = "cosine"
    wsd = "wsd"  # warmup, stable, decay
    constant = "constant"


@dataclass(slots=True, kw_only=True)
class Schedule:
    kind: ScheduleKind = MISSING
    warmup_steps: int = 50
    decay: float = 0.3  # wsd: the share of all steps that the decay takes
    floor: float = 0.0  # where the decay ends, as a share of optimizer.lr

    def __post_init__(self) -> None:
        at_least(self, "schedule.", warmup_steps=0)
        require(0 <= self.decay <= 1, "schedule.decay", f"{self.decay} is not a share between 0 and 1")
        require(0 <= self.floor <= 1, "schedule.floor", f"{self.floor} is not a share between 0 and 1")


class ReduceMode(Enum):
    exact = "exact"  # the canonical tree: bitwise equal for any world size
    fast = "fast"  # the backend's own all-reduce


@dataclass(slots=True, kw_only=True)
class Reduce:
    mode: ReduceMode = MISSING
    dtype: str = "fp32"  # bf16: every node of the tree is rounded, and half the bytes travel
    bucket_mib: float = 8.0  # of the gradient on its way at a time
    hosts_first: bool = True  # nodes of several ranks: added up inside each, so that it leaves each once (exact only)

    def __post_init__(self) -> None:
        choice(self.dtype, "reduce.dtype", ("fp32", "bf16"))
        require(self.bucket_mib > 0, "reduce.bucket_mib", "must be above 0")


class Sharding(Enum):
    none = "none"  # every rank holds all of the state
    optimizer = "optimizer"  # each rank updates its part of the parameters, and holds the moments of that part only
    full = "full"  # and of the parameters too: a layer is gathered when it is computed


@dataclass(slots=True, kw_only=True)
class Evidence:
    """Checksums in the run's record, by which `colossus diff` and `replay` find where two runs part."""

    digests: bool = True  # of each step's tokens, gradients and parameters, a virtual rank at a time
    parameters: bool = False  # of each parameter too


@dataclass(slots=True, kw_only=True)
class Eval:
    every: int = 100  # steps; 0: at the end only
    tokens: int = 65_536  # of the validation set, on the way; at the end it is used whole
    micro_batch: int = 8
    sample: int = 60  # tokens that the model writes each time, for the report to show; 0: none, at the end neither

    def __post_init__(self) -> None:
        at_least(self, "eval.", every=0, tokens=1, micro_batch=1, sample=0)


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    every: int = 200  # steps; 0: at the end only
    keep: int = 2  # the last so many
    keep_every: int = 0  # also each whose step is a multiple of this; 0: off
    keep_best: bool = False  # also the one with the lowest validation loss, of those evaluated at their step
    store: str = ""  # a URL that checkpoints are copied to: s3://bucket/run, gs://…, file://…; empty: nowhere

    def __post_init__(self) -> None:
        at_least(self, "checkpoint.", every=0, keep=1, keep_every=0)
        no_secret(self.store, "checkpoint.store")


class ResumeMode(Enum):
    auto = "auto"  # continue where the run folder has something to continue from
    never = "never"  # a run folder that holds a run is refused
    required = "required"  # a run folder that holds no checkpoint is refused


@dataclass(slots=True, kw_only=True)
class Resume:
    mode: ResumeMode = MISSING
    allow: Any = None  # keys that may differ from the run's own, such as steps or [steps,optimizer.lr]

    def allowed(self) -> list[str]:
        return list(map(str, self.allow if isinstance(self.allow, list) else [self.allow] if self.allow else []))


@dataclass(slots=True, kw_only=True)
class Log:
    every: int = 10  # steps between lines on the console and in the loggers

    def __post_init__(self) -> None:
        at_least(self, "log.", every=1)


@dataclass(slots=True, kw_only=True)
class Faults:
    """Faults on order, drawn once from these keys: see train/faults/plan.py, which checks them."""

    at: list[str] = field(default_factory=list)  # just these: KIND:RANK[+RANK…]@PHASE:STEP[:AMOUNT[:STEPS]]
    count: int = 0  # so many more, spread evenly over steps, ranks, kinds and phases
    kinds: list[str] = field(default_factory=list)  # of those
    phases: list[str] = field(default_factory=list)  # in which drawn faults strike
    table: dict[str, Any] = field(default_factory=dict)  # more of them, at random, at the rates of a published table
    gpus: int = 0  # table: the machine whose faults are drawn
    days: float = 0.0  # table: of that machine's life, compressed into the run
    node: int = 2  # ranks that a fault of a whole node takes at once, though never all
    seed: int = 0


ACCELERATORS = ("auto", "cpu", "cuda")


@dataclass(slots=True, kw_only=True)
class Recovery:
    in_place: bool = True  # when a rank is lost the others go on, and it is replaced; false: all start again
    spike: float = 0.0  # times the spread of the last losses above them, from where on one is gone back from; 0: off
    audit: float = 0.0  # the share of virtual ranks' gradients that another rank computes again, and compares
    guard: bool = True  # each rank on a CPU checks that no bit of its state changes between steps
    spares: int = 0  # processes that stand by, warm, each to take a lost rank's place at once; on each node
    restarts: int = 3  # of all ranks, from the last checkpoint, with no new step in between, before the run fails

    def __post_init__(self) -> None:
        at_least(self, "recovery.", spike=0, spares=0, restarts=0)
        require(0 <= self.audit <= 1, "recovery.audit", f"{self.audit} is not a share between 0 and 1")


@dataclass(slots=True, kw_only=True)
class Train:
    """A training run. `name` is its folder under `runs/`; the same name continues the run."""

    name: str = MISSING
    seed: int = 0
    steps: int = 200  # in all, not from here
    devices: int | str = "auto"  # ranks on this node; auto: one a GPU, or one a CPU core, up to 8
    nodes: int | str = 1  # the command runs once on each, as PET_*, SLURM_* or SKYPILOT_* say; 1-4: they may vary
    accelerator: str = "auto"  # auto: cuda where there is a GPU
    backend: str = "auto"  # auto: nccl on GPUs; gloo lets several ranks share a GPU, over the host's memory
    precision: str = "auto"  # auto: bf16 on GPUs and on CPUs with bf16 instructions
    compile: Any = "auto"  # auto: true on GPUs; graphs: CUDA graphs besides, where launches take longer than kernels
    profile: int = 0  # steps: rank 0 leaves a torch trace of them, and a table of where their time goes
    stop_after: str = ""  # wall time such as 50min, after which the run saves, stops and exits 75
    runs: str = "runs"  # the folder of run folders
    logger: list[str] = field(default_factory=lambda: ["tensorboard", "csv"])
    model: Model = MISSING
    data: Data = MISSING
    batch: Batch = field(default_factory=Batch)
    optimizer: Optimizer = MISSING
    schedule: Schedule = MISSING
    reduce: Reduce = MISSING
    sharding: Sharding = Sharding.none
    evidence: Evidence = field(default_factory=Evidence)
    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    recovery: Recovery = field(default_factory=Recovery)
    resume: Resume = MISSING
    faults: Faults = field(default_factory=Faults)
    log: Log = field(default_factory=Log)
    report: bool = True  # report.html in the run's folder at its end
    resume_from: str = ""  # a URL or folder of checkpoints; its newest is fetched where it is newer than what is here
    sample: str = ""  # a prompt to continue at evaluations and the end; empty: a document's beginning

    def __post_init__(self) -> None:
        folder = Path(self.name).name == self.name and self.name not in ("", ".", "..") and self.name.isprintable()
        folder = folder and len(self.name.encode()) <= 200  # of 255: what is made beside it has longer names
        require(folder, "name", f"{self.name!r} cannot be a folder's name under {self.runs}/")
        place(self.runs, "runs")
        require(self.runs.isprintable(), "runs", f"{self.runs!r} has characters that cannot be printed: use others")
        require(0 <= self.seed < 2**63, "seed", f"{self.seed} is not in 0 … 2^63-1")
        at_least(self, "", steps=1, profile=0)
        why = f"'{self.nodes}' is neither a number above 0 nor two of them, the least first, as in 1-4"
        formed = re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", str(self.nodes))
        require(formed is not None and self.least_nodes <= self.most_nodes, "nodes", why)
        choice(self.accelerator, "accelerator", ACCELERATORS)
        choice(self.backend, "backend", ("auto", "gloo", "nccl"))
        choice(self.precision, "precision", ("auto", "fp32", "bf16"))
        choice(self.compile, "compile", ("auto", True, False, "graphs"))
        for logger in self.logger:
            choice(logger, "logger", ("tensorboard", "csv", "wandb"))
        if isinstance(self.devices, int):
            at_least(self, "", devices=1)
            ranks = self.devices * self.least_nodes
            most, instead = self.batch.virtual_ranks, f"use at most that many ranks, or batch.virtual_ranks={ranks}"
            require(ranks <= most, "devices", f"{ranks} ranks are more than batch.virtual_ranks={most}: {instead}")
            given = ranks if isinstance(self.batch.weights, str) else len(self.batch.weights)
            require(given == ranks, "batch.weights", f"{given} weights for {ranks} ranks: give each rank one")
        else:
            require(self.devices == "auto", "devices", f"'{self.devices}' is neither auto nor a number")
        why = f"{self.sharding.name} needs reduce=exact, whose ranks each sum up a part of the gradient"
        require(self.sharding is Sharding.none or self.reduce.mode is ReduceMode.exact, "sharding", why)
        full = self.sharding is Sharding.full
        require(not (full and self.compiles), "compile", "does not go with sharding=full: use false")
        why = "sharding=full gives every rank as many virtual ranks as it can: use even"
        require(not full or self.batch.weights == "even", "batch.weights", why)
        seconds(self.stop_after)
        no_secret(self.resume_from, "resume_from")
        utf8(self.sample, "sample")
        require(not self.recovery.spike or self.most_nodes == 1, "recovery.spike", "goes back on one node only: use 0")
        auditable = self.evidence.digests and self.reduce.mode is ReduceMode.exact and not full
        why = "compares digests of virtual ranks: not with evidence.digests=false, reduce=fast or sharding=full"
        require(not self.recovery.audit or auditable, "recovery.audit", why)
        never = bool(self.resume_from) and self.resume.mode is ResumeMode.never
        require(not never, "resume_from", "contradicts resume=never: leave one of them out")

    @property
    def heals(self) -> bool:
        """Whether a rank that is lost can be replaced, and ranks be added, while the others go on."""
        return self.recovery.in_place and self.sharding is Sharding.none

    @property
    def compiles(self) -> bool:
        return self.compile in (True, "graphs")

    @property
    def least_nodes(self) -> int:
        return int(str(self.nodes).split("-")[0])

    @property
    def most_nodes(self) -> int:
        return int(str(self.nodes).split("-")[-1])

    @property
    def folder(self) -> Path:
        return Path(self.runs).expanduser() / self.name

    @property
    def tokens_per_step(self) -> int:
        return self.batch.sequences * self.model.context


GROUPS = {"data": Data, "optimizer": Optimizer, "schedule": Schedule, "reduce": Reduce, "resume": Resume}
GROUPS |= {"faults": Faults}
