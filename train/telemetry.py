"""Numbers on their way out of a step, without stopping it.

Reading a number from a GPU waits for everything before it. The recorder copies a step's few numbers into pinned memory
instead and reads them `LAG` steps later, when they have long arrived; on a CPU there is nothing to wait for. The
flag by which ranks agree to stop travels the same way, and is read at the same step by all of them.

Rank 0's recorder speaks for the run: it sends a `step` event for every step and feeds Fabric's loggers. The others'
only keep count.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.csv_logs import CSVLogger
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from torch import Tensor

from train import events, flops, hardware, plan
from train.buckets import Total
from train.config import Train
from train.economy import Meter
from train.evidence import word
from train.folder import plain_identity
from train.group import Group

LAG = 2  # steps between a number's making and its reading, on a GPU

Send = Callable[[events.Event], None]
# Takes the step, how long each rank took for a leaf, and the checksums of each leaf: (V, 2) of tokens and of gradient.
OnStep = Callable[[int, list[float], Tensor], None]


class NotFinite(Exception):
    """The loss or the gradient is NaN or infinite: training on would write nonsense over the last good state."""

    fault = "not finite"


@dataclass(slots=True)
class _Pending:
    step: int
    rate: float
    numbers: Tensor  # (4 + N + 2V + 2P + 2W,) int64 – in pinned memory where they come from a GPU
    world: int
    ready: torch.cuda.Event | None


class Recorder:
    """The numbers of a rank's steps, read when they have arrived."""

    def __init__(
        self,
        config: Train,
        fabric: Fabric,
        send: Send,
        vocab: int,
        aside: Sequence[int] = (0,),
        on_step: Sequence[OnStep] = (),
    ) -> None:
        """`on_step` are told of a step's numbers as soon as they have arrived, on every rank.

        `aside`: the shape of what the model tells beside its loss: by layer, the counts of its experts and two losses.
        """
        self._config, self._fabric, self._send, self.on_step = config, fabric, send, list(on_step)
        self._vocab, self._aside = vocab, torch.Size(aside)
        self.peak: float | None = None  # dense FLOP/s of a rank's device
        self._on_gpu = fabric.device.type == "cuda"
        self._pending: deque[_Pending] = deque()
        self._step_end = self._log_start = time.perf_counter()
        self._log_step: int | None = None
        gpu = f"GPU-{torch.cuda.get_device_properties(fabric.device).uuid}" if self._on_gpu else None
        self._meter = Meter(gpu)
        self._lag = LAG if self._on_gpu else 0
        self._heed: dict[str, int] = {}  # the step from which a request is heeded, by all ranks alike
        self._step = 0
        self._unsaid: deque[events.Event] = deque(maxlen=3 * LAG + 6)  # of the last steps, while another rank speaks
        self._waits: list[tuple[float, list[float]]] = []  # since the last logging step: seconds, each rank's wait
        self.last: _Pending | None = None

    def resume_clock(self) -> None:
        """Time spent outside steps (evaluation, saving) is not the next step's."""
        now = time.perf_counter()
        self._log_start += now - self._step_end
        self._step_end = now

    @property
    def stopping(self) -> bool:
        """Have the ranks agreed to stop? They have, when each of them heeds the request after the same step."""
        return self._step >= self._heed.get("stop", sys.maxsize)

    @property
    def changing(self) -> bool:
        """Do all ranks know of a change of the ranks?"""
        return self._step >= self._heed.get("change", sys.maxsize)

    def step(self, step: int, total: Total, rate: float) -> None:
        """Take the numbers of a committed step."""
        floats = torch.stack([total.loss, total.norm, total.stops, total.changes]).view(torch.int64)
        told = floats, total.aside.view(torch.int64), total.leaves.view(-1), total.state.view(-1)
        numbers = torch.cat([*told, total.seconds.reshape(-1).view(torch.int64)])
        ready = None
        if self._on_gpu:
            pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            pinned.copy_(numbers, non_blocking=True)
            numbers, ready = pinned, torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        self._pending.append(_Pending(step, rate, numbers, total.seconds.shape[1], ready))
        self._step = step
        self._read(keep=self._lag)

    def catch_up(self, step: int, rate: float, numbers: Tensor, world: int) -> None:
        """Take the numbers of the last step from a rank that has committed it."""
        self._pending.append(_Pending(step, rate, numbers, world, None))
        self._step = step
        self.flush()

    def regrouped(self, recorded: int | None) -> None:
        """The ranks have changed; say what comes after step `recorded`, if this rank speaks for the run from now on."""
        self._heed.pop("change", None)
        for event in self._unsaid if recorded is not None else ():
            if event.step > recorded:  # type: ignore[attr-defined]
                self._send(event)
        self.resume_clock()

    def flush(self) -> None:
        """Read all that is under way: before a checkpoint, and at the end."""
        self._read(keep=0)

    def _read(self, keep: int) -> None:
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            if pending.ready is not None:
                pending.ready.synchronize()
            self.last, world = pending, pending.world
            loss, norm, stops, changes = pending.numbers[:4].view(torch.float64).tolist()
            seconds, waited = pending.numbers[-2 * world :].view(torch.float64).view(2, world).tolist()
            if stops > 0:
                self._heed.setdefault("stop", pending.step + self._lag)
            if changes == world:
                self._heed.setdefault("change", pending.step + self._lag)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NotFinite(f"loss {loss}, gradient norm {norm} in step {pending.step}: try a lower optimizer.lr")
            aside, checksums = pending.numbers[4 : -2 * world].tensor_split([self._aside.numel()])
            leaves = checksums[: 2 * self._config.batch.virtual_ranks].view(-1, 2)
            for told in self.on_step:
                told(pending.step, seconds, leaves)
            if self._config.evidence.digests:  # said first: a step whose event is there has all of its events
                self._say(_digests(pending.step, checksums, self._config.batch.virtual_ranks))
            routing = None
            if aside.numel() and (pending.step % self._config.log.every == 0 or pending.step == self._config.steps):
                routing = self._routing(pending.step, aside.view(torch.float64).view(self._aside))
                self._say(routing)
            self._record(pending, loss, norm, waited, routing)

    def _say(self, event: events.Event) -> None:
        """Rank 0 speaks for all; the others remember, in case that it is lost before it could."""
        if self._fabric.is_global_zero:
            self._send(event)
        else:
            self._unsaid.append(event)

    def _routing(self, step: int, aside: Tensor) -> events.Routing:
        batch, layers = self._config.batch, aside.size(0)
        balance, z = (aside[:, -2:].sum(0) / (layers * batch.virtual_ranks * batch.micro_batches)).tolist()
        return events.Routing(step=step, experts=aside[:, :-2].long().tolist(), balance=balance, router_z=z)

    def _record(
        self, pending: _Pending, loss: float, norm: float, waited: list[float], routing: events.Routing | None
    ) -> None:
        now = time.perf_counter()
        step, seconds = pending.step, now - self._step_end
        self._step_end = now
        tokens = step * self._config.tokens_per_step
        self._say(
            events.Step(
                step=step,
                loss=loss,
                loss_hex=loss.hex(),
                lr=pending.rate,
                grad_norm=norm,
                tokens=tokens,
                seconds=seconds,
                world=pending.world,
            )
        )
        if not self._fabric.is_global_zero:
            return
        if self._log_step is None:  # the first step of a process pays for warming up, and is left out
            self._log_step, self._log_start = step, now
            return
        self._waits.append((seconds, waited))
        if step % self._config.log.every == 0 or step == self._config.steps:
            self._log(step, loss, norm, pending.rate, now, routing)

    def _log(
        self, step: int, loss: float, norm: float, rate: float, now: float, routing: events.Routing | None
    ) -> None:
        assert self._log_step is not None
        per_second = (step - self._log_step) * self._config.tokens_per_step / (now - self._log_start)
        peak = self.peak and self.peak * self._fabric.world_size
        mfu = flops.mfu(self._config.model, self._vocab, per_second, peak)
        self._log_step, self._log_start = step, now
        said = events.Throughput(step=step, tokens_per_s=per_second, mfu=mfu, memory_bytes=self._memory())
        said.watts, said.waiting = self._meter.watts(), self._waiting()
        self._send(said)
        numbers = {"train/loss": loss, "train/grad_norm": norm, "train/lr": rate, "perf/tokens_per_second": per_second}
        if routing is not None:
            numbers |= {"train/balance": routing.balance, "train/router_z": routing.router_z}
            for layer, chosen in enumerate(routing.experts):
                numbers[f"experts/busiest_in_training_of_layer_{layer}"] = max(chosen) / sum(chosen)
        self._fabric.log_dict(numbers | ({"perf/mfu": mfu} if mfu is not None else {}), step=step)

    def _waiting(self) -> list[float]:
        """By rank, of the last steps that as many ranks took: the share of their time that it waited for the sum."""
        last = len(self._waits[-1][1])
        seconds, waits = zip(*(wait for wait in self._waits if len(wait[1]) == last), strict=True)
        self._waits = []
        return [sum(of_rank) / sum(seconds) for of_rank in zip(*waits, strict=True)] if last > 1 else []

    def _memory(self) -> int:
        if self._on_gpu:
            return torch.cuda.max_memory_allocated(self._fabric.device)
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _digests(step: int, checksums: Tensor, virtual_ranks: int) -> events.Digests:
    """The checksums of a step, (2V + 2P,) int64, as hexadecimal digits."""
    words = list(map(word, checksums.tolist()))
    leaves, state = words[: 2 * virtual_ranks], words[2 * virtual_ranks :]
    half = len(state) // 2
    return events.Digests(
        step=step, tokens=leaves[::2], leaves=leaves[1::2], parameters=state[:half], gradient=state[half:]
    )


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """This device's matmul FLOP/s, measured: the upper quartile of a few products of 512 x 512 matrices.

    They run at the speed of products of 1024 x 1024, and where a machine is busy fewer of them are interrupted.
    """
    a, rates, end = torch.randn(512, 512, device=device).to(dtype), list[float](), time.perf_counter() + 0.1
    while len(rates) < 8 and (start := time.perf_counter()) < end:  # 20 ms, of every rank and every replacement
        torch.mm(a, a)
        rates.append(2 * 512**3 / (time.perf_counter() - start))
    return sorted(rates)[3 * len(rates) // 4]  # of one alone where a product takes long: bf16 on a CPU without it


def loggers(config: Train, folder: Path, epoch: int, member: int) -> list[Logger]:
    """Fabric's loggers, which rank 0 uses, whoever that is: until then they open nothing.

    Each start of a run, and each rank 0, writes a CSV of its own, since the logger overwrites what it finds.
    """
    found: list[Logger] = []
    for name in config.logger:
        if name == "tensorboard":
            found.append(TensorBoardLogger(folder, name="tensorboard", version=""))
        elif name == "csv":
            version = f"start-{epoch}" + (f"-rank-{member}" if member else "")
            found.append(CSVLogger(folder, name="csv", version=version))
        else:
            from lightning.pytorch.loggers import WandbLogger  # an extra; imported only where it is asked for

            found.append(WandbLogger(name=config.name, id=config.name, save_dir=folder, resume="allow"))
    return found


def peak(config: Train, fabric: Fabric, group: Group) -> tuple[float | None, str]:
    """Dense peak FLOP/s of a rank's device, their mean, and where the figure is from; None where one is unknown."""
    bf16 = config.precision == "bf16"
    mine: float | None
    if fabric.device.type == "cpu":
        group.barrier()  # all ranks measure at once, as they will compute
        mine, source = matmul_peak(fabric.device, torch.bfloat16 if bf16 else torch.float32), "measured matmul"
    else:
        name = torch.cuda.get_device_name(fabric.device)
        mine, source = hardware.peak_flops(name, config.precision), "datasheet"
    total = group.all_reduce(torch.tensor([mine if mine else float("nan")], dtype=torch.float64)).item()
    return (total / group.world, source) if total == total else (None, "unknown device")


def start(
    config: Train, vocab: int, step: int, world: int, numerics: dict[str, Any], peak: float | None, peak_source: str
) -> events.Start:
    """What a run says of itself when it begins, or goes on. `peak`: dense FLOP/s of a rank's device."""
    return events.Start(
        step=step,
        world=world,
        virtual_ranks=config.batch.virtual_ranks,
        micro_batch=int(config.batch.micro_batch),
        micro_batches=config.batch.micro_batches,
        device=str(numerics["device"]),
        peak_flops=peak and peak * world,
        peak_source=peak_source,
        precision=config.precision,
        compiled=config.compiles,
        parameters=flops.parameters(config.model, vocab),
        flops_per_token=flops.flops_per_token(config.model, vocab),
        memory_bytes=plan.memory(config, vocab).total,
        tokens_per_step=config.tokens_per_step,
        steps=config.steps,
        fingerprint=numerics,
        identity=plain_identity(config),
    )
