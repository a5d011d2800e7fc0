"""Generation: the cached path is the model, and sampling does what its options say."""

from __future__ import annotations

import pytest
import torch

from train.config import Model
from train.generate import choose, generate, probabilities
from train.models.build import build
from train.models.language import LanguageModel
from train.shapes import GPT2, Grok, Llama

VOCAB = 100  # of 128 rows: ids above are never produced


SHAPES: dict[str, Model] = {
    "gpt2": GPT2(context=16, layers=2, width=32, heads=4, ffn=48, dropout=0.3, positions=20),
    "grok": Grok(context=16, layers=2, width=32, heads=4, kv_heads=2, head_size=8, widening=2.0, dropout=0.3),
    "llama": Llama(context=16, layers=2, width=32, heads=4, kv_heads=2, ffn=48, dropout=0.3, tied=False),
}


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    model = build(SHAPES[request.param], VOCAB, seed=2, device=torch.device("cpu"))
    for name, parameter in model.named_parameters():
        if name == "positions.weight":  # else one matrix for input and output repeats what it has just read
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        if name.endswith("_end.weight"):  # the same
            torch.nn.init.constant_(parameter, 3.0)
    return model


def draw(model: LanguageModel, seed: int = 0, **options: float) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    options = {"count": 3, "tokens": 40, **options}
    return generate(model, [1, 2, 3], generator=generator, **options).tolist()  # type: ignore[arg-type, no-any-return]


def test_cached_logits_are_those_of_the_full_forward(model: LanguageModel) -> None:
    model.eval()
    tokens = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = model(tokens)[..., :VOCAB]
        cache, start = model.cache(2), 0
        for size in (5, 1, 1, 6, 3):  # a prompt, single tokens, and several at once on a filled cache
            logits = model.step(tokens[:, start : start + size], cache)
            start += size
            # The same sums in another order: rounding of fp32, 2^-24, times some hundred terms of a dot product.
            torch.testing.assert_close(logits, full[:, start - 1], rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="17 positions do not fit a context of 16"):
            model.step(tokens[:, :1], cache)


def test_greedy_follows_the_full_forward_and_rebuilds_from_the_last_half(model: LanguageModel) -> None:
    ids, window = [1, 2, 3], [1, 2, 3]
    model.eval()
    with torch.no_grad():
        for _ in range(40):
            if len(window) > 16:
                window = ids[-8:]
            token = int(model(torch.tensor([window]))[0, -1, :VOCAB].argmax())
            ids.append(token)
            window = [*window, token]
    assert len(set(ids[3 + 16 :])) > 3
    assert draw(model, temperature=0, count=1) == [ids[3:]]


def test_top_k_of_one_is_greedy(model: LanguageModel) -> None:
    assert draw(model, top_k=1) == draw(model, temperature=0)


def test_the_seed_decides(model: LanguageModel) -> None:
    first = draw(model, seed=4, temperature=2.0)
    assert first == draw(model, seed=4, temperature=2.0)
    assert first != draw(model, seed=5, temperature=2.0)
    assert first[0] != first[1]
    assert all(token < VOCAB for row in first for token in row)


def test_every_token_is_a_sign_of_life(model: LanguageModel) -> None:
    """One of a large model may take longer than a rank may be silent."""
    beats: list[int] = []
    generate(model, [1, 2, 3], tokens=20, temperature=0.0, beat=lambda: beats.append(1))
    assert len(beats) == 20


def test_generation_has_no_dropout_and_leaves_the_mode_alone(model: LanguageModel) -> None:
    quiet = draw(model.eval(), temperature=0)
    assert draw(model.train(), temperature=0) == quiet
    assert model.training


def test_a_long_prompt_is_cut_to_its_end(model: LanguageModel) -> None:
    prompt = list(range(50))
    a, b = (generate(model, p, tokens=5, temperature=0) for p in (prompt, prompt[-16:]))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="empty prompt"):
        generate(model, [], tokens=5)


def test_top_k_and_top_p_cut_the_distribution() -> None:
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()

    def p(top_k: int, top_p: float) -> list[float]:
        return [round(x, 6) for x in probabilities(logits, top_k, top_p)[0].tolist()]

    assert p(0, 1.0) == [0.5, 0.1, 0.3, 0.1]
    assert p(2, 1.0) == [0.625, 0, 0.375, 0]
    assert p(0, 0.6) == [0.625, 0, 0.375, 0]  # 0.5 is not enough; with 0.3 it is
    assert p(0, 0.45) == [1, 0, 0, 0]
    assert p(0, 1e-9) == p(0, 1e-300) == [1, 0, 0, 0]
    assert p(3, 0.99) == [round(x / 9, 6) for x in (5, 1, 3, 0)]  # of equals, the first
    assert p(2, 0.6) == [1, 0, 0, 0]  # top_k first: then 0.625 is enough


def test_temperature_sharpens() -> None:
    logits = torch.tensor([[0.0, 1.0]]).expand(4000, 2)
    share = {
        t: choose(logits, t, 0, 1.0, torch.Generator().manual_seed(0)).float().mean().item()
        for t in (0.0, 1e-320, 1e-40, 0.5, 1.0)
    }
    assert share[0.0] == share[1e-40] == share[1e-320] == 1
    assert share[0.5] == pytest.approx(0.8808, abs=0.02)  # 1 / (1 + e^-2)
    assert share[1.0] == pytest.approx(0.7311, abs=0.02)  # 1 / (1 + e^-1)
