"""What is done beside the steps: evaluation, checkpoints, and the last words of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from train import checkpoint, events
from train.channel import Channel
from train.config import Refused, Train
from train.data.stream import Validation
from train.data.yardstick import yardsticks
from train.evaluate import evaluate
from train.group import Group
from train.loop import TrainState
from train.models.language import LanguageModel
from train.sample import continue_text
from train.telemetry import Recorder


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeper:
    config: Train
    state: TrainState
    model: LanguageModel  # not compiled: a second graph for evaluation costs more than it saves
    fabric: Fabric
    validation: Callable[[int], Validation]  # so many tokens of it; 0: the whole set
    channel: Channel
    recorder: Recorder
    folder: Path
    about: dict[str, Any]  # what a checkpoint says of its origin

    def evaluate(self, step: int) -> None:
        """Score the validation set: a fixed part of it on the way, the whole of it at the end."""
        started = time.perf_counter()
        self.channel.phase("evaluation", step)
        self.recorder.flush()
        whole = step == self.config.steps
        score = evaluate(self.model, self.validation(0 if whole else self.config.eval.tokens), self.fabric)
        if self.fabric.is_global_zero:
            event = events.Evaluated(
                step=step,
                loss=score.loss,
                bpb=score.bpb,
                tokens=score.tokens,
                whole=whole,
                seconds=time.perf_counter() - started,
            )
            self.channel.send(event)
            bpb = {"val/bpb": score.bpb} if score.bpb is not None else {}
            self.fabric.log_dict({"val/loss": score.loss} | bpb, step=step)
        self.recorder.resume_clock()

    def save(self, step: int) -> None:
        """Write a checkpoint (rank 0) and keep the last few. What is saved has been seen to be finite."""
        started = time.perf_counter()
        self.channel.phase("checkpoint", step)
        self.recorder.flush()
        if self.fabric.is_global_zero:
            self.channel.settle()
            root = self.folder / "checkpoints"
            path, size = checkpoint.save(root, step, self.state.files(), self.about)
            checkpoint.retain(root, self.config.checkpoint.keep)
            seconds = time.perf_counter() - started
            self.channel.send(events.Saved(step=step, path=str(path), bytes=size, seconds=seconds))
        self.recorder.resume_clock()

    def finish(self, stopped: bool) -> None:
        """Rank 0's last words: the digest of the state, and, of a run that is done, a sample and the yardsticks."""
        if not self.fabric.is_global_zero:
            return
        self.channel.phase("end", self.state.step)
        for logger in self.fabric.loggers:
            logger.finalize("success")
        digest = checkpoint.state_sha256(self.state.step, self.state.files())
        end = events.Finished(step=self.state.step, stopped=stopped, state_sha256=digest)
        if not stopped:
            whole = self.validation(0)
            end.yardsticks = yardsticks(whole)
            (end.sample,) = continue_text(self.model, whole.tokenizer, self.config.sample, seed=self.config.seed)
        self.channel.send(end)


def restore(state: TrainState, root: Path, group: Group, channel: Channel, resume: bool) -> None:
    """Bring the newest checkpoint that is whole into `state`: rank 0 reads it, the others receive it.

    Rank 0's `resume` decides for all: another node may have a run folder of its own, without checkpoints.
    """
    step = torch.zeros(1, dtype=torch.int64)
    if group.rank == 0 and resume:
        found, refused = checkpoint.newest(root)
        if found is None:
            raise Refused(str(root), f"no checkpoint is whole ({refused[0]}): remove the folder to start anew")
        checkpoint.load(found, state.files())
        step[0] = found.step
        channel.send(events.Restored(step=found.step, path=str(found.path), refused=refused))
    group.broadcast(step)
    if step.item() == 0:
        return
    group.broadcast(state.flat.parameters.detach())
    for tensors in state.optimizer.state.values():
        for tensor in tensors.values():
            group.broadcast(tensor)
    state.restored(int(step.item()))
