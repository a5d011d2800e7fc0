"""Everything that computes a step, put together: in a rank of a run, and in a process by itself that computes it again.

There is this one place, so that a step is computed again by the very code and the very settings that computed it first.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from torch import Tensor, nn
from torch._functorch import config as functorch
from tqdm import tqdm

from train import optim
from train.buckets import Reducer, bucket_elements
from train.config import ReduceMode, Sharding, Train
from train.data.prepare import Prepared, cache_folder
from train.data.stream import Stream
from train.evidence import Evidence
from train.fast import FastReducer
from train.flat import Flat
from train.group import Group
from train.hierarchy import HostsFirstReducer
from train.loop import Due, Parts, TrainState
from train.models import hf
from train.models.build import build
from train.models.language import LanguageModel
from train.ranks import Ranks
from train.reduce import ExactReducer
from train.shard import RoundReducer, ShardedFlat
from train.telemetry import Recorder


@dataclass(frozen=True, slots=True)
class Engine:
    config: Train
    prepared: Prepared
    group: Group
    fabric: Fabric
    model: LanguageModel  # not compiled
    reducer: Reducer
    state: TrainState  # as `seed` initialises it, at step 0, until a checkpoint is brought into it

    @classmethod
    def build(
        cls, config: Train, prepared: Prepared, group: Group, threads: int, loggers: Sequence[Logger] = ()
    ) -> Engine:
        """`threads` of this process, on a CPU. With `sharding=full` the group must have been joined."""
        _numerics(config, group.root_device, threads)
        fabric = Fabric(accelerator=config.accelerator, devices=1, strategy=group, loggers=list(loggers))
        model = build(
            config.model, prepared.vocab, seed=config.seed, device=fabric.device, separator=prepared.separator
        )
        hf.begin(model)
        flat, reducer = laid_out(config, group, model)
        state = TrainState(step=0, flat=flat, optimizer=optim.build(config.optimizer, flat, group))
        return cls(config, prepared, group, fabric, model, reducer, state)

    def parts(
        self,
        recorder: Recorder,
        phase: Callable[[str, int], None] = lambda name, step: None,
        asked: Callable[[], tuple[bool, bool]] = lambda: (False, False),
        due: tuple[Due, ...] = (),
    ) -> Parts:
        """What a step is made of, and who watches it."""
        config = self.config
        return Parts(
            config=config,
            fabric=self.fabric,
            model=compiled(self.model, cache_folder(config.data), config.compile) if config.compiles else self.model,
            aside=self.model.aside,
            stream=Stream.of(config, self.prepared),
            generator=_generator(self.fabric.device),
            reducer=self.reducer,
            recorder=recorder,
            phase=phase,
            asked=asked,
            due=due,
        )


def compiled(model: LanguageModel, cache: Path, how: bool | str = True) -> Callable[..., Tensor]:
    """`model`, compiled at its first micro-batch. Code and graphs are kept in `cache` for other processes and runs."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # the compiler: seconds, for who compiles

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():  # torch itself sets that
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "compiled")
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # tells the compiler, too
    functorch.autograd_cache_allow_custom_autograd_functions = True  # traced, they are in a graph's key
    mode = "reduce-overhead" if how == "graphs" else None  # CUDA graphs, which overwrite what their last replay gave
    tqdm.set_lock(threading.RLock())  # for torch's bars; tqdm's own is a semaphore, which ranks that end leave behind
    return torch.compile(model, fullgraph=True, dynamic=False, mode=mode)  # type: ignore[return-value]


def laid_out(config: Train, ranks: Ranks, model: nn.Module) -> tuple[Flat, Reducer]:
    """The parameters' layout and the reducer that a run's configuration asks for."""
    size = int(config.reduce.bucket_mib * 2**20)
    flat: Flat
    exact = HostsFirstReducer if config.reduce.hosts_first and config.most_nodes > 1 else ExactReducer
    kind: type[Reducer] = FastReducer if config.reduce.mode is ReduceMode.fast else exact
    if config.sharding is Sharding.full and ranks.world > 1:
        flat, kind = ShardedFlat(model, ranks, bucket_elements(size, ranks.world)), RoundReducer
    else:
        flat = Flat(model, config.batch.virtual_ranks)
    reducer = kind(
        ranks,
        flat,
        config.batch.virtual_ranks,
        config.batch.micro_batches,
        bucket_bytes=size,
        dtype=torch.bfloat16 if config.reduce.dtype == "bf16" else torch.float32,
        sharded=config.sharding is Sharding.optimizer,
        evidence=Evidence(flat, config.evidence.parameters) if config.evidence.digests else None,
    )
    return flat, reducer


def _numerics(config: Train, device: torch.device, threads: int) -> None:
    """Fix what the bits depend on: threads on a CPU, deterministic kernels where the law is promised."""
    if device.type == "cpu":
        torch.set_num_threads(threads)
        if "CS_GNU_LIBC_VERSION" in os.confstr_names:  # what is freed stays ours: page faults were 3 % of a step
            ctypes.CDLL(None).mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: smaller blocks are of the heap; its maximum
            ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: how much may lie free at the heap's end
    else:
        torch.cuda.set_device(device)
    exact = config.reduce.mode is ReduceMode.exact
    if exact:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before the first cuBLAS call; torch demands it
    torch.set_deterministic_debug_mode("error" if exact else "default")
    torch.utils.deterministic.fill_uninitialized_memory = not exact  # type: ignore[attr-defined]  # it writes twice


def _generator(device: torch.device) -> torch.Generator:
    """The default generator of a device. `torch.manual_seed` would seed all of them, 1 ms a call without a GPU."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator
