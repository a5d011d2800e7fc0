"""What the harness asks of each family: precision, causality, dropout, compilation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from train.config import Model
from train.models import fused, gpt2
from train.models.build import build
from train.shapes import GPT2, Grok, Llama

CPU = torch.device("cpu")
VOCAB = 256


SHAPES: dict[str, Callable[..., Model]] = {
    "gpt2": partial(GPT2, context=160, layers=2, width=64, heads=4, ffn=96),
    "grok": partial(Grok, context=160, layers=2, width=64, heads=4, kv_heads=2, head_size=16, widening=2.0),
    "llama": partial(Llama, context=160, layers=2, width=64, heads=4, kv_heads=2, ffn=96),
}
families = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def batch(config: Model, sequences: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (sequences, config.context + 1), generator=torch.Generator().manual_seed(3))
    targets = ids[:, 1:].clone()
    targets[0, :7] = -100
    return ids[:, :-1], targets


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found


@families
def test_bf16_autocast_stays_close_and_sums_in_fp32(shape: Callable[..., Model]) -> None:
    config = shape()
    model, (tokens, targets) = build(config, VOCAB, seed=1, device=CPU), batch(config)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    # bf16 keeps 8 bits; over 313 tokens the errors of the logits mostly cancel
    torch.testing.assert_close(loss, model(tokens, targets), rtol=1e-3, atol=0)


@families
def test_the_future_does_not_reach_back(shape: Callable[..., Model]) -> None:
    config = shape()
    model, (tokens, _) = build(config, VOCAB, seed=1, device=CPU), batch(config)
    changed = tokens.clone()
    changed[:, 140:] = (changed[:, 140:] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :140], after[:, :140])
    assert not torch.allclose(before[:, 140:], after[:, 140:])


@families
def test_a_document_in_a_packed_window_is_computed_as_if_alone(shape: Callable[..., Model]) -> None:
    """Three documents, over the edge of a block of queries: logits, and the gradient of their targets, to rounding.

    Positions go on counting over the window. Rotary ones are relative; for learned ones the table is moved to where the
    document that is alone stands in the window.
    """
    config = shape(balance=0, router_z=0) if shape is SHAPES["grok"] else shape()
    model, (tokens, targets) = build(config, VOCAB, seed=1, device=CPU, separator=5), batch(config)
    tokens = tokens.masked_fill(tokens == 5, 6)
    tokens[:, [40, 131]] = 5
    packed = model(tokens)
    model(tokens, targets).backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    for start, end in ((0, 40), (40, 131), (131, 160)):
        alone = copy.deepcopy(model)
        if isinstance(alone, gpt2.GPT2):
            places = alone.positions
            assert isinstance(places, torch.nn.Embedding)
            places.weight.data = places.weight.data[start:]
        torch.testing.assert_close(packed[:, start:end], alone(tokens[:, start:end]), rtol=1e-4, atol=1e-4)
        model(tokens[:, start:end], targets[:, start:end]).backward()
    if not isinstance(model, gpt2.GPT2):
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3)
    model.separator = None
    assert not torch.allclose(model(tokens)[:, 40:], packed[:, 40:], atol=0.1)
    assert torch.equal(model(tokens)[:, :40], packed[:, :40])


@families
@pytest.mark.parametrize("more", [{"z_loss": 0.01}, {"loss_chunk": 100}], ids=["z_loss", "loss_chunk"])
def test_what_is_asked_of_the_loss_reaches_each_family(
    shape: Callable[..., Model], more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A z-loss changes gradients and not the value; chunks change the order of additions, and how much stands."""
    model, other = (build(config, VOCAB, seed=1, device=CPU) for config in (shape(), shape(**more)))
    tokens, targets = batch(model.shape)
    plain: Any = other.logits
    rows: list[int] = []

    def logits(x: torch.Tensor) -> Any:
        rows.append(x[..., 0].numel())
        return plain(x)

    monkeypatch.setattr(other, "logits", logits)
    right, found = model(tokens, targets), other(tokens, targets)
    right.backward()
    found.backward()
    assert max(rows) == (100 if "loss_chunk" in more else 320)
    torch.testing.assert_close(found, right, rtol=1e-5 if "loss_chunk" in more else 0, atol=0)
    expected = gradients(model)
    close = [torch.allclose(g, expected[name], rtol=1e-3, atol=1e-3) for name, g in gradients(other).items()]
    assert all(close) == ("loss_chunk" in more)


@families
@pytest.mark.parametrize("how", ["selective", "full"])
def test_activations_computed_again_are_the_same_bits(
    shape: Callable[..., Model], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, in bf16, in a process's first pass; what is kept for the backward pass is counted, and is less."""

    def run(checkpoint_activations: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        fused.gelu_table.cache_clear()
        config = shape(dropout=0.2, checkpoint_activations=checkpoint_activations)
        model, (tokens, targets) = build(config, VOCAB, seed=1, device=CPU), batch(config)
        torch.manual_seed(7)
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(tokens, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss, gradients(model), kept

    plain, found = run("none"), run(how)
    assert torch.equal(plain[0], found[0])
    assert all(torch.equal(gradient, plain[1][name]) for name, gradient in found[1].items())
    assert found[2] < (0.5 if how == "full" else 0.95) * plain[2]


@families
def test_dropout_follows_the_seed_and_sleeps_in_eval(shape: Callable[..., Model]) -> None:
    config = shape(dropout=0.2)
    model, (tokens, targets) = build(config, VOCAB, seed=1, device=CPU), batch(config)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return float(model(tokens, targets).detach())

    assert loss(5) == loss(5) != loss(6)
    model.eval()
    assert loss(5) == loss(6)


@families
def test_compiled_as_one_graph_equals_eager(shape: Callable[..., Model]) -> None:
    config = shape(layers=1)
    model, (tokens, targets) = build(config, VOCAB, seed=1, device=CPU), batch(config)
    experts = isinstance(config, Grok)  # torch traces grouped products in bf16 only, and they are not the loop's
    with torch.autocast("cpu", torch.bfloat16, enabled=experts):
        eager = model(tokens, targets)
    eager.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    # aot_eager traces forward and backward whole, as inductor would, and leaves out only the minute of g++
    with torch.autocast("cpu", torch.bfloat16, enabled=experts):
        loss = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, targets)
    loss.backward()
    torch.testing.assert_close(loss, eager, rtol=1e-4 if experts else 1e-6, atol=0)
    for name, gradient in gradients(model).items():
        if experts:  # rounding may send a token that is undecided to another expert
            assert (gradient - expected[name]).norm() < 0.05 * expected[name].norm(), name
        else:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@families
def test_on_a_gpu_it_computes_the_same(shape: Callable[..., Model]) -> None:
    config, cuda = shape(), torch.device("cuda")
    tokens, targets = batch(config)
    here, there = (build(config, VOCAB, seed=1, device=device) for device in (CPU, cuda))
    right, found = here(tokens, targets), there(tokens.to(cuda), targets.to(cuda))
    right.backward()
    found.backward()
    torch.testing.assert_close(found.cpu(), right, rtol=1e-4, atol=0)
    expected = gradients(here)
    for name, gradient in gradients(there).items():
        torch.testing.assert_close(gradient.cpu(), expected[name], rtol=1e-2, atol=1e-3)
