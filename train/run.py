"""The composition root of a rank: configuration -> objects -> loop.

A rank is forked from a forkserver that has imported this module. It lives in its own session, so that a Ctrl-C in the
terminal reaches the supervisor only; it dies with its supervisor; and it says what went wrong with it in one line.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.csv_logs import CSVLogger
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger

from train import checkpoint, events, flops, hardware, optim, plan, reduce
from train.config import ReduceMode, Refused, Train, read_train
from train.data.prepare import Prepared
from train.data.stream import Stream, Validation
from train.data.tokenizer import Tokenizer
from train.data.yardstick import yardsticks
from train.evaluate import evaluate
from train.fingerprint import fingerprint
from train.flat import Flat
from train.group import Group, Place, join, leave
from train.loop import Due, Parts, TrainState, fit
from train.models.build import build
from train.models.language import LanguageModel
from train.sample import continue_text
from train.telemetry import Recorder, matmul_peak
from train.trained import precision

STOP = b"stop"  # what the supervisor sends to a rank that shall save and stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the supervisor tells a rank besides the run's configuration."""

    folder: str  # of the run
    place: Place
    threads: int  # of this rank, on a CPU
    writer_epoch: int  # how many times this run has been started
    resume: bool  # go on from the newest checkpoint, if there is one

    @classmethod
    def from_json(cls, text: str) -> Order:
        fields = json.loads(text)
        return cls(**{**fields, "place": Place(**fields["place"])})


class Channel:
    """The rank's end of the pipe to its supervisor: events out, a request to stop in."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stop = False

    def send(self, event: events.Event) -> None:
        self._connection.send_bytes(events.line(event.record()).encode())

    def stop_requested(self) -> bool:
        while not self._stop and self._connection.poll():
            self._stop = self._connection.recv_bytes() == STOP
        return self._stop


def worker(order_json: str, connection: Connection, listener: socket.socket | None) -> None:
    """The life of a rank. Exits with 0, or with 1 after a `fault` event that says why."""
    order = Order.from_json(order_json)
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    _log_to(Path(order.folder) / "logs" / f"rank-{order.place.rank}.log")
    channel = Channel(connection)
    where: list[Recorder] = []
    try:
        _train(order, channel, listener, where)
    except BaseException as error:
        traceback.print_exc()
        phase, step = where[0].where if where else ("start", None)
        fault, cause = _cause(error)
        channel.send(events.Fault(fault=fault, phase=phase, rank=order.place.rank, step=step, cause=cause))
        sys.stderr.flush()
        os._exit(1)  # no collective may be waited for on the way out
    leave()


def _train(order: Order, channel: Channel, listener: socket.socket | None, where: list[Recorder]) -> None:
    folder, place = Path(order.folder), order.place
    config = read_train(folder / "config.yaml")
    prepared = Prepared.from_json((folder / "data.json").read_text())
    _numerics(config, place, order.threads)
    join(place, listener)
    group = Group(place, precision(config.precision, torch.device(place.device)))
    loggers = _loggers(config, folder, order.writer_epoch) if place.rank == 0 else []
    accelerator = place.device.split(":")[0]
    fabric = Fabric(accelerator=accelerator, devices=1, strategy=group, loggers=loggers)

    vocab = prepared.vocab
    model = build(config.model, vocab, seed=config.seed, device=fabric.device)
    flat = Flat(model)
    state = TrainState(step=0, flat=flat, optimizer=optim.build(config.optimizer, flat))
    if order.resume:
        restore(state, folder / "checkpoints", group, channel)

    peak, peak_source = _peak(config, fabric, group)
    flops_per_token = flops.flops_per_token(config.model, vocab)
    recorder = Recorder(config, fabric, channel.send, flops_per_token, peak)
    where.append(recorder)
    numerics = fingerprint(config, fabric.device)
    if fabric.is_global_zero:
        batch = config.batch
        channel.send(
            events.Start(
                step=state.step,
                world=place.world,
                virtual_ranks=batch.virtual_ranks,
                micro_batch=int(batch.micro_batch),
                micro_batches=batch.micro_batches,
                device=str(numerics["device"]),
                peak_flops=peak,
                peak_source=peak_source,
                precision=config.precision,
                compiled=config.compile is True,
                parameters=flops.parameters(config.model, vocab),
                flops_per_token=flops_per_token,
                memory_bytes=plan.memory(config, vocab).total,
                tokens_per_step=config.tokens_per_step,
                steps=config.steps,
                fingerprint=numerics,
            )
        )

    keeper = Keeper(config, state, model, fabric, prepared, channel, recorder, folder, numerics, order.writer_epoch)
    parts = Parts(
        config=config,
        fabric=fabric,
        model=torch.compile(model, fullgraph=True, dynamic=False) if config.compile is True else model,
        stream=Stream(
            prepared,
            seed=config.seed,
            context=config.model.context,
            sequences=config.batch.sequences,
            virtual_ranks=config.batch.virtual_ranks,
            micro_batch=int(config.batch.micro_batch),
        ),
        reducer=reduce.build(config.reduce, group, flat, config.batch.virtual_ranks),
        recorder=recorder,
        due=(
            Due(config.eval.every, keeper.evaluate),
            Due(config.checkpoint.every, keeper.save, when_stopping=True),
        ),
        stop_requested=channel.stop_requested,
    )
    stopped = fit(state, parts)
    recorder.flush()
    keeper.finish(stopped)
    channel.send(events.Left(rank=place.rank, step=state.step, stopped=stopped))


class Keeper:
    """What is done beside the steps: evaluation, checkpoints, and the last words of a run."""

    def __init__(
        self,
        config: Train,
        state: TrainState,
        model: LanguageModel,
        fabric: Fabric,
        prepared: Prepared,
        channel: Channel,
        recorder: Recorder,
        folder: Path,
        numerics: dict[str, Any],
        writer_epoch: int,
    ) -> None:
        self._config, self._state, self._model, self._fabric = config, state, model, fabric
        self._prepared, self._channel, self._recorder, self._folder = prepared, channel, recorder, folder
        self._about = {"fingerprint": numerics, "config": asdict_digest(config), "writer_epoch": writer_epoch}

    def evaluate(self, step: int) -> None:
        """Score the validation set: a fixed part of it on the way, the whole of it at the end."""
        config, started = self._config, time.perf_counter()
        self._recorder.phase("evaluation", step)
        self._recorder.flush()
        whole = step == config.steps
        score = evaluate(self._model, self._validation(0 if whole else config.eval.tokens), self._fabric)
        if self._fabric.is_global_zero:
            seconds = time.perf_counter() - started
            self._channel.send(
                events.Evaluated(
                    step=step, loss=score.loss, bpb=score.bpb, tokens=score.tokens, whole=whole, seconds=seconds
                )
            )
            bpb = {"val/bpb": score.bpb} if score.bpb is not None else {}
            self._fabric.log_dict({"val/loss": score.loss} | bpb, step=step)
        self._recorder.resume_clock()

    def save(self, step: int) -> None:
        """Write a checkpoint (rank 0) and keep the last few."""
        started = time.perf_counter()
        self._recorder.phase("checkpoint", step)
        self._recorder.flush()
        if self._fabric.is_global_zero:
            root = self._folder / "checkpoints"
            path, size = checkpoint.save(root, step, self._state.files(), self._about)
            checkpoint.retain(root, self._config.checkpoint.keep)
            seconds = time.perf_counter() - started
            self._channel.send(events.Saved(step=step, path=str(path), bytes=size, seconds=seconds))
        self._recorder.resume_clock()

    def finish(self, stopped: bool) -> None:
        """Rank 0's last words: the digest of the state, and, of a run that is done, a sample and the yardsticks."""
        if not self._fabric.is_global_zero:
            return
        self._recorder.phase("end", self._state.step)
        for logger in self._fabric.loggers:
            logger.finalize("success")
        digest = checkpoint.state_sha256(self._state.step, self._state.files())
        end = events.Finished(step=self._state.step, stopped=stopped, state_sha256=digest)
        if not stopped:
            validation = self._validation(0)
            end.yardsticks = yardsticks(validation)
            tokenizer = Tokenizer.load(self._prepared.tokenizer)
            (end.sample,) = continue_text(self._model, tokenizer, self._config.sample, seed=self._config.seed)
        self._channel.send(end)

    def _validation(self, tokens: int) -> Validation:
        config = self._config
        return Validation(
            self._prepared, context=config.model.context, tokens=tokens, micro_batch=config.eval.micro_batch
        )


def restore(state: TrainState, root: Path, group: Group, channel: Channel) -> None:
    """Bring the newest checkpoint that is whole into `state`: rank 0 reads it, the others receive it."""
    step = torch.zeros(1, dtype=torch.int64)
    if group.rank == 0:
        found, refused = checkpoint.newest(root)
        if found is None and refused:
            raise Refused(str(root), f"no checkpoint is whole ({refused[0]}): remove the folder to start anew")
        if found is not None:
            checkpoint.load(found, state.files())
            step[0] = found.step
            channel.send(events.Restored(step=found.step, path=str(found.path), refused=refused))
    group.broadcast(step)
    if step.item():
        group.broadcast(state.flat.parameters.detach())
        for tensors in state.optimizer.state.values():
            for tensor in tensors.values():
                group.broadcast(tensor)
        state.restored(int(step.item()))


def asdict_digest(config: Train) -> str:
    """sha256 of the configuration: what a checkpoint belongs to."""
    return hashlib.sha256(json.dumps(asdict(config), default=str, sort_keys=True).encode()).hexdigest()


def _numerics(config: Train, place: Place, threads: int) -> None:
    """Fix what the bits depend on: threads on a CPU, deterministic kernels where the law is promised."""
    if place.device == "cpu":
        torch.set_num_threads(threads)
    else:
        torch.cuda.set_device(place.device)
    if config.reduce.mode is ReduceMode.exact:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before the first cuBLAS call; torch demands it
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it writes twice


def _loggers(config: Train, folder: Path, epoch: int) -> list[Logger]:
    """Fabric's loggers. Each start of a run writes a CSV of its own, since the logger overwrites what it finds."""
    loggers: list[Logger] = []
    for name in config.logger:
        if name == "tensorboard":
            loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
        elif name == "csv":
            loggers.append(CSVLogger(folder, name="csv", version=f"start-{epoch}"))
        else:
            from lightning.pytorch.loggers import WandbLogger  # an extra; imported only where it is asked for

            loggers.append(WandbLogger(name=config.name, id=config.name, save_dir=folder, resume="allow"))
    return loggers


def _peak(config: Train, fabric: Fabric, group: Group) -> tuple[float | None, str]:
    """Dense peak FLOP/s of all ranks' devices together and where the figure is from; None where one is unknown."""
    bf16 = config.precision == "bf16"
    mine: float | None
    if fabric.device.type == "cpu":
        group.barrier()  # all ranks measure at once, as they will compute
        mine, source = matmul_peak(fabric.device, torch.bfloat16 if bf16 else torch.float32), "measured matmul"
    else:
        name = torch.cuda.get_device_name(fabric.device)
        mine, source = hardware.peak_flops(name, config.precision), "datasheet"
    total = group.all_reduce(torch.tensor([mine if mine else float("nan")], dtype=torch.float64)).item()
    return (total, source) if total == total else (None, "unknown device")


def _cause(error: BaseException) -> tuple[str, str]:
    """The kind of a failure and one line on it, with what to change where that is known."""
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, Refused):
        return "refused", str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory", f"out of memory: use a smaller batch.micro_batch, model.context or model ({first})"
    return "exception", f"{type(error).__name__}: {first}"


def _die_with_parent() -> None:
    """End this process when the supervisor has gone, however it went."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _log_to(path: Path) -> None:
    """Standard output and error of this process, native code's included, go to the rank's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
