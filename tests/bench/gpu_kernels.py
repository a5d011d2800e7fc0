"""What deterministic kernels cost on a GPU, one by one: a part of `make gpu-check`.

Each operation of a step that has more than one kernel, forward and backward as the models call it, with torch's choice
and with `torch.use_deterministic_algorithms`, in turns. A line of JSON each: milliseconds of both, whether the
deterministic one gives equal bits three times, and whether the other happened to. cuBLAS has its fixed workspace
(`CUBLAS_WORKSPACE_CONFIG`, read once a process) in both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from train.models.experts import Experts
from train.models.layers import LayerNorm, Linear, RMSNorm, causal_attention, summed_loss

Step = Callable[[], list[Tensor]]


class Sizes(NamedTuple):
    """Of a micro-batch: sequences, positions, heads of E, width H·E, vocabulary."""

    B: int
    T: int
    H: int
    E: int
    V: int
    seconds: float  # that each reading takes at least

    @property
    def D(self) -> int:
        return self.H * self.E


LARGE = Sizes(B=16, T=1024, H=12, E=64, V=50304, seconds=0.2)  # llama_124m's, as gpu_check trains it
TINY = Sizes(B=2, T=16, H=2, E=8, V=64, seconds=0.001)


def operations(sizes: Sizes, device: torch.device) -> dict[str, Step]:
    """A forward and a backward pass of each, which returns the gradients."""
    B, T, H, E, V, D = *sizes[:5], sizes.D

    def half(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device, requires_grad=True)

    tokens = torch.randint(V, (B, T), device=device)
    table = torch.randn(V, D, device=device, requires_grad=True)
    x, logits, q, k, v = half(B, T, D), half(B * T, V), half(B, H, T, E), half(B, H, T, E), half(B, H, T, E)
    documents = (tokens == 0).cumsum(1)
    modules = [LayerNorm(D, 1e-5), RMSNorm(D, 1e-5), Linear(D, 4 * D, bias=True), Experts(D, 2 * D, 8, 2)]
    norm, rms, linear, experts = (module.to(device) for module in modules)
    with torch.no_grad():
        for module in (norm, rms, linear, experts):
            for parameter in module.parameters():
                parameter.normal_(0, 0.02)

    def passes(run: Callable[[], Tensor], *inputs: Tensor) -> Step:
        def step() -> list[Tensor]:
            with torch.autocast(device.type, torch.bfloat16):
                y = run()
            return list(torch.autograd.grad(y.float().sum(), inputs))

        return step

    def of(module: nn.Module, run: Callable[[], Tensor]) -> Step:
        return passes(run, x, *module.parameters())

    return {
        "embedding": passes(lambda: F.embedding(tokens, table), table),
        "attention": passes(lambda: causal_attention(q, k, v).square(), q, k, v),
        "attention within documents": passes(lambda: causal_attention(q, k, v, documents).square(), q, k, v),
        "LayerNorm": of(norm, lambda: norm(x).square()),
        "RMSNorm": of(rms, lambda: rms(x).square()),
        "matrix product with bias": of(linear, lambda: linear(x).square()),
        "experts": of(experts, lambda: experts(x)[0].square()),
        "cross-entropy": passes(lambda: summed_loss(logits, tokens.flatten()), logits),
    }


def priced(name: str, step: Step, seconds: float) -> dict[str, Any]:
    """An operation in both ways, twice by turns; an error of one, a kernel that does not exist say, is a finding."""
    times: dict[bool, list[float]] = {False: [], True: []}
    repeats: dict[bool, bool] = {}
    try:
        for deterministic in (False, True) * 2:
            torch.use_deterministic_algorithms(deterministic)
            first, *others = (step() for _ in range(3))
            equal = [torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)]
            repeats[deterministic] = repeats.get(deterministic, True) and all(equal)
            timer = Timer("step()", globals={"step": step})  # it waits for the device
            times[deterministic].append(timer.blocked_autorange(min_run_time=seconds).median * 1000)
    except RuntimeError as error:
        return {"check": f"deterministic kernels, {name}", "holds": False, "error": str(error).splitlines()[0]}
    finally:
        torch.use_deterministic_algorithms(False)
    free, fixed = (statistics.median(times[deterministic]) for deterministic in (False, True))
    found = {"ms": free, "deterministic_ms": fixed, "price": fixed / free, "repeats_anyway": repeats[False]}
    return {"check": f"deterministic kernels, {name}", "holds": repeats[True], **found}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu_kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--cpu", action="store_true", help="tiny operations on a CPU: a test of this script, no finding"
    )
    cpu = parser.parse_args(arguments).cpu
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # as a run has it
    torch.manual_seed(0)
    sizes, device = (TINY, torch.device("cpu")) if cpu else (LARGE, torch.device("cuda"))
    for name, step in operations(sizes, device).items():
        print(json.dumps(priced(name, step, sizes.seconds)), flush=True)


if __name__ == "__main__":
    main()
