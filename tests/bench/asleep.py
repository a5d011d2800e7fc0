"""An emulated device: in a process that has imported this, a micro-batch lasts `MICRO_BATCH_S` seconds (environment).

It is computed as ever, and the rest of the time the rank sleeps: so steps can be as long as they are on large machines,
while the processor is free. Warming up and the handshake compute a micro-batch as well, and last as long. To be named
to the forkserver before `train.run`: then ranks, replacements too, are forked from a process that has imported it.
"""

from __future__ import annotations

import os
import time

from train import loop
from train.flat import Buffer

SECONDS = float(os.environ["MICRO_BATCH_S"])
compute = loop.micro_batch


def micro_batch(v: int, i: int, buffer: Buffer, state: loop.TrainState, parts: loop.Parts) -> None:
    ends = time.perf_counter() + SECONDS
    compute(v, i, buffer, state, parts)
    time.sleep(max(0.0, ends - time.perf_counter()))


loop.micro_batch = micro_batch
