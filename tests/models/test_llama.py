"""Our Llama against transformers', and what the harness asks of a model: precision, dropout, compilation."""

from __future__ import annotations

import os

import pytest
import torch

from train.config import Llama
from train.models.build import build
from train.models.hf import to_hf, to_hf_config

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CPU = torch.device("cpu")
VOCAB = 256


def shape(**changes: object) -> Llama:
    small = {"context": 160, "layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "ffn": 96}
    return Llama(**{**small, **changes})  # type: ignore[arg-type]


def batch(config: Llama, sequences: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (sequences, config.context + 1), generator=torch.Generator().manual_seed(3))
    targets = ids[:, 1:].clone()
    targets[0, :7] = -100
    return ids[:, :-1], targets


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found


@pytest.mark.parametrize("changes", [{"tied": True}, {"tied": False, "kv_heads": 4}, {"rope_base": 500.0}])
def test_logits_loss_and_gradients_equal_transformers(changes: dict[str, object]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = shape(**changes)
    model = build(config, VOCAB, seed=1, device=CPU)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # gains other than 1, so that an exchanged one shows
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs = LlamaForCausalLM(LlamaConfig(**to_hf_config(config, VOCAB)))
    missing, unexpected = theirs.load_state_dict(to_hf(config, model.state_dict()), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    theirs.tie_weights()

    tokens, targets = batch(config)
    logits = theirs(tokens).logits
    right = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss = model(tokens, targets)
    torch.autograd.backward([right, loss])

    torch.testing.assert_close(model(tokens), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, right, rtol=1e-5, atol=0)
    expected = gradients(theirs)
    found = to_hf(config, gradients(model))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        distance = (gradient - expected[name]).norm() / expected[name].norm()
        assert distance < 1e-5, f"{name}: {distance:.2e}"


def test_bf16_autocast_stays_close_and_sums_in_fp32() -> None:
    config = shape()
    model, (tokens, targets) = build(config, VOCAB, seed=1, device=CPU), batch(config)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    # bf16 keeps 8 bits; over 313 tokens the errors of the logits mostly cancel
    torch.testing.assert_close(loss, model(tokens, targets), rtol=1e-3, atol=0)


def test_the_future_does_not_reach_back() -> None:
    config = shape()
    model, (tokens, _) = build(config, VOCAB, seed=1, device=CPU), batch(config)
    changed = tokens.clone()
    changed[:, 140:] = (changed[:, 140:] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :140], after[:, :140])
    assert not torch.allclose(before[:, 140:], after[:, 140:])


def test_dropout_follows_the_seed_and_sleeps_in_eval() -> None:
    config = shape(dropout=0.2)
    model, (tokens, targets) = build(config, VOCAB, seed=1, device=CPU), batch(config)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return float(model(tokens, targets).detach())

    assert loss(5) == loss(5) != loss(6)
    model.eval()
    assert loss(5) == loss(6)


def test_compiled_as_one_graph_equals_eager() -> None:
    config = shape(layers=1)
    model, (tokens, targets) = build(config, VOCAB, seed=1, device=CPU), batch(config)
    eager = model(tokens, targets)
    eager.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    # aot_eager traces forward and backward whole, as inductor would, and leaves out only the minute of g++
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, targets)
    loss.backward()
    torch.testing.assert_close(loss, eager, rtol=1e-6, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_computes_the_same() -> None:
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
