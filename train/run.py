"""The composition root of a rank: configuration -> objects -> loop.

A rank is forked from a forkserver that has imported this module. It lives in its own session, so that a Ctrl-C in the
terminal reaches the supervisor only; it dies with its supervisor; and it says what went wrong with it in one line.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
import sys
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import torch

from train import events, optim, telemetry
from train.audit import Audit
from train.balance import Balance
from train.channel import Channel
from train.config import Sharding, Train
from train.data.prepare import Prepared
from train.data.stream import Stream, Validation
from train.engine import Engine
from train.faults import detect
from train.fingerprint import fingerprint
from train.folder import plain_identity
from train.group import Dismissed, Group, Membership, Place
from train.keeper import Keeper, restore
from train.loop import Due, fit
from train.processes import die_with_parent, log_to
from train.profile import Profiler
from train.pulse import Pulse, first
from train.ranks import Changed
from train.recovery import Recovery
from train.saver import Saver
from train.telemetry import Recorder
from train.trained import precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the supervisor tells a rank besides the run's configuration."""

    folder: str  # of the run
    record: str  # of the run's events on this node
    place: Place
    threads: int  # of this rank, on a CPU
    writer_epoch: int  # how many times this run has been started
    resume: bool  # go on from the newest checkpoint; rank 0's word counts
    joins: bool  # a run that is under way: get ready, then wait to be made a member
    left_out: list[int]  # batches that no step sees, by node 0's folder: another node's need not know

    @classmethod
    def from_json(cls, text: str) -> Order:
        fields = json.loads(text)
        return cls(**{**fields, "place": Place(**fields["place"])})


def worker(config: Train, order_json: str, connection: Connection, listener: socket.socket | None) -> None:
    """The life of a rank. Exits with 0, or with 1 after a `fault` event that says why."""
    die_with_parent()  # first: once the supervisor has gone, the folder may be another start's
    order = Order.from_json(order_json)
    member, logs = order.place.member, Path(order.folder) / "logs"
    channel = Channel(connection, Pulse(logs / f"rank-{member}.pulse"))
    os.setsid()
    channel.heed_signals(member)
    log_to(logs / f"rank-{member}.log")
    try:
        recovery = assemble(config, order, channel, listener)
        stopped = _train(recovery)
        channel.send(events.Left(rank=member, step=recovery.state.step, stopped=stopped))
        recovery.group.leave()
    except Dismissed:
        channel.send(events.Left(rank=member, step=recovery.state.step, stopped=False))
    except BaseException as error:
        traceback.print_exc()
        phase, step = channel.where
        fault, cause = _cause(error)
        channel.send(events.Fault(fault=fault, phase=phase, rank=member, step=step, cause=cause))
        sys.stderr.flush()
        os._exit(1)  # no collective may be waited for on the way out


def _train(recovery: Recovery) -> bool:
    """Train to the end, whatever becomes of the other ranks; returns whether it stopped before that, on request."""
    while True:
        recovery.regroup()
        try:
            stopped = fit(recovery.state, recovery.parts)
            recovery.parts.recorder.flush()
            recovery.keeper.finish(stopped)
            return stopped
        except Changed as change:
            print(f"leaving epoch {recovery.group.membership.epoch}: {change}", flush=True)


def assemble(config: Train, order: Order, channel: Channel, listener: socket.socket | None) -> Recovery:
    """Everything a rank trains with, put together; it has no state yet."""
    folder = Path(order.folder)
    prepared = Prepared.read(folder / "data.json")
    prepared.left_out = order.left_out
    channel.pulse.first = first(config, prepared.vocab)
    channel.pulse.heavier = {"evaluation": config.eval.micro_batch / int(config.batch.micro_batch)}

    def news() -> Membership | None:
        sent = channel.membership()
        return Membership(**sent) if sent else None

    group = Group(order.place, precision(config.precision, torch.device(order.place.device)), listener, news)
    channel.pulse.doing = lambda: f"step {channel.where[1]}, {group.doing or 'alone'}"
    if sharded := config.sharding is not Sharding.none:
        group.join()  # who has which part of the state depends on the ranks
    loggers = telemetry.loggers(config, folder, order.writer_epoch, order.place.member)
    engine = Engine.build(config, prepared, group, order.threads, loggers)
    fabric, state = engine.fabric, engine.state
    numerics = fingerprint(config, fabric.device)
    balance = Balance(config, group, engine.reducer, channel)
    recorder = Recorder(config, fabric, channel.send, prepared.vocab, engine.model.aside.shape, [balance.observe])

    stored = optim.Stored(state.optimizer, state.flat)
    phase = detect.watched(config, group, order.place.member, channel, Path(order.record), stored)

    @functools.cache  # opening the set verifies it: once for the part, once for the whole
    def validation(tokens: int) -> Validation:
        context, rows = config.model.context, config.eval.micro_batch
        return Validation(prepared, context=context, tokens=tokens, micro_batch=rows)

    about = {
        "fingerprint": numerics,
        "config": hashlib.sha256(json.dumps(plain_identity(config), sort_keys=True).encode()).hexdigest(),
        "writer_epoch": order.writer_epoch,
        "identity": plain_identity(config),
        "data": prepared.digest,
        "left_out": prepared.left_out,
    }
    saver = Saver(folder / "checkpoints", group, about, config.checkpoint, channel.send, channel.pulse.beat)
    keeper = Keeper(config, state, engine.model, fabric, validation, channel, phase, recorder, group, saver)
    parts = engine.parts(
        recorder,
        phase=phase,
        asked=lambda: (channel.stop_requested(), group.newer() is not None),
        due=(Due(config.eval.every, keeper.evaluate), Due(config.checkpoint.every, keeper.save, when_stopping=True)),
    )

    for store in parts.stream.stores:
        store.waits = channel.stop_requested  # which says that this rank is alive, and ends it with its parent

    if config.recovery.audit:
        audit = Audit(config, state, parts, engine.reducer, group, channel, order.writer_epoch)
        parts = replace(parts, phase=audit.phase)
        recorder.on_step.append(audit.compare)

    if config.profile and order.place.member == 0:
        profiler = Profiler(parts, channel.send, folder / f"profile-{order.writer_epoch}.json")
        parts = replace(parts, phase=profiler.phase, stream=cast(Stream, profiler))

    def begin() -> None:
        restore(state, folder / "checkpoints", group, channel, order.resume, numerics)
        recorder.peak, source = telemetry.peak(config, fabric, group)
        if fabric.is_global_zero:
            begun = telemetry.start(config, prepared.vocab, state.step, group.world, numerics, recorder.peak, source)
            channel.send(begun)

    if order.joins:
        recorder.peak, _ = telemetry.peak(config, fabric, group)
        balance.warm_up(state, parts)
        channel.send(events.Ready(rank=order.place.member))
    return Recovery(group, state, parts, engine.reducer, keeper, balance, channel, begin, joined=sharded)


def _cause(error: BaseException) -> tuple[str, str]:
    """The kind of a failure and one line on it, with what to change where that is known."""
    first = (str(error).strip().splitlines() or [""])[0]
    if kind := getattr(error, "fault", None):
        return kind, str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory", f"out of memory: use a smaller batch.micro_batch, model.context or model ({first})"
    return "exception", f"{type(error).__name__}: {first}"
