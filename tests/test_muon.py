"""Muon: which matrices are its own, its steps against torch's in a plain loop, and the same bits on any ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests import dist
from tests.test_shard import VOCAB, configuration
from tests.test_train import sha256, summary, train
from train import engine, events, muon, optim
from train.config import Optimizer, OptimizerKind
from train.flat import Flat
from train.group import Group
from train.models.build import build
from train.muon import hidden
from train.ranks import Ranks
from train.shapes import GPT2, Grok, Llama

SHAPES = {
    "gpt2": GPT2(layers=2, width=24, heads=2, ffn=40, context=16),
    "llama": Llama(layers=2, width=24, heads=4, kv_heads=2, ffn=40, context=16, tied=False),
    "grok": Grok(layers=2, width=24, heads=2, kv_heads=1, head_size=8, experts=3, chosen=2, context=16),
}
CPU = torch.device("cpu")
CONFIG = Optimizer(kind=OptimizerKind.muon, lr=0.01, weight_decay=0.05, clip_norm=0)


def cut_by_hand(model: nn.Module, shape: Any) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Muon's matrices, each a view with the gradient that lies there; AdamW's with decay; AdamW's without."""
    matrices: list[Any] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not name.startswith("blocks.") or parameter.dim() < 2 or name.endswith("router.weight"):
            (decayed if parameter.dim() >= 2 else plain).append(parameter)
            continue
        kv = getattr(shape, "kv_heads", shape.heads)
        size = parameter.size(0) // (shape.heads + 2 * kv)
        for tensor in (parameter.data, parameter.grad):
            assert tensor is not None
            if name.endswith("qkv.weight"):
                matrices.append(tensor.split([shape.heads * size, kv * size, kv * size]))  # type: ignore[no-untyped-call]
            else:
                matrices.append(tensor.unbind() if tensor.dim() == 3 else (tensor,))
    muons = []
    for values, gradients in zip(matrices[::2], matrices[1::2], strict=True):
        for value, gradient in zip(values, gradients, strict=True):
            muons.append(nn.Parameter(value))
            muons[-1].grad = gradient
    return muons, decayed, plain


@pytest.mark.parametrize("family", SHAPES)
def test_four_steps_equal_torchs_own_muon_on_each_matrix_and_adamw(family: str) -> None:
    """Given the same gradients: Muon's matrices bitwise, AdamW's to 1e-5, as its fused kernel rounds otherwise."""
    ours, theirs = (build(SHAPES[family], 61, seed=1, device=torch.device("cpu")) for _ in range(2))
    flat = Flat(ours, 8)
    optimizer = optim.build(CONFIG, flat)
    buffer = flat.buffer()
    for parameter in theirs.parameters():
        parameter.grad = torch.zeros_like(parameter)
    matrices, decayed, plain = cut_by_hand(theirs, SHAPES[family])
    theirs_muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05, momentum=0.95)
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        flat.attach(buffer)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            b.grad.normal_(generator=generator)
            a.grad.copy_(b.grad)
        rate = 0.01 / (1 + step)  # Muon's goes with it
        optim.set_learning_rate(optimizer, rate)
        flat.step(optimizer.step, buffer.tensor, torch.ones(()), max_norm=0)
        optim.set_learning_rate(theirs_muon, 2 * rate)
        optim.set_learning_rate(adamw, rate)
        theirs_muon.step()  # type: ignore[no-untyped-call]
        adamw.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if hidden(name, a.dim()):
            assert torch.equal(a, b), name
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_who_steps_what() -> None:
    names = {name for name, p in build(SHAPES["grok"], 61, seed=1, device=torch.device("meta")).named_parameters()
             if hidden(name, p.dim())}  # fmt: skip
    assert {name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")} == {
        *("attention.qkv.weight", "attention.out.weight", "experts.gate", "experts.up", "experts.down")
    }
    assert all(name.startswith("blocks.") for name in names)


def test_the_state_is_covered_once_by_pieces_and_by_the_checksum() -> None:
    model = build(SHAPES["grok"], 61, seed=1, device=torch.device("cpu"))
    flat = Flat(model, 8)
    optimizer = optim.build(CONFIG, flat)
    flat.step(optimizer.step, torch.ones(flat.length), torch.ones(()), max_norm=0)
    pieces = optim.pieces(optimizer, flat)
    expected = {
        f"{moment}.{name}": p.shape
        for name, p in model.named_parameters()
        for moment in (("momentum_buffer",) if hidden(name, p.dim()) else ("exp_avg", "exp_avg_sq"))
    }
    assert {piece.name: piece.shape for piece in pieces} == expected
    assert len(pieces) == len(expected)
    assert all(piece.replicated and piece.data.numel() == piece.shape.numel() for piece in pieces)
    stored = optim.Stored(optimizer, flat)
    for piece in pieces:
        before = stored.checksum()
        piece.data[-1:].view(torch.int32).bitwise_xor_(1)
        assert stored.checksum() != before, piece.name
    optim.set_step(optimizer, 7)


@pytest.mark.parametrize(("virtual_ranks", "dtype"), [(8, "fp32"), (6, "bf16")])
def test_the_result_does_not_depend_on_ranks_or_sharding(virtual_ranks: int, dtype: str) -> None:
    """Ranks that divide V and not; chunks of 5 KiB, smaller than a matrix and larger."""
    more = {"virtual_ranks": virtual_ranks, "dtype": dtype}
    (whole,) = dist.run("tests.test_shard:train", 1, kind="muon", sharding="none", **more)
    for world, kinds in ((2, ["none", "optimizer", "full"]), (3, ["optimizer", "full"])):
        found = dist.run("tests.test_shard:train_in_turn", world, kind="muon", shardings=kinds, **more)
        for sharding in kinds:
            results = [of_rank[sharding] for of_rank in found]
            assert all(result["record"] == whole["record"] for result in results), (world, sharding)
            assert all(result["digest"] == whole["digest"] for result in results), (world, sharding)
            held = sum(result["held"] for result in results)
            assert held == whole["held"] if sharding == "full" else held < world * whole["held"] or sharding == "none"
    (adamw,) = dist.run("tests.test_shard:train", 1, sharding="none", **more)
    assert adamw["digest"] != whole["digest"]


def traffic(group: Group) -> dict[str, int]:
    """Matrices that this rank orthogonalised in a step with sharded moments, the elements of all of them, and sent."""
    config = configuration("optimizer", 8, 2, kind="muon")
    flat, _ = engine.laid_out(config, Ranks.default(), build(config.model, VOCAB, seed=1, device=CPU))
    ranks, seen, sent = Ranks.default(), [], []
    exchange, orthogonal = ranks.exchange, muon.orthogonal
    ranks.exchange = lambda *given: sent.append(given[1].numel() * given[1].element_size()) or exchange(*given)  # type: ignore[method-assign, func-returns-value]
    optimizer = optim.build(config.optimizer, flat, ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "orthogonal", lambda x: seen.append(x.numel()) or orthogonal(x))  # type: ignore[func-returns-value]
        flat.step(optimizer.step, torch.ones(flat.length), torch.ones(()), 0)
    total = sum(rows * columns for _, rows, columns in muon.matrices(flat))
    return {"matrices": len(seen), "mine": sum(seen), "all": total, "sent": sum(sent)}


def test_a_matrix_is_orthogonalised_once_and_its_work_is_shared() -> None:
    results = dist.run("tests.test_muon:traffic", 3)
    (whole,) = {result["all"] for result in results}
    assert sum(result["matrices"] for result in results) == 2 * (3 + 1 + 3)  # q, k, v, out, gate, up, down
    assert sum(result["mine"] for result in results) == whole
    assert max(result["mine"] for result in results) < 0.5 * whole
    assert sum(result["sent"] for result in results) == 2 * 2 * whole  # bf16, there and back


def test_a_run_goes_on_to_the_same_bits(tiny: list[str]) -> None:
    """Experts, bf16: six steps on one rank; on two, then one on three with all sharded, then on three, one is lost."""
    tiny = [one for one in tiny if not one.startswith(("model=", "model.ffn", "model.tied"))]
    tiny += ["model=grok_micro", "model.head_size=16", "model.experts=3", "precision=bf16"]
    tiny += ["optimizer=muon", "schedule=constant", "eval.every=0", "checkpoint.every=0"]
    whole = sha256(tiny, "name=one", "devices=1")
    assert sha256(tiny, "name=cut", "devices=2", "steps=3", "sharding=optimizer") != whole
    assert sha256(tiny, "name=cut", "devices=3", "steps=4", "sharding=full", "resume.allow=steps") != whole
    code, folder = train(tiny, "name=cut", "devices=3", "resume.allow=steps", "faults.at=[kill:1@commit:4]")
    assert code == 0
    assert summary(folder)["state_sha256"] == whole
    handed_over = [one for one in events.read(folder / "events.jsonl") if one["kind"] == "regroup"]
    assert [one["step"] for one in handed_over][:1] == [5]
