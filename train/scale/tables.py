"""Published runs, a CSV row each: from text to a job, or to the reason why not. What is missing is not guessed.

A row may leave open, because one answer is the rule: the micro-batch (1; torchtitan cuts a rank's batch into as many as
its pipeline has stages), the pieces of an interleaved stage (one layer each by NeMo's and Llama 3's schedules, else one
piece), recomputation (none), whose kernels (PyTorch's), a degree of parallelism (1). Each is named in the row's
`assumed`. Data parallelism is what is left of the GPUs. A node's network is what `notes` say: `800 Gb/s inter-node`.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from train.checks import Refused
from train.scale.hardware import named
from train.scale.workload import FIELDS, TABLES, Recompute, Shape, Sharding, Stack, job, known

COLUMNS = {"width": "hidden", "context": "seq", "chosen": "topk"}  # by our names, where they are not the table's
NEEDED = ("layers", "hidden", "heads", "seq", "vocab", "ffn", "global_batch_seqs", "gpus")
# As they are written: mxfp8, FP8-CS, amp_bf16, te-fp8, bfloat16, bf16 mixed, … What is narrower or wider has no model.
PRECISIONS = {r"(mx|te)?fp8|float8|e4m3": 1, r"bf16|bfloat16|fp16|float16|half": 0}
NODE_NETWORK = re.compile(r"(\d+) ?Gb(?:ps|/s) (?:inter-node|node-node)")  # bits/s of all of a node's cards


@dataclass(slots=True)
class Run:
    """A row: the job that it describes, or why it is none; what was measured, if it says."""

    row: Mapping[str, str]
    source: str
    job: dict[str, float] | None = None
    why_not: str = ""
    assumed: list[str] = field(default_factory=list)
    measured: float = math.nan  # seconds a step

    @property
    def usable(self) -> bool:
        """Compared with: it is measured, and somebody has found it (not quoted from memory)."""
        return self.job is not None and self.measured > 0 and self.row.get("evidence", "").strip() != "memory"


def source(text: str) -> str:
    """Who measured: without the paper's number and the release of the software."""
    return re.sub(r"\s*\(.*?\)|(?<=summary) \d.*", "", text).strip() or "unnamed"


def published(without: tuple[str, ...] = ()) -> list[Run]:
    """The runs of the tables that travel with the projector, but for some sources."""
    tables = [rows(path) for path in sorted(TABLES.glob("*.csv"))]
    found = [row for header, some in tables if {"gpu_type", "step_time_s"} <= set(header) for row in some]
    return [parse(row) for row in found if source(row["source"]) not in without]


def rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The header and the rows of a CSV file; cells that a row lacks are empty. Raises Refused."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Refused("table", f"'{path}' cannot be read as CSV: {error}") from error
    if not lines or not any(cell.strip() for cell in lines[0]):
        raise Refused("table", f"'{path}' has no header: the first line names the columns")
    header = lines[0]
    return header, [dict(zip(header, [*line, *[""] * len(header)], strict=False)) for line in lines[1:] if line]


def parse(row: Mapping[str, str]) -> Run:
    run = Run(row, source(row.get("source") or ""))
    try:
        _describe(run)
    except _NotThis as reason:
        run.job, run.why_not = None, str(reason)
    return run


class _NotThis(Exception):
    pass


def number(row: Mapping[str, str], key: str) -> float | None:
    """A figure above 0, or None where the cell is empty. Anything else is not predicted."""
    text = (row.get(key) or "").strip()
    if not text:
        return None
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        raise _NotThis(f"{key}: '{text[:40]}' is no number") from None
    if not 0 <= value < 1e18:
        raise _NotThis(f"{key}: {text[:40]} is out of range")
    return value


def whole(row: Mapping[str, str], key: str, default: int) -> int:
    value = number(row, key)
    if value is not None and (value != int(value) or value < 1):
        raise _NotThis(f"{key}: {value:g} is no count")
    return default if value is None else int(value)


def _describe(run: Run) -> None:
    row, missing = _filled(run)
    if missing:
        nobody = " and no model of this name is known" if {"layers", "hidden"} & set(missing) else ""
        raise _NotThis(f"the row does not say {', '.join(missing)}{nobody}")
    gpu = named(row.get("gpu_type") or "")
    if gpu is None:
        raise _NotThis(f"gpu_type: '{row.get('gpu_type', '')}' is not in configs/hardware")
    others = ("kv_heads", "gated", "head", "biased")
    sizes = {key: whole(row, COLUMNS.get(key, key), 1) for key in FIELDS if key not in others}
    sizes |= {"kv_heads": whole(row, "kv_heads", sizes["heads"]), "head": int(number(row, "head") or 0)}
    shape = Shape(**sizes, gated=bool(number(row, "gated")), biased=bool(number(row, "biased")))
    if (shape.width % shape.heads and not sizes["head"]) or shape.chosen > shape.experts:
        raise _NotThis("hidden and heads, or topk and experts, do not fit each other")
    precision = (row.get("precision") or "").strip().lower()
    narrow = next((is8 for words, is8 in PRECISIONS.items() if re.search(rf"(?<![a-z0-9])({words})", precision)), None)
    if not precision:
        narrow = 0
        run.assumed.append("precision bf16")
    if narrow is None or re.search("fp4|int", precision):
        raise _NotThis(f"precision: '{precision}' is none of bf16, fp16, fp8")
    plan: dict[str, float] = {"fp8": narrow, "rowwise": "row" in precision}
    plan["bf16"] = not re.search(r"(?<!b)(fp|float)16|half|fp8", precision)
    if plan["fp8"] and not gpu.fp8:
        raise _NotThis(f"precision: {gpu.name} has no fp8")
    plan |= _software(row)
    plan |= {key.lower(): whole(row, key, 1) for key in ("TP", "PP", "CP", "EP")}
    count, batch = whole(row, "gpus", 1), whole(row, "global_batch_seqs", 1)
    split = plan["tp"] * plan["pp"] * plan["cp"]
    if count % split:
        raise _NotThis(f"{count} GPUs are no multiple of TP x PP x CP = {split:g}")
    replicas = count / split
    if plan["ep"] > max(1, replicas * plan["cp"] * plan["tp"]) or (
        shape.experts % plan["ep"] and (shape.experts < 3 or (shape.experts - 1) % plan["ep"])  # one may be shared
    ):
        raise _NotThis(f"EP = {plan['ep']:g} does not fit {shape.experts} experts on {count} GPUs")
    if plan["pp"] > shape.layers + 2:
        raise _NotThis(f"PP = {plan['pp']:g} is more than {shape.layers} layers")
    if batch % replicas:
        raise _NotThis(f"global_batch_seqs: {batch} is no multiple of {replicas:g} replicas")
    # pytorch/torchtitan, torchtitan/parallelisms/pipelining_utils.py @9dec370
    staged = plan["pp"] > 1 and "torchtitan" in (row.get("framework") or "").lower()
    size = max(1, int(batch / replicas / plan["pp"])) if staged else 1
    plan["micro_batch"] = min(whole(row, "microbatch", size), batch / replicas)
    if found := NODE_NETWORK.search(row.get("notes") or ""):
        plan["nic"] = float(found[1]) * 1e9 / 8 / min(8, gpu.domain)
    usual = {"TP": "1", "PP": "1", "microbatch": str(size), "recompute": "none", "framework": "PyTorch"}
    run.assumed += [f"{key} {value}" for key, value in usual.items() if not (row.get(key) or "").strip()]
    if plan["pp"] > 1:
        plan["chunks"] = whole(row, "VP", _chunks(run, shape.layers, int(plan["pp"]), int(plan["stack"])))
    run.job = job(shape, gpu, gpus=count, batch=batch, **plan)  # type: ignore[arg-type]
    run.measured = _measured(run, shape, batch, count)


def _filled(run: Run) -> tuple[dict[str, str], list[str]]:
    """The row with what it leaves open of a known model's shape, and what it still does not say."""
    row, model = dict(run.row), known(run.row.get("model") or "")
    if model is not None:
        own = {k: number(row, COLUMNS.get(k, k)) for k in ("width", "heads")}
        alike = all(value in (None, getattr(model[0], key)) for key, value in own.items())
        empty = [key for key in FIELDS if not (row.get(COLUMNS.get(key, key)) or "").strip()] if alike else []
        row |= {COLUMNS.get(key, key): str(int(getattr(model[0], key))) for key in empty}
        if told := [COLUMNS.get(k, k) for k in empty if k != "head" and getattr(model[0], k) > 1]:
            run.assumed.append(f"{', '.join(told)} of {model[1]['name']}")
        if model[1]["unknown"] and empty:
            run.assumed.append(model[1]["unknown"])
    return row, [key for key in NEEDED if not number(row, key)]


def _software(row: Mapping[str, str]) -> dict[str, float]:
    """Whose kernels, what is sharded, what is computed again: from `framework`, `recompute` and `notes`."""
    keys = ("framework", "notes", "recompute", "evidence", "precision")
    framework, notes, recompute, evidence, precision = ((row.get(key) or "").lower() for key in keys)
    pytorch = "fsdp" in framework or "torchtitan" in framework
    compiled = re.search("llama3|maxtext", framework) or "trainy" in evidence or "compile" in notes
    compiled = compiled or ("torchtitan" in framework and "fp8" in precision)  # whose casts need a compiler
    stack = Stack.COMPILED if compiled else Stack.EAGER
    if re.search("megatron|nemo|bridge", framework):
        stack = Stack.ENGINE if re.search("nemo|bridge|megatron-core", framework) else Stack.MEGATRON
    if "eager" in notes:
        stack = Stack.EAGER
    zero = "deepspeed" in framework and "bf16" in precision  # its bf16 optimizer is always cut
    sharding = Sharding.NOTHING if stack == Stack.MEGATRON and not zero else Sharding.OPTIMIZER
    if "llama3" in framework:
        sharding = Sharding.GRADIENTS  # and weights stay gathered, arXiv 2407.21783, section 3.3.2
    if pytorch or re.search(r"fsdp=[1-9]", notes):
        sharding = Sharding.GRADIENTS if "grad_op" in framework else Sharding.WEIGHTS
    return {
        "stack": stack,
        "sharding": sharding,
        "recompute": {"f": Recompute.FULL, "s": Recompute.SELECTIVE}.get(recompute[:1], Recompute.NOTHING),
        "deepspeed": "deepspeed" in framework,
        "first_flash": "foundry" in framework,
        "fused_loss": "foundry" in framework or "compiled loss" in notes,
        "async_tp": "async" in notes,
        "parallel_norms": stack != Stack.MEGATRON or "sp" in recompute.split("+"),
    }


def _chunks(run: Run, layers: int, stages: int, stack: int) -> int:
    interleaved = "interleaved" in (run.row.get("notes") or "").lower()
    framework = (run.row.get("framework") or "").lower()
    # Megatron-Bridge's tables say "n/a" of a pipeline in one piece
    engine = "llama3" in framework or (stack == Stack.ENGINE and "bridge" not in framework)
    chunks = round((layers + (2 if layers % stages else 0)) / stages) if engine else 2 if interleaved else 1
    if not number(run.row, "VP"):
        run.assumed.append(f"VP {chunks}")
    return max(1, chunks)


def _measured(run: Run, shape: Shape, batch: int, count: int) -> float:
    """Seconds a step as published, or from tokens/s, or from TFLOP/s by the convention of who published them."""
    row, tokens = run.row, batch * shape.context
    try:
        seconds, rate, tflops = (number(row, k) for k in ("step_time_s", "tokens_per_s", "achieved_tflops_per_gpu"))
    except _NotThis:
        return math.nan
    if seconds or rate or not tflops:
        return seconds or (tokens / rate if rate else math.nan)
    d, layers, vocab = shape.width, shape.layers, shape.vocab
    if "recompute" in (row.get("notes") or ""):  # hardware FLOPs, arXiv 2104.04473, equation 3
        work = 96 * tokens * layers * d**2 * (1 + shape.context / 6 / d + vocab / 16 / layers / d)
    else:
        work = (6 * (shape.parameters - vocab * d) + 12 * layers * d * shape.context) * tokens
    return work / (tflops * 1e12 * count)
