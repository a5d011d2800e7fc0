"""The numerics fingerprint: what the bits of a result depend on besides configuration and data.

Two runs with equal fingerprints, configurations and data give equal bits; with unequal ones nothing is promised.
A checkpoint carries it, so that resuming elsewhere can say that bitwise equality ends there.
"""

from __future__ import annotations

import platform

import torch

from train.config import Train


def fingerprint(config: Train, device: torch.device) -> dict[str, str | int]:
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda) if on_gpu else "",
        "threads_per_rank": torch.get_num_threads() if not on_gpu else 0,
        "precision": config.precision,
        "compile": str(config.compile),
        "reduce": config.reduce.mode.name,
        "virtual_ranks": config.batch.virtual_ranks,
        "micro_batches": config.batch.micro_batches,
        "micro_batch": int(config.batch.micro_batch),
        "context": config.model.context,
    }
