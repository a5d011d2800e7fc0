"""The table of the law: `make bench-exact`, or `python -m tests.bench.exactness [ROW …]`.

A row is a model, a precision, compiled or not; its cells are numbers of ranks and ways of sharding the state. Each cell
is a run of 30 steps of `colossus train`, odd tensor shapes and evaluation included, and a row has one `state_sha256`,
one list of losses and one of gradient norms, or it is broken. The last row has the backend's all-reduce in place of
the tree: it must be broken, or the table could not tell. Rows asked for by name are run alone, the others kept.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench import report
from train import cli, events
from train.folder import read_json

ODD = ["model=llama_micro", "model.layers=2", "model.width=42", "model.heads=3", "model.kv_heads=1", "model.ffn=57"]
DEEP = ["model=llama_micro", "model.layers=3", "model.width=40", "model.heads=2", "model.kv_heads=2", "model.ffn=99"]
GPT2 = ["model=gpt2_micro", "model.layers=2", "model.width=42", "model.heads=3", "model.dropout=0.1"]
GROK = ["model=grok_micro", "model.width=40", "model.heads=2", "model.kv_heads=1", "model.dropout=0.1"]
SHAPES = {
    "odd": [*ODD, "model.tied=true"],
    "deep": [*DEEP, "model.tied=false", "model.dropout=0.1"],
    "gpt2": GPT2,
    "grok": GROK,
}
BATCHES = {"V8": ["batch.sequences=16", "batch.virtual_ranks=8"], "V6": ["batch.sequences=12", "batch.virtual_ranks=6"]}
RANKS = {"V8": (1, 2, 3, 4, 5, 8), "V6": (1, 2, 4, 5, 6)}

ROWS: dict[str, tuple[list[str], tuple[int, ...], tuple[str, ...]]] = {  # name: overrides, ranks, ways of sharding
    f"{shape} {precision} {'compiled' if compiled else 'eager'} {batch}": (
        [*SHAPES[shape], f"precision={precision}", f"compile={str(compiled).lower()}", *BATCHES[batch]],
        (1, 2, 3, 8) if compiled else RANKS[batch],
        ("none", "optimizer") if compiled else ("none", "optimizer", "full"),
    )
    for shape, precision, compiled, batch in [
        *((shape, precision, False, "V8") for shape in SHAPES for precision in ("fp32", "bf16")),
        ("deep", "fp32", False, "V6"),
        ("odd", "fp32", True, "V8"),
        ("deep", "bf16", True, "V8"),
        ("gpt2", "bf16", True, "V8"),
        ("grok", "bf16", True, "V8"),
    ]
}
EVERY = ("none", "optimizer", "full")
BROKEN = "odd fp32 eager V8, all-reduce"
ROWS |= {
    "deep bf16 eager V8, bf16 on the wire": (
        [*ROWS["deep bf16 eager V8"][0], "reduce.dtype=bf16"],
        (1, 2, 3, 8),
        ("none", "full"),
    ),
    "odd fp32 eager V8, shares by speed": (
        [*ROWS["odd fp32 eager V8"][0], "batch.weights=auto"],
        (1, 2, 3),
        ("none", "optimizer"),
    ),
    "odd bf16 eager V8, Muon": ([*ROWS["odd bf16 eager V8"][0], "optimizer=muon"], (1, 2, 3, 5, 8), EVERY),
    "grok fp32 eager V8, Muon": ([*ROWS["grok fp32 eager V8"][0], "optimizer=muon"], (1, 3, 8), EVERY),
    BROKEN: ([*ROWS["odd fp32 eager V8"][0], "reduce=fast"], (1, 3, 8), ("none",)),
}


def cells(row: str) -> list[tuple[int, str]]:
    _, ranks, ways = ROWS[row]
    return [(world, way) for world in ranks for way in (ways if world > 1 else ways[:1])]


def run(row: str, world: int, way: str, workspace: Path) -> tuple[str, str, str]:
    """Train one cell; its state's digest, and digests of what was recorded of its losses and norms, and scores."""
    name = f"{row}-{world}-{way}".replace(" ", "-").replace(",", "")
    source = Path(__file__).parent.parent.parent / "train"
    overrides = [
        *ROWS[row][0],
        *("model.context=32", "batch.micro_batch=1", "steps=30", "accelerator=cpu", "schedule.warmup_steps=2"),
        *("data=text", f"data.path={source}", "data.tokenizer.vocab=300", f"data.cache={workspace}/cache"),
        *("eval.every=10", "eval.tokens=2000", "checkpoint.every=0", "logger=[]", "optimizer.lr=0.01"),
        *(f"runs={workspace}/runs", f"name={name}", f"devices={world}", f"sharding={way}"),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(["train", *overrides])
    if code != 0:
        raise SystemExit(f"{name} ended with {code}")
    folder = workspace / "runs" / name
    records = list(events.read(folder / "events.jsonl"))
    steps = [(r["loss_hex"], r["grad_norm"]) for r in records if r["kind"] == "step"]
    assert len(steps) == 30
    scores = [r["loss"] for r in records if r["kind"] == "eval"]
    summary = read_json(folder / "summary.json")
    assert summary is not None
    return summary["state_sha256"], json.dumps(steps), json.dumps(scores)


def main(arguments: list[str]) -> int:
    chosen = [row for row in ROWS if not arguments or any(argument in row for argument in arguments)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as workspace:
        for row in chosen:
            results = {(world, way): run(row, world, way, Path(workspace)) for world, way in cells(row)}
            equal = len(set(results.values())) == 1
            digests = {f"W={world} {way}": result[0] for (world, way), result in results.items()}
            rows.append({"row": row, "equal": equal, "as_it_should": equal == (row != BROKEN), "state_sha256": digests})
            shown = (
                next(iter(digests.values()))[:12] if equal else ", ".join(d[:8] for d in sorted(set(digests.values())))
            )
            print(f"{row:40} {len(results):3} runs  {'one state' if equal else 'DIFFERENT'}  {shown}", flush=True)
    kept = read_json(report.RESULTS / "exactness.json") if arguments else None  # the other rows stay as they were
    by_name = {row["row"]: row for row in [*(kept or {"rows": []})["rows"], *rows]}
    report.write("exactness", "make bench-exact", steps=30, rows=[by_name[row] for row in ROWS if row in by_name])
    return 0 if all(row["as_it_should"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
