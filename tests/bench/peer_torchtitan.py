"""torchtitan's Trainer among the contestants, in the llama family: it has no GPT-2.

The trainer is built from a configuration as `torchtitan.train` builds its own. What is ours is what its configurations
let one bring along: a llama of our shape made of its parts, with rotary pairs that are the two halves of a head
(`CosSinRoPE`); our initial weights; a data loader; and a metrics processor, where a step's loss goes and a turn ends.
Gradients are reduced by `fully_shard`, which it applies to a single rank, too; two have all weights each. Nothing is
recomputed. On a GPU its attention is flex, as in its own models, masked by documents, each sequence being one, and
CUDA graphs are on.

On a CPU (`on_cpu`, before it is imported) it is told that its device is "cpu": it takes torch's accelerator, or else
"cuda". Its kernels for experts on several GPUs want triton, and are not there; memory is not watched; timeouts stay as
they are made, since to shorten them it asks for a device's number. Attention is `scaled_dot_product_attention`, which
it keeps for models without masks: flex has no backward pass on a CPU, and varlen no kernel.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Replicate, distribute_tensor

from tests.bench.work import Job, Turns, count, renamed

GPU = torch.cuda.is_available()


def on_cpu() -> None:
    torch._utils._get_available_device_type = lambda: "cpu"  # type: ignore
    if not find_spec("triton"):
        sys.modules["torchtitan.distributed.minimal_async_ep.kernels"] = MagicMock()
    from torchtitan.components import metrics
    from torchtitan.distributed import utils

    nothing = SimpleNamespace(max_reserved_gib=0.0, max_reserved_pct=0.0)
    memory = SimpleNamespace(device_name="cpu", get_peak_stats=lambda: nothing, reset_peak_stats=lambda: None)
    metrics.build_device_memory_monitor = lambda: memory
    utils.set_pg_timeouts = lambda **_: None


if not GPU:
    on_cpu()

from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

NAMES = {
    "embedding.": "tok_embeddings.",
    "head.": "lm_head.",
    "blocks.": "layers.",
    ".attention.out.": ".attention.wo.",
    ".ffn.gate.": ".feed_forward.w1.",
    ".ffn.up.": ".feed_forward.w3.",
    ".ffn.down.": ".feed_forward.w2.",
}
LATER = {"weight": torch.nn.init.zeros_}  # ours replace them


def named(job: Job) -> dict[str, Tensor]:
    """Our initial weights under the names of its checkpoints, where query, key and value are three."""
    shape: Any = job.config.model
    head = shape.width // shape.heads
    theirs: dict[str, Tensor] = {}
    for ours, weight in job.weights().items():
        name = renamed(ours, NAMES)
        if ".qkv." in name:
            parts = torch.split(weight.detach(), [shape.width, head * shape.kv_heads, head * shape.kv_heads])
            theirs |= {name.replace(".qkv.", f".qkv_linear.w{part}."): w for part, w in zip("qkv", parts, strict=True)}
        else:
            theirs[name] = weight.detach()
    if shape.tied:
        theirs["lm_head.weight"] = theirs["tok_embeddings.weight"]
    return theirs


class Rows(BaseDataLoader):  # type: ignore[misc]
    """A rank's micro-batches, of consecutive rows."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):  # type: ignore[misc]
        job: Job

    def __init__(self, config: Config, **_: Any) -> None:
        self.job = config.job

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        job, rows = self.job, self.job.read()
        positions = torch.arange(job.config.model.context).expand(job.piece, -1)
        for at in range(job.rank * job.piece, len(rows), job.world * job.piece):
            tokens = torch.from_numpy(rows[at : at + job.piece].astype(np.int64))
            yield {"input": tokens[:, :-1], **({"positions": positions} if GPU else {})}, tokens[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is saved."""


class NoTokenizer(BaseTokenizer):  # type: ignore[misc]
    """Tokens are there."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):  # type: ignore[misc]
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    encode = decode = get_vocab_size = None


class Ended(MetricsProcessor):  # type: ignore[misc]
    """Where a step's loss goes."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):  # type: ignore[misc]
        turns: Turns

    def log(self, step: int, global_avg_loss: float, *_: Any, **__: Any) -> None:
        self.config.turns.ended(global_avg_loss)


def torchtitan(job: Job, turns: Turns) -> None:
    """Trains for ever. Where nobody has said which rank this is, it is the only one."""
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job.port}
    for key, value in alone.items():
        os.environ.setdefault(key, str(value))
    trainer = trainer_of(job, turns)
    (model,) = trainer.model_parts
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum that multiplies on its way
    mesh = next(model.parameters()).device_mesh
    model.load_state_dict({n: distribute_tensor(w, mesh, [Replicate()] * mesh.ndim) for n, w in named(job).items()})
    turns.begin(count(model))
    trainer.train()


def trainer_of(job: Job, turns: Turns) -> Any:
    config, o = job.config, job.config.optimizer
    numbers = {"lr": o.lr, "betas": (o.beta1, o.beta2), "eps": o.eps}
    decays = {"norm": 0.0, "": o.weight_decay}  # by the first pattern that is found in a parameter's name
    spec = ModelSpec(
        name="llama3",
        flavor="of our shape",
        model=model_of(job),
        parallelize_fn=parallelize_llama,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )
    groups = [
        ParamGroupConfig(pattern=name, optimizer_name="AdamW", optimizer_kwargs={**numbers, "weight_decay": decay})
        for name, decay in decays.items()
    ]
    training = TrainingConfig(
        local_batch_size=job.piece,
        global_batch_size=config.batch.sequences,
        seq_len=config.model.context,
        max_norm=o.clip_norm,
        steps=10**6,
        mixed_precision_param="bfloat16" if config.precision == "bf16" else "float32",
        disable_cuda_graphs=not GPU,
    )
    return Trainer.Config(
        model_spec=spec,
        dump_folder=job.folder,
        tokenizer=NoTokenizer.Config(),
        dataloader=Rows.Config(job=job),
        metrics=Ended.Config(turns=turns, log_freq=1),
        loss=CrossEntropyLoss.Config(global_vocab_size=job.vocab),
        optimizer=OptimizersContainer.Config(param_groups=groups),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0),
        training=training,
        parallelism=ParallelismConfig(
            data_parallel_replicate_degree=job.world, data_parallel_shard_degree=1, spmd_backend="partial_dtensor"
        ),
        activation_checkpoint=None,
        compile=CompileConfig(enable=job.compiled),
    ).build()


def model_of(job: Job) -> Any:
    """Llama's architecture in its words."""
    shape: Any = job.config.model
    norm = RMSNorm.Config(normalized_shape=shape.width, eps=shape.norm_eps, param_init=LATER)
    rope = CosSinRoPE.Config(dim=shape.width // shape.heads, max_seq_len=shape.context, theta=shape.rope_base)

    def block() -> Any:
        attention = make_gqa_config(
            dim=shape.width,
            n_heads=shape.heads,
            n_kv_heads=shape.kv_heads,
            wqkv_param_init=LATER,
            wo_param_init=LATER,
            inner_attention=FlexAttention.Config() if GPU else ScaledDotProductAttention.Config(),
            fuse_qkv=True,
            rope=rope,
        )
        ffn = make_ffn_config(dim=shape.width, hidden_dim=shape.ffn, w1_param_init=LATER, w2w3_param_init=LATER)
        return Llama3TransformerBlock.Config(attention_norm=norm, ffn_norm=norm, attention=attention, feed_forward=ffn)

    return Llama3Model.Config(
        dim=shape.width,
        vocab_size=job.vocab,
        tok_embeddings=Embedding.Config(num_embeddings=job.vocab, embedding_dim=shape.width, param_init=LATER),
        norm=norm,
        lm_head=Linear.Config(in_features=shape.width, out_features=job.vocab, param_init=LATER),
        layers=[block() for _ in range(shape.layers)],
        enable_weight_tying=shape.tied,
    )
