"""A model's first weights are a function of the seed and of their names."""

from __future__ import annotations

import pytest
import torch

from train.checks import Refused
from train.config import Model
from train.models.build import build, initial
from train.shapes import Llama

CPU, META = torch.device("cpu"), torch.device("meta")
SMALL = {"context": 32, "layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "ffn": 48}


def small(**changes: object) -> Llama:
    return Llama(**{**SMALL, **changes})  # type: ignore[arg-type]


def test_same_seed_same_bits_whatever_happened_before() -> None:
    first = build(small(), 100, seed=7, device=CPU).state_dict()
    torch.manual_seed(99)
    torch.rand(1000)
    state = torch.get_rng_state()
    second = build(small(), 100, seed=7, device=CPU).state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # nor does building draw from the global generator
    other = build(small(), 100, seed=8, device=CPU).state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert tensor.dim() < 2 or not torch.equal(tensor, other[name])


def test_a_weight_does_not_depend_on_its_neighbours() -> None:
    tied, untied = (build(small(tied=t), 100, seed=7, device=CPU).state_dict() for t in (True, False))
    assert set(untied) - set(tied) == {"head.weight"}
    assert all(torch.equal(tied[name], untied[name]) for name in tied if name != "embedding.weight")
    assert not torch.equal(untied["head.weight"], untied["embedding.weight"])


def test_scales() -> None:
    model = build(small(width=128, layers=8, ffn=256), 1000, seed=0, device=CPU)
    weights = dict(model.named_parameters())
    assert torch.equal(weights["norm.weight"], torch.ones(128))
    assert weights["embedding.weight"].std().item() == pytest.approx(128**-0.5, rel=0.02)
    untied = build(small(tied=False), 1000, seed=0, device=CPU)
    assert untied.get_parameter("embedding.weight").std().item() == pytest.approx(1, rel=0.02)
    assert untied.get_parameter("head.weight").std().item() == pytest.approx(32**-0.5, rel=0.02)
    for name, inputs in {"attention.qkv": 128, "ffn.up": 128, "attention.out": 128 * 16, "ffn.down": 256 * 16}.items():
        assert weights[f"blocks.3.{name}.weight"].std().item() == pytest.approx(inputs**-0.5, rel=0.05)


def test_initial_values_are_golden() -> None:
    """A change of the drawing would silently end every comparison with earlier runs."""
    values = initial("blocks.0.ffn.up.weight", torch.Size((2, 2)), 0, 0.5).flatten().tolist()
    assert values == pytest.approx(GOLDEN, rel=1e-6)


GOLDEN = [0.040672265, -0.811162889, -1.2296305895, -0.3720981181]


def test_meta_device_counts_llama_8b() -> None:
    shape = Llama(context=8192, layers=32, width=4096, heads=32, kv_heads=8, ffn=14336, rope_base=500_000.0, tied=False)
    model = build(shape, 128_256, seed=0, device=META)
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248


def test_the_rotary_table_is_filled_and_not_saved() -> None:
    model = build(small(), 100, seed=0, device=CPU)
    assert "rotary" not in model.state_dict()
    cos, sin = model.get_buffer("rotary")
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))
    assert cos[0].tolist() == [1.0] * 8
    assert cos[1, 0].item() == pytest.approx(0.5403023)  # cos 1


def test_rows_that_round_the_vocabulary_up_are_zero_and_unseen() -> None:
    """100 ids, 128 rows: without the last 28 the loss is the same, and they stay what they are."""
    model = build(small(tied=False), 100, seed=0, device=CPU)
    tokens = torch.arange(16).view(1, 16)
    assert model(tokens).shape == (1, 16, 100)
    assert model.step(tokens[:, :3], model.cache(1)).shape == (1, 100)
    loss = model(tokens, tokens)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(model(tokens)[0], tokens[0], reduction="sum"))
    loss.backward()
    for matrix in (model.get_parameter("embedding.weight"), model.get_parameter("head.weight")):
        assert matrix.grad is not None
        assert matrix.shape == matrix.grad.shape == (128, 32)
        assert not matrix[100:].any()
        assert not matrix.grad[100:].any()
        assert matrix.grad[:16].any(1).all()


def test_a_shape_may_know_more_ids_than_the_tokenizer_has() -> None:
    model = build(small(vocab=200), 100, seed=0, device=META)
    assert model(torch.zeros(1, 2, dtype=torch.int64, device=META)).shape == (1, 2, 200)
    with pytest.raises(Refused, match=r"model\.vocab: 50 are fewer than the tokenizer's 100 ids: choose another"):
        build(small(vocab=50), 100, seed=0, device=META)


def test_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(Refused, match=r"model\.family: 'mamba' is unknown: choose from gpt2, grok, llama"):
        build(Model(family="mamba"), 100, seed=0, device=CPU)
