"""Out to transformers and in again: equal logits, equal ids, and every bit of the weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import without_model
from train import cli, compose, events, trained
from train.checks import Refused
from train.config import Model, TokenizerKind, Train
from train.data.tokenizer import Tokenizer
from train.models import hf
from train.models.build import build
from train.models.hf_config import to_hf_config
from train.shapes import GPT2, Llama

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CPU = torch.device("cpu")
EMBEDDING = "transformer.wte.weight"
FAMILIES = {
    "gpt2": ["model=gpt2_micro", "model.layers=2", "model.width=32", "model.heads=2", "model.ffn=48"],
    "llama": ["model=llama_micro", "model.layers=2", "model.width=32", "model.heads=2", "model.kv_heads=1"],
    "grok": ["model=grok_micro", "model.width=32", "model.heads=2", "model.kv_heads=1"],
}
FAMILIES["llama"] += ["model.ffn=48", "model.tied=false", "model.rope_factor=8", "model.rope_context=16"]


def exported(family: str, tiny: list[str], tmp_path: Path, *more: str) -> tuple[Path, Path]:
    """The folders of a run of two steps, and of its export."""
    settings = [*without_model(tiny), *FAMILIES[family], "model.context=32", "steps=2", "name=a", "devices=1", *more]
    assert cli.main(["train", *settings]) == 0
    run, out = tmp_path / "runs/a", tmp_path / "out"
    assert cli.main(["export", f"run={run}", "format=hf", f"out={out}"]) == 0
    return run, out


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "bytes"), ("llama", "bpe")])
def test_transformers_loads_what_is_exported(family: str, kind: str, tiny: list[str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, out = exported(family, tiny, tmp_path, f"data.tokenizer.kind={kind}")
    ours = trained.load(run, -1, CPU)
    tokenizer, text = AutoTokenizer.from_pretrained(out), "def für(x):\n\treturn  [x, 'é']  # 数\n"
    ids = ours.tokenizer.encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, len(tokenizer)) == (ours.tokenizer.eot, ours.tokenizer.vocab)
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.config.eos_token_id == ours.tokenizer.eot
    tokens = torch.tensor([ids[:30]])
    with torch.no_grad():
        # two programs' fp32: see tests/models/test_parity.py
        torch.testing.assert_close(ours.model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_is_bitwise_and_training_goes_on_from_it(family: str, tiny: list[str], tmp_path: Path) -> None:
    run, out = exported(family, tiny, tmp_path)
    first = trained.load(run, -1, CPU).model
    more = [*without_model(tiny), "model=hf", f"model.path={out}", "steps=2", "schedule=constant"]
    config = compose.config("train", [*more, "name=b"])
    assert isinstance(config, Train)
    assert config.data.tokenizer.kind is TokenizerKind.file
    again = build(config.model, 300, seed=9, device=CPU)
    hf.begin(again)
    assert type(again) is type(first)
    for (name, one), (_, other) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    (tmp_path / "once more").mkdir()
    hf.write(tmp_path / "once more", again, json.loads((out / "config.json").read_text())["eos_token_id"])
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "once more" / name).read_bytes() == (out / name).read_bytes()

    states = set()
    for world in (1, 2) if family == "grok" else (2,):
        assert cli.main(["train", *more, f"name=b{world}", f"devices={world}"]) == 0
        folder = tmp_path / f"runs/b{world}"
        states.add(json.loads((folder / "summary.json").read_text())["state_sha256"])
    assert len(states) == 1
    before = [r["loss"] for r in events.read(run / "events.jsonl") if r["kind"] == "step"]
    after = [r["loss"] for r in events.read(folder / "events.jsonl") if r["kind"] == "step"]
    assert after[0] < before[0], "it begins where the first run was, not anew"
    assert cli.main(["sample", f"run={folder}", "tokens=3", "accelerator=cpu"]) == 0


def test_what_transformers_saved_is_read(tmp_path: Path) -> None:
    """In several files, in bf16, and GPT-2's first names, with masks among the weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    cases: list[tuple[Model, Any, Any]] = [
        (GPT2(context=16, layers=1, width=16, heads=2, ffn=24), GPT2Config, GPT2LMHeadModel),
        (Llama(context=16, layers=2, width=16, heads=2, kv_heads=1, ffn=24), LlamaConfig, LlamaForCausalLM),
    ]
    for shape, config, kind in cases:
        folder = tmp_path / str(shape.family)
        theirs = kind(config(**to_hf_config(shape, 70))).bfloat16().eval()
        theirs.save_pretrained(folder, max_shard_size="5KB")
        read = compose.config("train", ["model=hf", f"model.path={folder}"]).model
        ours = build(read, 70, seed=0, device=CPU)
        hf.begin(ours)
        tokens = torch.arange(16).view(1, 16)
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens), theirs.float()(tokens).logits, rtol=1e-5, atol=1e-5)
    old = {name.removeprefix("transformer."): tensor for name, tensor in hf.read(tmp_path / "gpt2").items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    recipe = ["model.z_loss=0.5", "model.loss_chunk=9", "model.checkpoint_activations=full", "model.dropout=0.25"]
    gpt2 = compose.config("train", ["model=hf", f"model.path={tmp_path / 'gpt2'}", "model.context=8", *recipe]).model
    assert (gpt2.z_loss, gpt2.loss_chunk, gpt2.checkpoint_activations, gpt2.dropout) == (0.5, 9, "full", 0.25)
    weights = hf.from_hf(gpt2, old)
    assert torch.equal(weights["positions.weight"], old["wpe.weight"])  # all 16, though 8 are used


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["model=hf"], "model.path: model=hf needs model.path=FOLDER"),
        (["model=hf", "model.path=nowhere"], "config.json cannot be read"),
        (["model=hf", "model.path={}", "model.context=64"], "model.context: 64 is more than that model's 32"),
        (["model=hf", "model.path={}", "model.layers=3"], "model.layers: no such key"),
        (["model=hf", "model.path={}"], "holds no *.safetensors"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(settings: list[str], named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(Llama(context=32), 100)))
    with pytest.raises(Refused) as refused:
        compose.config("train", [setting.format(tmp_path) for setting in settings])
    assert named in str(refused.value)


def test_a_name_on_the_hub_is_the_snapshot_of_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a cache laid out as the Hub's client does, without a network; a folder of that name comes first."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    for commit, width in (("a" * 40, 32), ("b" * 40, 16)):
        shape = GPT2(layers=1, width=width, heads=2, ffn=48, context=16)
        snapshot = tmp_path / "hub" / "models--some--tiny" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        hf.write(snapshot, build(shape, 61, seed=1, device=CPU), 60)
    (tmp_path / "hub" / "models--some--tiny" / "refs").mkdir()
    (tmp_path / "hub" / "models--some--tiny" / "refs" / "main").write_text("a" * 40)
    plain = ["data=synthetic", "data.tokenizer.vocab=61"]
    for path, width in (("some/tiny", 32), (f"some/tiny@{'b' * 40}", 16)):
        config = compose.config("train", ["model=hf", f"model.path={path}", *plain])
        assert (config.model.family, config.model.width, config.model.vocab) == ("gpt2", width, 61)
        assert Path(config.model.path).parent == tmp_path / "hub" / "models--some--tiny" / "snapshots"
        model = build(config.model, 61, seed=2, device=CPU)
        hf.begin(model)
        assert torch.equal(model.get_parameter("embedding.weight")[:61], hf.read(Path(config.model.path))[EMBEDDING])
    assert cli.main(["plan", "model=hf", "model.path=nobody/knows", *plain]) == 2
    refusal = capsys.readouterr().err
    assert "model.path: nobody/knows is no folder here, and the Hub does not give it: " in refusal
    assert len(refusal.splitlines()) == 1
    (tmp_path / "some").mkdir()
    snapshot.rename(tmp_path / "some" / "tiny")
    assert compose.config("train", ["model=hf", "model.path=some/tiny", *plain]).model.width == 16


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    shape = Llama(context=16, layers=1, width=16, heads=2, kv_heads=1, ffn=24)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(shape, 100)))
    with pytest.raises(Refused, match=r"holds no \*\.safetensors"):
        compose.config("train", ["model=hf", f"model.path={tmp_path}"])
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    model = build(compose.config("train", ["model=hf", f"model.path={tmp_path}"]).model, 100, seed=0, device=CPU)
    with pytest.raises(Refused, match="cannot be read"):
        hf.begin(model)
    weights = {k: v.contiguous() for k, v in hf.to_hf(shape, 100, model.state_dict()).items()}
    save_file({**weights, "model.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    with pytest.raises(Refused, match=r"norm\.weight has \(8,\), the configuration \(16,\)"):
        hf.begin(model)


def test_an_export_overwrites_nothing(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = exported("llama", tiny, tmp_path)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert cli.main(["export", f"run={run}", f"out={out}"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "link").symlink_to("/nowhere")
    for bad in ("/proc/foo", f"{out}/config.json/y", f"{tmp_path}/link", "a" * 300, "~nope/x"):
        assert cli.main(["export", f"run={run}", f"out={bad}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("colossus: out: ")
    assert cli.main(["export", f"run={run}"]) == 0
    for text in ("", '{"train": 5}'):
        (run / "data.json").write_text(text)
        assert cli.main(["export", f"run={run}", f"out={tmp_path}/none"]) == 2
        assert f"{run}/data.json: " in capsys.readouterr().err
    assert not list(tmp_path.glob(".*.draft")), "a failed export leaves nothing"
    assert (run / "hf" / "model.safetensors").read_bytes() == before["model.safetensors"]


def test_bytes_have_a_tokenizer_for_other_programs() -> None:
    ours, library = Tokenizer.of_bytes(), Tokenizer.of_bytes().published()
    assert library is not None
    for text in ("plain", "ü数🙂 \t\r\n", "it's   spaced", "".join(map(chr, range(1, 300)))):
        assert library.encode(text, add_special_tokens=False).ids == ours.encode(text)
    assert library.token_to_id("<|endoftext|>") == ours.eot
    assert Tokenizer.of_ids(100).published() is None
