"""`profile=N`: where the time of N steps goes, as a trace for ui.perfetto.dev and as a table that adds up to them.

A profiler stands in the place of what a step calls at each phase, and reads tokens from; without `profile` nobody does.
From one phase to the next is one stretch, so stretches cover the steps without a gap; inside them torch says which
operation ran when. The rest is the host's: Python, the record. On a GPU it is the host's view (unmeasured there).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from train import events
from train.loop import Parts

WARM = 3  # steps of a start that are left out
STRETCHES = {"reduce": "reduction exposed", "optimizer": "optimizer", "commit": "host"}
INSIDE = {  # what the name of an operation, or of one around it, begins with -> the part that it belongs to
    "tokens": "data",
    "Attention": "attention",
    "aten::scaled_dot_product": "attention",
    "ScaledDotProduct": "attention",
    "aten::cross_entropy_loss": "loss",
    "LogSoftmaxBackward": "loss",
    "NllLossBackward": "loss",
}


class Profiler:
    def __init__(self, parts: Parts, send: Callable[[events.Event], None], trace: Path) -> None:
        self._parts, self._send, self._trace = parts, send, trace
        self.sides, self.counted = parts.stream.sides, parts.stream.counted
        self._steps = range(0)  # which are profiled
        self._profile: Any = None
        self._stretch: Any = None

    def phase(self, name: str, step: int) -> None:
        """What the loop calls, and through it what it called before."""
        config = self._parts.config
        if not self._steps and name == "forward":
            first = max(step, min(step + WARM, config.steps - config.profile))
            self._steps = range(first, min(first + config.profile, config.steps))
        if self._stretch is not None:
            self._stretch.__exit__(None, None, None)
            self._stretch = None
            if step not in self._steps:
                self._parts.phase("profile", step)  # which may take long
                self._end()
        if step in self._steps:
            self._profile = self._profile or torch.profiler.profile().__enter__()  # type: ignore[no-untyped-call]
            self._stretch = record_function(f"phase {name}").__enter__()  # type: ignore[no-untyped-call]
        self._parts.phase(name, step)

    def micro_batch(self, step: int, v: int, i: int) -> Any:
        """What the loop reads tokens from."""
        with record_function("tokens"):
            return self._parts.stream.micro_batch(step, v, i)

    def _end(self) -> None:
        self._profile.__exit__(None, None, None)
        self._profile.export_chrome_trace(str(self._trace))
        steps = len(self._steps)
        parts = {part: seconds / steps for part, seconds in shares(self._profile.events()).items()}
        self._send(events.Profiled(step=self._steps.stop, parts=parts, steps=steps, trace=str(self._trace)))


def shares(profiled: Any) -> dict[str, float]:
    """Seconds by part, the largest first: each operation's own time, and of each stretch what no operation had."""
    found: Counter[str] = Counter()
    for event in profiled:
        around = [event]
        while around[-1].cpu_parent is not None:
            around.append(around[-1].cpu_parent)
        if around[-1].name.startswith("phase "):  # in this thread, within a step
            found[part([one.name for one in around])] += event.self_cpu_time_total / 1e6
    return dict(found.most_common())


def part(names: list[str]) -> str:
    """Of an operation, whose name comes first, then those of what is around it."""
    phase = names[-1].removeprefix("phase ")
    for found in (INSIDE[prefix] for name in names for prefix in INSIDE if name.startswith(prefix)):
        return found
    if phase not in ("forward", "backward"):
        return STRETCHES.get(phase, "evaluation, saving")
    if len(names) == 1:
        return "host"
    if phase == "backward" and not any(name.startswith("autograd::engine") for name in names):
        return "sum of leaves"  # the tree and its checksums, between the backward passes
    return phase
