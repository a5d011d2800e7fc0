"""A mixture of experts beside a dense model of the same active parameters, on CPU: `make bench-experts`.

The dense model is the same in everything but its feed-forward layers, which are one GELU-gated product as wide as the
experts that a token goes to together, without a router. A turn is a training step as a rank does it: micro-batches
forward and backward, then fused AdamW over all parameters, which are more with experts. Both live in one process with
one thread and take turns (A B A B); ratios are of neighbouring turns, in CPU seconds, which other work on the machine
stretches less than the clock.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.bench import report
from train import compose, flops, optim
from train.flat import Flat
from train.models.build import build
from train.models.experts import Routing
from train.models.grok import Block
from train.models.layers import Linear

TURNS = 7
CASES = {"grok_nano": 2, "grok_mini": 1}  # micro-batches of 8 sequences a step
VOCAB, SEQUENCES = 2048, 8


class Dense(nn.Module):
    """down(gelu(gate x) · up x), in the place of experts."""

    def __init__(self, width: int, ffn: int, experts: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = Linear(width, ffn), Linear(width, ffn), Linear(ffn, width)
        zero = torch.zeros(())
        self.routing = Routing(zero, zero, torch.zeros(experts, dtype=torch.int64), zero, zero)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x)), self.routing


def contestant(config: Any, micro_batches: int, dense: bool) -> tuple[Callable[[], float], int]:
    """What trains a step and returns its seconds; and how many parameters a token uses."""
    shape = config.model
    model = build(shape, VOCAB, seed=0, device=torch.device("cpu"))
    active = flops.active_parameters(shape, VOCAB)
    if dense:
        for block in model.modules():
            if isinstance(block, Block):
                block.experts = Dense(shape.width, shape.chosen * shape.ffn, shape.experts)  # type: ignore[assignment]
                for parameter in block.experts.parameters():
                    nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)
        active = sum(parameter.numel() for parameter in model.parameters())
    flat = Flat(model)
    optimizer = optim.build(config.optimizer, flat)
    buffer = flat.buffer()
    flat.attach(buffer)
    tokens = torch.randint(VOCAB, (micro_batches, SEQUENCES, shape.context + 1))

    def step() -> float:
        started = time.process_time()
        buffer.tensor.zero_()
        for part in tokens:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                loss = model(part[:, :-1], part[:, 1:]) / tokens[:, :, 1:].numel()
            loss.backward()
        flat.step(optimizer.step, buffer.tensor, torch.ones(()), 0)
        return time.process_time() - started

    return step, active


def measure(name: str, precision: str, turns: int) -> dict[str, Any]:
    config = compose.config("train", [f"model={name}", f"precision={precision}"])
    (experts, active), (dense, same) = (contestant(config, CASES[name], one) for one in (False, True))
    for step in (experts, dense):
        step()
    pairs = [(experts(), dense()) for _ in range(turns)]
    ratios = sorted(b / a for a, b in pairs)
    tokens = CASES[name] * SEQUENCES * config.model.context
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{name} {precision}: {middle:.3f} ({low:.3f} … {high:.3f}) of the dense model's tokens/s")
    return {
        "active_parameters": active,
        "dense_parameters": same,
        "tokens_a_step": tokens,
        "turns": turns,
        "experts_tokens_per_s": round(tokens / statistics.median(a for a, _ in pairs)),
        "dense_tokens_per_s": round(tokens / statistics.median(b for _, b in pairs)),
        "ratio": round(middle, 3),
        "ratio_quartiles": [round(low, 3), round(high, 3)],
    }


def main() -> None:
    torch.set_num_threads(1)
    names, turns = [name for name in sys.argv[1:] if name in CASES] or list(CASES), TURNS
    rows = {}
    for name in names:
        for precision in ("bf16", "fp32"):
            rows[f"{name} {precision}"] = measure(name, precision, turns)
            report.write("experts", f"make bench-experts ARGS='{' '.join(names)}'", threads=1, rows=rows)


if __name__ == "__main__":
    main()
