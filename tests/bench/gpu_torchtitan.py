"""torchtitan's trainer beside us on a GPU, timed: `gpu_check` runs it in a process of its own, on drawn tokens.

Its arguments are keys of `colossus train`, from which shape, batch and numbers come. The last line says tokens/s, the
median of the steps after the first ones, and on a GPU the peak of what was allocated; or it is a string, which says
why torchtitan cannot be imported.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tests.bench.contestants import TITAN_WHEELS
from tests.bench.work import Job, Turns, composed

WARM = 10  # steps that are not timed: it compiles, and captures its graph
TIMED = 20


class Timed(Turns):
    """Ends the process when enough is known."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.ends = tokens, list[float]()

    def begin(self, parameters: int) -> None:
        self.parameters = parameters

    def ended(self, loss: torch.Tensor | float) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) <= WARM + TIMED:
            return
        seconds = statistics.median(np.diff(self.ends[WARM:]))
        found = {"tokens_per_s": self.tokens / seconds, "parameters": self.parameters, "final_loss": float(loss)}
        if torch.cuda.is_available():
            found["memory_bytes"] = torch.cuda.max_memory_allocated()
        print(json.dumps(found))
        sys.exit(0)


def main(overrides: list[str]) -> None:
    config = composed(tuple(overrides))
    if config.accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it takes what it sees
    try:
        from tests.bench.peer_torchtitan import torchtitan
    except ImportError as error:
        print(json.dumps(f"{error}: {TITAN_WHEELS}"))
        return
    vocab, context = config.data.tokenizer.vocab, config.model.context
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "train.bin"
        size = (WARM + TIMED + 1, config.batch.sequences, context + 1)
        np.random.default_rng(0).integers(0, vocab, size).astype(np.uint16).tofile(rows)
        job = Job(
            overrides=tuple(overrides),
            folder=folder,
            rows=str(rows),
            nanogpt="",
            vocab=vocab,
            threads=torch.get_num_threads(),
            rank=0,
            world=1,
            port=0,
            compiled=bool(config.compile),
        )
        torchtitan(job, Timed(config.tokens_per_step))


if __name__ == "__main__":
    main(sys.argv[1:])
