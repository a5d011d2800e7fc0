"""The step, on one screen, in the order in which things happen.

`fit` knows no variant: what reduces, what optimizes, what records and whether anything is due are objects that were
put together in `train.run`. There is no host synchronization in it: numbers leave through the recorder, which copies
them asynchronously and reads them when they have arrived.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from torch import Tensor

from train import optim
from train.batch import checksum, micro_batch_seed
from train.buckets import Reducer, Total
from train.config import Train
from train.data.stream import Stream
from train.flat import Buffer, Flat, Piece, to_device
from train.models.fused import casts_kept
from train.muon import Muon
from train.ranks import Changed
from train.telemetry import Recorder


@dataclass(slots=True)
class TrainState:
    """All that a run is between two steps: saved whole, restored whole."""

    step: int  # steps committed so far
    flat: Flat  # parameters
    optimizer: optim.AdamW | Muon
    handled: int = sys.maxsize  # how many of the things that were due after the last step are done

    def pieces(self) -> list[Piece]:
        """All of the state that this rank holds: parameters, and the moments of those that it updates."""
        return self.flat.pieces() + optim.pieces(self.optimizer, self.flat)

    def restored(self, step: int) -> None:
        self.step, self.handled = step, sys.maxsize
        optim.set_step(self.optimizer, step)
        self.flat.release()


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
    aside: Tensor  # what the model told with its last loss, (N,) or of more dimensions
    stream: Stream
    generator: torch.Generator  # the device's default one, which dropout draws from
    reducer: Reducer
    recorder: Recorder
    phase: Callable[[str, int], None]  # says what comes next, in case it fails
    asked: Callable[[], tuple[bool, bool]]  # was this rank asked to stop, does it know of a change of the ranks?
    due: tuple[Due, ...]  # evaluation, checkpoint: in this order


def fit(state: TrainState, parts: Parts) -> bool:
    """Train from `state.step` to the last step. Returns whether it stopped before that, on request.

    Raises Changed from any wait for other ranks, and between two steps where all of them know of a change: what is
    called again afterwards goes on with what was not done.
    """
    steps, recorder = parts.config.steps, parts.recorder
    while True:
        for due in parts.due[state.handled :]:
            due.run(state.step, steps, recorder.stopping)
            state.handled += 1
        if state.step >= steps or recorder.stopping:
            return state.step < steps
        if recorder.changing:
            raise Changed
        total, rate = step(state, parts)
        recorder.step(state.step, total, rate)


def step(state: TrainState, parts: Parts) -> tuple[Total, float]:
    """One step of training: what the virtual ranks added up to, and the learning rate that was used."""
    config, reducer = parts.config, parts.reducer
    with casts_kept():
        for v, buffer in reducer.leaves():
            virtual_rank(v, buffer, state, parts)

    parts.phase("reduce", state.step)
    total = reducer.finish(*parts.asked())

    parts.phase("optimizer", state.step)
    rate = optim.learning_rate(config.optimizer, config.schedule, state.step, config.steps)
    optim.set_learning_rate(state.optimizer, rate)
    state.flat.step(state.optimizer.step, total.gradient, total.norm, config.optimizer.clip_norm)
    reducer.spread()
    parts.phase("commit", state.step)
    state.step, state.handled = state.step + 1, 0
    return total, rate


def virtual_rank(v: int, buffer: Buffer, state: TrainState, parts: Parts) -> None:
    """Add virtual rank v's gradient and loss to `buffer`: its k micro-batches in order.

    The loss of a step is the sum over its targets divided by their number, which is known before the forward pass.
    """
    for i in range(parts.config.batch.micro_batches):
        micro_batch(v, i, buffer, state, parts)


def micro_batch(v: int, i: int, buffer: Buffer, state: TrainState, parts: Parts) -> None:
    config = parts.config
    parts.phase("forward", state.step)
    parts.generator.manual_seed(micro_batch_seed(config.seed, state.step, v, i))
    read = parts.stream.micro_batch(state.step, v, i)
    tokens = to_device(torch.from_numpy(read), parts.fabric.device)
    with parts.fabric.autocast():
        nats = parts.model(*parts.stream.sides(tokens))
    loss = nats / parts.stream.counted(state.step)
    parts.phase("backward", state.step)
    parts.fabric.backward(loss)
    buffer.loss += loss.detach()
    buffer.numbers[1:] += parts.aside.view(-1)
    buffer.tokens = checksum(read.tobytes(), buffer.tokens)
