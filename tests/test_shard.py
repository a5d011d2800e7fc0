"""sharding=full: parameters in parts, gathered when they are used; the bits of a rank that holds everything."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import dist
from train import engine, optim
from train.config import Batch, Evidence, Optimizer, OptimizerKind, Reduce, ReduceMode, Sharding
from train.group import Group
from train.models.build import build
from train.ranks import Ranks
from train.shapes import Llama
from train.shard import ShardedFlat

VOCAB = 97


def train(group: Group, sharding: str, virtual_ranks: int = 8, micro_batches: int = 2, **more: Any) -> dict[str, Any]:
    """Four steps of a two-layer model with dropout; losses, norms, checksums and the parameters' digest."""
    config = configuration(sharding, virtual_ranks, micro_batches, **more)
    model = build(config.model, VOCAB, seed=1, device=torch.device("cpu"))
    flat, reducer = engine.laid_out(config, Ranks.default(), model)
    optimizer = optim.build(config.optimizer, flat, Ranks.default())
    record, resident = [], []
    for step in range(4):
        for v, buffer in reducer.leaves():
            for i in range(micro_batches):
                generator = torch.Generator().manual_seed(1000 * step + 10 * v + i)
                tokens = torch.randint(VOCAB, (2, 17), generator=generator)
                torch.manual_seed(1000 * step + 10 * v + i)
                loss = model(tokens[:, :-1], tokens[:, 1:]) / 512
                loss.backward()
                buffer.loss += loss.detach()
            if isinstance(flat, ShardedFlat):
                resident += [
                    unit.resident for unit, (layer, _, _) in zip(flat._units, flat.sections, strict=True) if layer
                ]
        total = reducer.finish()
        flat.step(optimizer.step, total.gradient, total.norm, 1.0)
        reducer.spread()
        record.append([float(total.loss).hex(), float(total.norm).hex(), total.leaves.tolist(), total.state.tolist()])
    held = sum(piece.data.numel() for piece in [*flat.pieces(), *optim.pieces(optimizer, flat)])
    with flat.gathered():
        named = sorted(
            (name, parameter.detach().clone().numpy().tobytes()) for name, parameter in model.named_parameters()
        )
        digest = hashlib.sha256(repr(named).encode()).hexdigest()
    return {"record": record, "digest": digest, "held": held, "resident": any(resident)}


def train_in_turn(group: Group, shardings: list[str], **more: Any) -> dict[str, dict[str, Any]]:
    return {sharding: train(group, sharding, **more) for sharding in shardings}


def configuration(
    sharding: str, virtual_ranks: int, micro_batches: int, dtype: str = "fp32", kind: str = "adamw"
) -> Any:
    """What `engine.laid_out` and `optim.build` read of a run's configuration."""
    return SimpleNamespace(
        model=Llama(layers=2, width=24, heads=2, kv_heads=1, ffn=40, context=16, dropout=0.1, tied=False),
        optimizer=Optimizer(kind=OptimizerKind[kind], lr=0.01),
        reduce=Reduce(mode=ReduceMode.exact, dtype=dtype, bucket_mib=0.02),
        sharding=Sharding[sharding],
        most_nodes=1,
        evidence=Evidence(),
        batch=Batch(sequences=2 * virtual_ranks * micro_batches, virtual_ranks=virtual_ranks, micro_batch=2),
    )


@pytest.mark.parametrize(("virtual_ranks", "dtype", "worlds"), [(8, "fp32", [3, 4]), (6, "bf16", [4, 6])])
def test_no_way_of_sharding_has_a_say_in_the_bits(virtual_ranks: int, dtype: str, worlds: list[int]) -> None:
    """W that divides V and not, one leaf a rank and many, two micro-batches a leaf; evidence included."""
    more = {"virtual_ranks": virtual_ranks, "dtype": dtype}
    (whole,) = dist.run("tests.test_shard:train", 1, sharding="none", **more)
    for world in worlds:
        for results in dist.run("tests.test_shard:train_in_turn", world, shardings=["optimizer", "full"], **more):
            for sharding, result in results.items():
                assert result["record"] == whole["record"], (world, sharding)
                assert result["digest"] == whole["digest"], (world, sharding)
                assert not result["resident"], "a layer was not released"


def test_a_rank_holds_its_part_only() -> None:
    """Parameters and moments together: three thirds of everything with full, one and two thirds with optimizer."""
    kinds = ["none", "optimizer", "full"]
    results = dist.run("tests.test_shard:train_in_turn", 3, shardings=kinds)
    held = {sharding: sum(result[sharding]["held"] for result in results) for sharding in kinds}
    assert held["full"] * 3 == held["none"]
    assert held["optimizer"] * 9 == held["none"] * 5
