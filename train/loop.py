"""The step, on one screen, in the order in which things happen.

`fit` knows no variant: what reduces, what optimizes, what records and whether anything is due are objects that were
put together in `train.run`. There is no host synchronization in it: numbers leave through the recorder, which copies
them asynchronously and reads them when they have arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from torch import Tensor

from train import optim
from train.batch import micro_batch_seed
from train.config import Train
from train.data.stream import Stream
from train.flat import LOSS, STOP, Buffer, Flat, Piece
from train.reduce import Reducer
from train.telemetry import Recorder


@dataclass(slots=True)
class TrainState:
    """All that a run is between two steps: saved whole, restored whole."""

    step: int  # steps committed so far
    flat: Flat  # parameters
    optimizer: torch.optim.Optimizer

    def files(self) -> dict[str, dict[str, Tensor]]:
        """The state's tensors by the checkpoint file that holds them: views, so that loading into them restores."""
        moments = optim.flat_state(self.optimizer, self.flat)
        flattened = {f"{moment}.{name}": tensor for moment, named in moments.items() for name, tensor in named.items()}
        return {"model": self.flat.named(self.flat.parameters), "optimizer": flattened}

    def pieces(self) -> list[Piece]:
        """All of the state that this rank holds."""
        return [
            Piece(file, name, tensor.shape, 0, tensor.detach().view(-1), replicated=True)
            for file, tensors in self.files().items()
            for name, tensor in tensors.items()
        ]

    def restored(self, step: int) -> None:
        self.step = step
        optim.set_step(self.optimizer, step)


@dataclass(frozen=True, slots=True)
class Due:
    """Something done every n steps, after the last one and, if it says so, when the run stops before that."""

    every: int
    action: Callable[[int], None]  # takes the number of steps committed
    when_stopping: bool = False

    def run(self, step: int, steps: int, stopping: bool) -> None:
        if step == steps or (stopping and self.when_stopping) or (self.every and step % self.every == 0):
            self.action(step)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a step is made of."""

    config: Train
    fabric: Fabric
    model: Callable[[Tensor, Tensor], Tensor]  # inputs, targets (B, T) -> sum of nats; perhaps compiled
    stream: Stream
    generator: torch.Generator  # the device's default one, which dropout draws from
    reducer: Reducer
    recorder: Recorder
    phase: Callable[[str, int], None]  # says what comes next, in case it fails
    stop_requested: Callable[[], bool]  # has the supervisor asked this rank to stop?
    due: tuple[Due, ...]  # evaluation, checkpoint: in this order


def fit(state: TrainState, parts: Parts) -> bool:
    """Train from `state.step` to the last step. Returns whether it stopped before that, on request."""
    config, flat, optimizer = parts.config, state.flat, state.optimizer
    while state.step < config.steps:
        parts.phase("forward/backward", state.step)
        gradients = parts.reducer.accumulate(lambda v, buffer: virtual_rank(v, buffer, state, parts))
        gradients[0].scalars[STOP] += float(parts.stop_requested())

        parts.phase("reduce", state.step)
        gradient = parts.reducer.reduce(gradients)

        parts.phase("optimizer", state.step)
        norm = flat.clip(gradient, config.optimizer.clip_norm)
        rate = optim.learning_rate(config.optimizer, config.schedule, state.step, config.steps)
        optim.set_learning_rate(optimizer, rate)
        flat.step(optimizer, gradient)
        state.step += 1

        stop = parts.recorder.step(state.step, gradient.scalars[LOSS], norm, rate, gradient.scalars[STOP])
        for due in parts.due:
            due.run(state.step, config.steps, stop)
        if stop:
            break
    return state.step < config.steps


def virtual_rank(v: int, buffer: Buffer, state: TrainState, parts: Parts) -> None:
    """Add virtual rank v's gradient and loss to `buffer`: its k micro-batches in order.

    The loss of a step is the sum over its tokens divided by their number, which is known before the forward pass.
    """
    config, device = parts.config, parts.fabric.device
    state.flat.attach(buffer)
    for i in range(config.batch.micro_batches):
        parts.generator.manual_seed(micro_batch_seed(config.seed, state.step, v, i))
        tokens = torch.from_numpy(parts.stream.micro_batch(state.step, v, i)).to(device, non_blocking=True)
        with parts.fabric.autocast():
            nats = parts.model(tokens[:, :-1], tokens[:, 1:])
        loss = nats / config.tokens_per_step
        parts.fabric.backward(loss)
        buffer.scalars[LOSS] += loss.detach()
