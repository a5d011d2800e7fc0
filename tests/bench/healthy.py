"""Does anything cry wolf? `make bench-healthy`: 100,000 steps of a healthy run, everything that watches switched on.

Watched are hangs, flipped bits in weights and moments (`recovery.guard`), losses that cannot be right
(`recovery.spike=8`), slow ranks, and one gradient in a hundred is computed again (`recovery.audit=0.01`). Counted is
what was said: faults, ranks named as slow, warnings, rollbacks, starts after the first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.bench import report
from train import events

ALARMS = ("fault", "slow", "warning", "rollback", "regroup")
KEYS = ["model=llama_micro", "model.layers=1", "model.width=32", "model.heads=2", "model.kv_heads=1", "model.ffn=64"]
KEYS += ["model.context=16", "data=synthetic", "data.synthetic_tokens=400_000", "data.tokenizer.vocab=300"]
KEYS += ["batch.sequences=2", "batch.virtual_ranks=2", "devices=2", "accelerator=cpu", "precision=fp32", "logger=[]"]
KEYS += ["eval.every=20000", "eval.tokens=2000", "checkpoint.every=5000", "recovery.spike=8", "recovery.audit=0.01"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys = [*KEYS, f"steps={options.steps}", f"runs={folder}", "name=healthy"]
        subprocess.run([sys.executable, "-m", "train", *keys], check=True, stdout=subprocess.DEVNULL)
        found = list(events.read(Path(folder) / "healthy" / "events.jsonl"))
    counts = Counter(record["kind"] for record in found)
    alarms = {kind: counts[kind] for kind in ALARMS} | {"starts": counts["start"] - 1}
    said = [record for record in found if record["kind"] in ALARMS]
    steps, seconds = counts["step"], found[-1]["time"] - found[0]["time"]
    print(f"{steps:,} steps in {seconds / 60:.0f} min: " + ", ".join(f"{n} {kind}" for kind, n in alarms.items()))
    report.write("healthy", "make bench-healthy", steps=steps, seconds=seconds, alarms=alarms, said=said[:20])
    return int(any(alarms.values()))


if __name__ == "__main__":
    sys.exit(main())
