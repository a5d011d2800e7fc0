"""Arithmetic held against models that are really built, and against published figures."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from train import compose
from train.checks import Refused
from train.config import CONFIGS, Model
from train.flops import active_parameters, auto_micro_batch, flops_per_token, memory, mfu, padded_vocab, parameters
from train.models.build import build
from train.shapes import GPT2, MODELS, Grok, Llama

META = torch.device("meta")
SHAPES = [
    Llama(layers=1, width=32, heads=2, kv_heads=1, ffn=40),
    Llama(layers=3, width=64, heads=4, kv_heads=2, ffn=96, tied=False),
    Llama(),
    Llama(context=8192, layers=32, width=4096, heads=32, kv_heads=8, ffn=14336, tied=False),
    GPT2(layers=2, width=32, heads=2, ffn=40, positions=300),
    GPT2(),
    Grok(),
    Grok(layers=2, width=40, heads=2, kv_heads=1, head_size=32, experts=5, chosen=3, widening=3.3),
]
EIGHT_B = SHAPES[3]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab", [257, 4096])
def test_parameters_are_those_of_the_built_model(shape: Model, vocab: int) -> None:
    model = build(shape, vocab, seed=0, device=META)
    assert parameters(shape, vocab) == sum(p.numel() for p in model.parameters())
    tables = [module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding)]
    looked_up = sum(tables) if isinstance(shape, Llama) and not shape.tied else sum(tables[1:])
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    idle = experts // shape.experts * (shape.experts - shape.chosen) if isinstance(shape, Grok) else 0
    assert active_parameters(shape, vocab) == parameters(shape, vocab) - looked_up - idle


def test_llama_8b() -> None:
    assert parameters(EIGHT_B, 128_256) == 8_030_261_248
    # 6 · 7,504,924,672 + 12 · 32 · 4096 · 8192
    assert flops_per_token(EIGHT_B, 128_256) == 45_029_548_032 + 12_884_901_888
    # at 10,000 tokens/s on one H100 of 989 TFLOP/s
    utilisation = mfu(EIGHT_B, 128_256, 10_000, 989e12)
    assert utilisation == pytest.approx(0.5856, abs=1e-4)
    assert mfu(EIGHT_B, 128_256, 10_000, None) is None


def test_published_shapes_have_their_published_sizes() -> None:
    """GPT-2's four (transformers counts their parameters so), and Llama 3.1's three."""
    sizes = {"gpt2_124m": 124_439_808, "gpt2_350m": 354_823_168, "gpt2_774m": 774_030_080, "gpt2_1558m": 1_557_611_200}
    sizes |= {"llama_8b": 8_030_261_248, "llama_70b": 70_553_706_496, "llama_405b": 405_853_388_800}
    for name, count in sizes.items():
        config = compose.config("plan", [f"model={name}"])
        padding = (50_304 - 50_257) * config.model.width if name.startswith("gpt2") else 0
        assert parameters(config.model, 50_257) == count + padding
        assert sum(p.numel() for p in build(config.model, 50_257, seed=0, device=META).parameters()) == count + padding


def test_padded_vocab() -> None:
    assert [padded_vocab(v) for v in (1, 64, 65, 50_257)] == [64, 64, 128, 50_304]


def test_unknown_family_is_refused() -> None:
    with pytest.raises(Refused, match=r"model\.family: 'mamba' is unknown"):
        parameters(Model(family="mamba"), 100)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "shape",
    [
        Llama(context=256, layers=3, width=128, heads=4, kv_heads=4, ffn=352),
        Llama(context=512, layers=3, width=128, heads=4, kv_heads=2, ffn=352),
        GPT2(context=256, layers=3, width=128, heads=4, ffn=512),
        Grok(context=256, layers=3, width=128, heads=4, kv_heads=2, head_size=32, widening=2.0),
    ],
    ids=["llama-256", "llama-512", "gpt2", "grok"],
)
def test_activations_are_what_autograd_keeps(precision: str, shape: Model) -> None:
    context = shape.context
    model = build(shape, 1024, seed=0, device=torch.device("cpu"))
    constant = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in constant:
            kept[address] = tensor
        return tensor

    tokens = torch.zeros(4, context, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model(tokens, tokens)
    found = sum(t.untyped_storage().nbytes() for t in kept.values())
    need = memory(shape, 1024, micro_batch=4, precision=precision)
    casts = need.weights - parameters(shape, 1024) * 4  # autocast's copies of the weights are kept too
    # Not less than what is kept; not a quarter more, which is what the backward pass adds for a moment.
    assert found <= need.activations + need.logits + casts < 1.25 * found


@pytest.mark.parametrize("family", [Llama, GPT2, Grok])
def test_what_is_computed_again_is_not_counted(family: type[Llama] | type[GPT2] | type[Grok]) -> None:
    """full: what goes into each layer (measured), what is kept outside of them (measured), and one layer at work."""
    plain = family(context=256, layers=3, width=128, heads=4)
    shape = replace(plain, checkpoint_activations="full")
    model, inputs = build(shape, 1024, seed=0, device=torch.device("cpu")), 0
    constant = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def entered(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        nonlocal inputs
        inputs += given[0].nbytes

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in constant:
            kept[address] = tensor
        return tensor

    for name, module in model.named_modules():
        if re.fullmatch(r"blocks\.\d+", name):
            module.register_forward_pre_hook(entered)
    tokens = torch.zeros(4, 256, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model(tokens, tokens)
    none, some, full = (
        memory(replace(plain, checkpoint_activations=how), 1024, micro_batch=4) for how in ("none", "selective", "full")
    )
    found = sum(t.untyped_storage().nbytes() for t in kept.values()) + inputs + none.activations // 3
    casts = 2 * 1024 * 128  # the output matrix in bf16
    assert found <= (full.activations + full.logits + casts) * 1.05
    assert full.activations + full.logits < 1.25 * found
    assert full.activations < some.activations < none.activations
    chunked = memory(replace(plain, loss_chunk=128), 1024, micro_batch=4)
    assert (chunked.logits * 8, chunked.activations) == (none.logits, none.activations)


def test_memory_of_weights_gradients_and_states() -> None:
    n = parameters(EIGHT_B, 128_256)
    need = memory(EIGHT_B, 128_256, micro_batch=1, gradient_buffers=4, accelerator="cuda")
    assert (need.gradients, need.optimizer) == (16 * n, 8 * n)
    assert 5.5 * n < need.weights < 6 * n  # 4 bytes, and 2 for what matrices are multiplied in
    fp32 = memory(EIGHT_B, 128_256, micro_batch=1, precision="fp32", optimizer_states=1)
    assert (fp32.weights, fp32.optimizer) == (4 * n, 4 * n)
    assert need.total == need.weights + need.gradients + need.optimizer + need.activations + need.logits


def test_micro_batch_divides_fits_and_is_the_largest() -> None:
    nano = Llama()
    assert auto_micro_batch(nano, 4096, 64) == 8  # 2,048 tokens on CPU
    assert auto_micro_batch(nano, 4096, 6) == 6
    assert auto_micro_batch(nano, 4096, 14) == 7
    assert auto_micro_batch(nano, 4096, 64, accelerator="cuda") == 64
    for size in (1, 2, 4, 8):
        budget = memory(nano, 4096, micro_batch=size, accelerator="cuda").total
        assert auto_micro_batch(nano, 4096, 64, budget_bytes=budget, accelerator="cuda") == size
        assert auto_micro_batch(nano, 4096, 64, budget_bytes=budget - 1, accelerator="cuda") == max(1, size // 2)
    more_buffers = auto_micro_batch(nano, 4096, 64, budget_bytes=budget, accelerator="cuda", gradient_buffers=4)
    assert more_buffers < 8


def test_memory_grows_with_the_micro_batch_alone_where_it_should() -> None:
    one, two = (memory(Llama(), 4096, micro_batch=m) for m in (1, 2))
    assert two.activations == 2 * one.activations
    assert two.logits == 2 * one.logits
    assert (two.weights, two.gradients, two.optimizer) == (one.weights, one.gradients, one.optimizer)
    assert math.isclose(one.logits, 256 * 4096 * 6)


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*_*.yaml")), ids=lambda p: p.stem)
def test_the_named_sizes_say_their_size(path: Path) -> None:
    text = path.read_text()
    said = re.search(r"^# ([0-9,]+) parameters at a vocabulary of ([0-9,]+)", text, re.MULTILINE)
    assert said is not None
    count, vocab = (int(number.replace(",", "")) for number in said.groups())
    values = yaml.safe_load(text)
    family = path.stem.split("_")[0]
    assert values.pop("defaults") == [f"schema_{family}", "_self_"]
    assert parameters(MODELS[family](**values), vocab) == count
