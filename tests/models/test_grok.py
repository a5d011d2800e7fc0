"""Grok against the published code's golden logits, and against the same formulas written out densely."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models import grok_reference as reference
from train import cli, compose
from train.checks import Refused
from train.flat import Flat
from train.flops import active_parameters, parameters
from train.models.build import build
from train.models.experts import Experts, grouped, in_turn, watched
from train.models.grok import Block
from train.models.hf import to_hf
from train.models.layers import with_auxiliary
from train.models.xai import load_npz, shape_of
from train.shapes import Grok

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent.parent / "golden" / "grok_a.npz"  # origin: tests/golden/README.md

A: dict[str, Any] = {"vocab": 100, "d": 24, "hd": 8, "hq": 4, "hkv": 2, "L": 2, "wide": 4, "k": 2}
A |= {"emb_mult": 4.9, "out_mult": 0.58, "attn_mult": 0.35}
CONFIGS = {
    "two of eight": A,
    "all experts, one layer, one key head": {**A, "k": 8, "L": 1, "hkv": 1},
    "one expert, three layers, a head for each key": {**A, "k": 1, "L": 3, "hkv": 4, "vocab": 64},
    "heads wider than the model, odd widening": {**A, "hd": 12, "wide": 2.7, "k": 3, "attn_mult": 9.0},
    "large scores, which the cap is for": {**A, "attn_mult": 4.0, "emb_mult": 1.0, "out_mult": 0.3},
}


def published(config: dict[str, Any], experts: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the published names, in float64: gains near 1, so that an exchanged one shows."""
    generator = torch.Generator().manual_seed(seed)
    model = build(shape_of(config, context=20, experts=experts), config["vocab"], seed=0, device=CPU)
    names = to_hf(model.shape, config["vocab"], model.state_dict())
    result = {}
    for name, tensor in names.items():
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        result[name] = 1 + 0.2 * drawn if tensor.dim() < 2 else drawn * tensor.size(-2) ** -0.5
    result["language_model/in_out_embed/embeddings"] *= config["vocab"] ** 0.5 * config["d"] ** -0.5
    return result


def write(path: Path, config: dict[str, Any], weights: dict[str, Tensor], tokens: Tensor, logits: Tensor) -> None:
    arrays = {f"w:{name}": tensor.numpy() for name, tensor in weights.items()}
    np.savez(path, tokens=tokens.numpy(), logits=logits.numpy(), config=np.array(json.dumps(config)), **arrays)  # type: ignore[arg-type]


def drawn(config: dict[str, Any], length: int = 20) -> Tensor:
    return torch.randint(0, config["vocab"], (2, length), generator=torch.Generator().manual_seed(5))


def test_logits_are_those_of_the_published_code() -> None:
    golden = load_npz(GOLDEN)
    assert golden.logits.shape == (2, 24, 96)
    with torch.no_grad():
        distance = (golden.model(golden.tokens) - golden.logits).abs().max()
        print(f"\n| grok, absolute | {distance:.1e} |")
        assert distance <= 1e-5
        cache = golden.model.cache(2)
        for start, end in ((0, 20), (20, 21), (21, 24)):  # and so do those of generation
            last = golden.model.step(golden.tokens[:, start:end], cache)
            assert (last - golden.logits[:, end - 1]).abs().max() <= 1e-5


def test_the_reference_agrees_with_the_published_code() -> None:
    """So what the reference says of other shapes, and of gradients, can be believed."""
    with np.load(GOLDEN) as file:
        weights = {k[2:]: torch.from_numpy(file[k]).double() for k in file.files if k.startswith("w:")}
        config, tokens = json.loads(str(file["config"])), torch.from_numpy(file["tokens"])
        logits = torch.from_numpy(file["logits"])
    assert (reference.answer(config, weights, tokens).logits - logits).abs().max() <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_other_shapes_are_loaded_and_agree(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    weights, tokens = published(config), drawn(config)
    expected = reference.answer(config, weights, tokens).logits
    write(tmp_path / "a.npz", config, weights, tokens, expected)
    golden = load_npz(tmp_path / "a.npz")
    with torch.no_grad():
        # fp32 against float64, logits of size 1 to 3
        assert (golden.model(golden.tokens) - expected).abs().max() <= 1e-5


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    weights, tokens = published(A), drawn(A)
    logits = torch.zeros(2, 20, 100)
    less = {k: v for k, v in weights.items() if k != "transformer/decoder_layer_1/moe/linear_v/w"}
    write(tmp_path / "less.npz", A, less, tokens, logits)
    with pytest.raises(Refused, match="decoder_layer_1/moe/linear_v/w is missing"):
        load_npz(tmp_path / "less.npz")
    write(tmp_path / "wide.npz", {**A, "wide": 8}, weights, tokens, logits)
    with pytest.raises(Refused, match=r"blocks\.0\.experts\..*the configuration"):
        load_npz(tmp_path / "wide.npz")
    write(tmp_path / "none.npz", {k: v for k, v in A.items() if k != "hkv"}, weights, tokens, logits)
    with pytest.raises(Refused, match="hkv"):
        load_npz(tmp_path / "none.npz")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_cross_entropy_and_its_gradient_that_of_all_losses(name: str) -> None:
    """In float64 against autograd through the dense formulas, which share no code with ours."""
    config = CONFIGS[name]
    weights, tokens = published(config), drawn(config, 21)
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    shape = shape_of(config, context=20, experts=8)
    shape.balance, shape.router_z = 0.3, 0.07
    model = build(shape, config["vocab"], seed=0, device=CPU).double()
    model.get_buffer("rotary").copy_(torch.stack(reference.rotation(20, config["hd"])))
    names = to_hf(shape, config["vocab"], dict(model.named_parameters()))
    with torch.no_grad():
        for key, parameter in names.items():
            parameter.copy_(weights[key])
            weights[key].requires_grad_()
    found = reference.answer(config, weights, tokens)
    nats = F.cross_entropy(found.logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.autograd.backward(nats + tokens.numel() * (0.3 * found.balance + 0.07 * found.z))
    with watched(model) as routings:
        loss = model(tokens, targets)
    loss.backward()
    torch.testing.assert_close(loss, nats, rtol=1e-12, atol=0)
    assert torch.equal(torch.stack([routing.counts_E for routing in routings]), found.counts)
    torch.testing.assert_close(sum(routing.balance for routing in routings), found.balance)
    torch.testing.assert_close(sum(routing.z for routing in routings), found.z)
    ours = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for key, gradient in to_hf(shape, config["vocab"], ours).items():
        torch.testing.assert_close(gradient, weights[key].grad, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_gradients_of_the_experts_are_finite_differences(chosen: int) -> None:
    torch.manual_seed(0)
    experts = Experts(4, 3, 4, chosen).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def losses(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, routing = experts(x)
        return y, routing.balance, routing.z

    assert torch.autograd.gradcheck(losses, (x, *experts.parameters()))


def test_the_gradient_of_a_whole_model_is_finite_differences() -> None:
    shape = Grok(context=8, layers=2, width=8, heads=2, kv_heads=1, head_size=4, experts=3, widening=1.5)
    model = build(shape, 64, seed=3, device=CPU).double()
    tokens, targets = torch.randint(0, 64, (2, 2, 8), generator=torch.Generator().manual_seed(1))

    def losses() -> Tensor:
        with watched(model) as routings:
            nats = model(tokens, targets)
        auxiliary = sum(shape.balance * routing.balance + shape.router_z * routing.z for routing in routings)
        return nats.detach() + tokens.numel() * auxiliary  # type: ignore[no-any-return]

    model(tokens, targets).backward()
    generator, step = torch.Generator().manual_seed(2), 1e-6
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        assert parameter.grad is not None
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = losses()
            parameter.sub_(direction, alpha=2 * step)
            below = losses()
            parameter.add_(direction, alpha=step)
        slope = (above - below) / (2 * step)
        # a loss of 70 nats to 15 digits, over 2e-6: 1e-8, and the third derivative times 1e-12
        torch.testing.assert_close((parameter.grad * direction).sum(), slope, rtol=1e-6, atol=1e-7)
        assert parameter.grad.any(), name


def test_an_expert_that_nobody_chose_has_a_gradient_of_zeros() -> None:
    experts = Experts(8, 16, 4, 1)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        experts.router.weight[2] = 100 * torch.ones(8)
    y, routing = experts(torch.rand(2, 50, 8))  # nothing below 0: all tokens choose the third
    assert routing.counts_E.tolist() == [0, 0, 100, 0]
    torch.autograd.backward(y.sum())
    for weight in (experts.gate, experts.up, experts.down):
        assert weight.grad is not None
        assert [bool(one.any()) for one in weight.grad] == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_are_the_experts_in_turn(dtype: torch.dtype) -> None:
    """What a GPU computes, by torch's own form of it for a CPU; an idle expert included."""
    torch.manual_seed(0)
    counts = [5, 0, 11, 8]
    rows = torch.randn(24, 16, dtype=dtype)
    weights = [torch.randn(shape, dtype=dtype) / 4 for shape in ((4, 24, 16), (4, 24, 16), (4, 16, 24))]
    upstream = torch.randn(24, 16, dtype=dtype)
    results = []
    for group in (False, True):
        inputs = [tensor.clone().requires_grad_() for tensor in (rows, *weights)]
        x, *matrices = inputs
        y = grouped(x, torch.tensor(counts), *matrices) if group else in_turn(x, counts, *matrices)
        torch.autograd.backward(y, upstream)
        results.append([y, *(tensor.grad for tensor in inputs)])
    for one, other in zip(*results, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)


@pytest.mark.parametrize("again", ["none", "full"])
def test_what_a_step_tells_of_its_routers_is_what_hooks_on_them_see(again: str) -> None:
    """Of two micro-batches; layers that are computed again in the backward pass are counted once."""
    shape = Grok(layers=2, width=24, heads=2, kv_heads=1, head_size=8, experts=3, context=16)
    model = build(replace(shape, checkpoint_activations=again), 61, seed=1, device=CPU)
    flat = Flat(model)
    buffer = flat.buffer()
    flat.attach(buffer)
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for seed in range(2):
        tokens = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), watched(model) as seen:
            model(tokens[:, :-1])
        for row, routing in zip(expected, seen, strict=True):
            row[:3] += torch.bincount(routing.chosen_NK.flatten(), minlength=3)
            row[3:] += torch.stack((routing.balance, routing.z))
        loss = model(tokens[:, :-1], tokens[:, 1:])
        torch.autograd.backward(loss)
        buffer.numbers[1:] += model.aside.view(-1)
    assert torch.equal(buffer.numbers[1:].view(2, 5), expected)
    assert expected[:, :3].sum() == 2 * 2 * 2 * 2 * 16


def test_masked_targets_weigh_the_auxiliary_losses_too() -> None:
    """Halves of a batch of which one counts: the gradient of router weights is that half's share of the whole."""
    shape = Grok(layers=1, width=16, heads=2, kv_heads=1, head_size=8, experts=3, context=8, router_z=0.5)
    model = build(shape, 61, seed=1, device=CPU)
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[1] = -100
    weight = model.get_parameter("blocks.0.experts.router.weight")
    with_losses: list[Tensor] = []
    without: list[Tensor] = []
    for balance, found in ((1.0, with_losses), (0.0, without)):
        for block in model.modules():
            if isinstance(block, Block):
                block.balance, block.router_z = 0.0, balance
        for masked in (False, True):
            given = targets if masked else tokens[:, 1:]
            found.append(torch.autograd.grad(model(tokens[:, :-1], given), weight)[0])
    whole, half = (a - b for a, b in zip(with_losses, without, strict=True))
    torch.testing.assert_close(half, whole / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_bf16_products_have_few_sizes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of rows that is new to oneDNN is compiled, which took as long as the product."""
    torch.manual_seed(0)
    sizes, linear = [], F.linear
    monkeypatch.setattr("train.models.experts.F.linear", lambda x, w: sizes.append(x.size(0)) or linear(x, w))  # type: ignore[func-returns-value]
    weights = [torch.randn(shape, dtype=dtype) for shape in ((3, 24, 16), (3, 24, 16), (3, 16, 24))]
    rows = torch.randn(70, 16, dtype=dtype)
    y = in_turn(rows, [5, 32, 33], *weights)
    assert sizes[::3] == ([32, 32, 64] if dtype == torch.bfloat16 else [5, 32, 33])
    monkeypatch.undo()
    for row, e in ((0, 0), (4, 0), (5, 1), (69, 2)):
        gate, up, down = (w[e].float() for w in weights)
        x = rows[row].float()
        expected = down @ (F.gelu(gate @ x, approximate="tanh") * (up @ x))
        torch.testing.assert_close(y[row].float(), expected, rtol=0.05, atol=1 if dtype == torch.bfloat16 else 1e-3)


def test_auxiliary_losses_are_felt_and_not_seen() -> None:
    nats, auxiliary = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    value = with_auxiliary(nats, auxiliary)
    torch.autograd.backward(value * 2)
    assert value == 3
    assert nats.grad == auxiliary.grad == 2


def test_even_routing_has_a_balance_of_one_and_training_restores_it() -> None:
    """All tokens at one expert of four: the balance is 4, and its gradient alone spreads them."""
    torch.manual_seed(0)
    experts = Experts(8, 16, 4, 1)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 400, 8) + 1
    with torch.no_grad():
        experts.router.weight[0] += 1
    optimizer = torch.optim.SGD([experts.router.weight], lr=1.0)
    before = experts(x)[1].balance
    assert before > 3
    for _ in range(60):
        optimizer.zero_grad()
        experts(x)[1].balance.backward()
        optimizer.step()
    assert 0.9 < experts(x)[1].balance < 1.1


def test_grok_1_has_its_published_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "model=grok_1", "format=json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 315_684_820_992
    config = compose.config("plan", ["model=grok_1"])
    assert parameters(config.model, 2048) == 315_684_820_992
    model = build(config.model, 2048, seed=0, device=torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == 315_684_820_992
    idle = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 3) * 6 // 8
    assert facts["active_parameters"] == active_parameters(config.model, 2048) == 315_684_820_992 - idle
