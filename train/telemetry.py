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
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from torch import Tensor

from train import events, flops
from train.buckets import Total
from train.config import Train
from train.evidence import word

LAG = 2  # steps between a number's making and its reading, on a GPU

Send = Callable[[events.Event], None]


class NotFinite(Exception):
    """The loss or the gradient is NaN or infinite: training on would write nonsense over the last good state."""


@dataclass(slots=True)
class _Pending:
    step: int
    rate: float
    numbers: Tensor  # (3 + W + 2V + 2P,) int64 – in pinned memory where they come from a GPU
    ready: torch.cuda.Event | None


class Recorder:
    """The numbers of a rank's steps, read when they have arrived."""

    def __init__(
        self,
        config: Train,
        fabric: Fabric,
        send: Send,
        vocab: int,
        peak: float | None,
        on_seconds: Callable[[int, list[float]], None] = lambda step, seconds: None,
    ) -> None:
        """`on_seconds` is told, on every rank at the same step, how long each rank took for a leaf."""
        self._config, self._fabric, self._send, self._on_seconds = config, fabric, send, on_seconds
        self._vocab, self._peak = vocab, peak
        self._on_gpu = fabric.device.type == "cuda"
        self._pending: deque[_Pending] = deque()
        self._speaks = fabric.is_global_zero
        self._step_end = self._log_start = time.perf_counter()
        self._log_step: int | None = None
        self._lag = LAG if self._on_gpu else 0
        self._stop_step: int | None = None  # the first step in which a rank was asked to stop

    def resume_clock(self) -> None:
        """Time spent outside steps (evaluation, saving) is not the next step's."""
        now = time.perf_counter()
        self._log_start += now - self._step_end
        self._step_end = now

    def step(self, step: int, total: Total, rate: float) -> bool:
        """Take the numbers of a committed step; returns whether the ranks have agreed to stop.

        They agree because all of them heed a step's flag the same number of steps later, whenever they read it.
        """
        floats = torch.cat([torch.stack([total.loss, total.norm, total.stops]), total.seconds])
        numbers = torch.cat([floats.view(torch.int64), total.leaves.view(-1), total.state.view(-1)])
        ready = None
        if self._on_gpu:
            pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            pinned.copy_(numbers, non_blocking=True)
            numbers, ready = pinned, torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        self._pending.append(_Pending(step, rate, numbers, ready))
        self._read(keep=self._lag)
        return self._stop_step is not None and step >= self._stop_step + self._lag

    def flush(self) -> None:
        """Read all that is under way: before a checkpoint, and at the end."""
        self._read(keep=0)

    def _read(self, keep: int) -> None:
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            if pending.ready is not None:
                pending.ready.synchronize()
            floats = 3 + self._fabric.world_size
            loss, norm, stops, *seconds = pending.numbers[:floats].view(torch.float64).tolist()
            if stops > 0 and self._stop_step is None:
                self._stop_step = pending.step
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NotFinite(f"loss {loss}, gradient norm {norm} in step {pending.step}: try a lower optimizer.lr")
            self._on_seconds(pending.step, seconds)
            self._record(pending, loss, norm)
            if self._config.evidence.digests and self._speaks:
                self._send(_digests(pending.step, pending.numbers[floats:], self._config.batch.virtual_ranks))

    def _record(self, pending: _Pending, loss: float, norm: float) -> None:
        if not self._speaks:
            return
        now = time.perf_counter()
        step, seconds = pending.step, now - self._step_end
        self._step_end = now
        tokens = step * self._config.tokens_per_step
        self._send(
            events.Step(
                step=step,
                loss=loss,
                loss_hex=loss.hex(),
                lr=pending.rate,
                grad_norm=norm,
                tokens=tokens,
                seconds=seconds,
                world=self._fabric.world_size,
            )
        )
        if self._log_step is None:  # the first step of a process pays for warming up, and is left out
            self._log_step, self._log_start = step, now
        elif step % self._config.log.every == 0 or step == self._config.steps:
            self._log(step, loss, norm, pending.rate, now)

    def _log(self, step: int, loss: float, norm: float, rate: float, now: float) -> None:
        assert self._log_step is not None
        per_second = (step - self._log_step) * self._config.tokens_per_step / (now - self._log_start)
        mfu = flops.mfu(self._config.model, self._vocab, per_second, self._peak)
        self._log_step, self._log_start = step, now
        self._send(events.Throughput(step=step, tokens_per_s=per_second, mfu=mfu, memory_bytes=self._memory()))
        numbers = {"train/loss": loss, "train/grad_norm": norm, "train/lr": rate, "perf/tokens_per_second": per_second}
        self._fabric.log_dict(numbers | ({"perf/mfu": mfu} if mfu is not None else {}), step=step)

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
    """This device's matmul FLOP/s, measured: the upper quartile of a few products of 1024 x 1024 matrices."""
    a = torch.randn(1024, 1024, device=device).to(dtype)
    rates = []
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(a, a)
        rates.append(2 * 1024**3 / (time.perf_counter() - start))
    return statistics.quantiles(rates, n=4)[2]
