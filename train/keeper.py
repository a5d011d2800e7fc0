"""What is done beside the steps: evaluation, checkpoints, and the last words of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from train import checkpoint, events, manifest
from train.channel import Channel
from train.checks import Refused
from train.config import Train
from train.data.stream import Validation
from train.evaluate import evaluate
from train.folder import differences
from train.group import Group
from train.loop import TrainState
from train.models.language import LanguageModel
from train.sample import TOKENS, continue_text
from train.saver import Saver
from train.telemetry import Recorder


@dataclass(frozen=True, slots=True)
class Keeper:
    config: Train
    state: TrainState
    model: LanguageModel  # not compiled: a second graph for evaluation costs more than it saves
    fabric: Fabric
    validation: Callable[[int], Validation]  # so many tokens of it; 0: the whole set
    channel: Channel
    phase: Callable[[str, int], None]  # says what comes next
    recorder: Recorder
    group: Group
    saver: Saver
    scores: dict[int, float] = field(default_factory=dict)  # step -> validation loss

    def evaluate(self, step: int) -> None:
        """Score the validation set: a fixed part of it on the way, the whole of it at the end."""
        started = time.perf_counter()
        self.phase("evaluation", step)
        self.recorder.flush()
        whole = step == self.config.steps
        part = self.validation(0 if whole else self.config.eval.tokens)
        score = evaluate(self.model, part, self.fabric, self.channel.pulse.beat)
        self.scores[step] = score.loss
        sample = "" if whole else self._sample(part, self.config.eval.sample)
        if self.fabric.is_global_zero:
            event = events.Evaluated(
                step=step,
                loss=score.loss,
                bpb=score.bpb,
                tokens=score.tokens,
                whole=whole,
                seconds=time.perf_counter() - started,
                experts=score.experts,
                balance=score.balance,
                router_z=score.router_z,
                sample=sample,
            )
            self.channel.send(event)
            numbers = {"val/loss": score.loss, "val/bpb": score.bpb}
            numbers |= {"val/balance": score.balance, "val/router_z": score.router_z}
            for layer, chosen in enumerate(score.experts):
                numbers[f"experts/busiest_of_layer_{layer}"] = max(chosen) / sum(chosen)
            self.fabric.log_dict({name: number for name, number in numbers.items() if number is not None}, step=step)
        self.recorder.resume_clock()

    def save(self, step: int) -> None:
        """Begin a checkpoint, which is written in the background. What is saved has been seen to be finite."""
        self.phase("checkpoint", step)
        self.recorder.flush()
        if self.fabric.is_global_zero:
            self.channel.settle()
        self.saver.save(step, self.state.pieces(), {"val_loss": self.scores.get(step)})
        self.recorder.resume_clock()

    def finish(self, stopped: bool) -> None:
        """Rank 0's last words: the digest of the state, and, of a run that is done, a sample and the yardsticks.

        They are said once the last checkpoint is whole; raises `saver.NotSaved` where it is not.
        """
        self.channel.phase("end", self.state.step)
        digest = checkpoint.state_sha256(self.state.step, self.state.pieces(), self.group)
        end = events.Finished(step=self.state.step, stopped=stopped, state_sha256=digest)
        if self.fabric.is_global_zero:
            for logger in self.fabric.loggers:
                logger.finalize("success")
        if not stopped:
            whole = self.validation(0)
            end.sample = self._sample(whole, TOKENS if self.config.eval.sample else 0)
            if self.fabric.is_global_zero:
                end.yardsticks = whole.yardsticks()
        self.channel.phase("checkpoint", self.state.step)
        self.saver.finish()
        if self.fabric.is_global_zero:
            self.channel.send(end)

    def _sample(self, validation: Validation, tokens: int) -> str:
        """What the model makes of the prompt now, as rank 0 says it; all ranks must ask, since each may hold a part."""
        if not tokens:
            return ""
        with self.state.flat.gathered():
            if not self.fabric.is_global_zero:
                return ""
            config, beat = self.config, self.channel.pulse.beat
            tokenizer = validation.tokenizer
            return continue_text(self.model, tokenizer, config.sample, seed=config.seed, tokens=tokens, beat=beat)[0]


def restore(
    state: TrainState, root: Path, group: Group, channel: Channel, resume: bool, numerics: Mapping[str, Any]
) -> None:
    """Bring the newest checkpoint that is whole into `state`: rank 0 reads it, the others receive it.

    Rank 0's `resume` decides for all: another node may have a run folder of its own, without checkpoints. `numerics`
    is this machine's fingerprint.
    """
    found = None
    step = torch.zeros(1, dtype=torch.int64)
    if group.rank == 0 and resume:
        found, refused = manifest.newest(root)
        if found is None:
            raise Refused(str(root), f"no checkpoint is whole ({refused[0]}): remove the folder to start anew")
        step[0] = found.step
        channel.send(events.Restored(step=found.step, path=str(found.path), refused=refused))
        if different := differences(found.manifest.get("fingerprint", {}), numerics):
            changes = ", ".join(f"{key} {old} -> {here}" for key, (old, here) in different.items())
            channel.send(events.Warned(rank=0, step=found.step, text=f"bitwise equality ends here: {changes}"))
    group.broadcast(step)
    if step.item() == 0:
        return
    checkpoint.load(found, state.pieces(), group)
    state.restored(int(step.item()))
