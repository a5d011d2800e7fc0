"""Every command of README's recipes composes: what it names is there, and no key of it is refused."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from train import cli, compose, hardware, plan
from train.config import Train
from train.shapes import Llama

README = Path(__file__).parent.parent / "README.md"
SECTION = re.compile(r"^## Recipes\n(.*?)^## ", re.M | re.S)
GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
GPT2 |= {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
HANDMADE = ("mkdir", "rsync")  # other commands that recipes have; the first is run here


def recipes() -> list[tuple[str, list[str]]]:
    """What stands before each block, and its lines."""
    found = SECTION.search(README.read_text())
    assert found is not None
    blocks = re.findall(r"^([^\n]+)\n```\n(.*?)^```", found[1], re.M | re.S)
    return [(title, block.splitlines()) for title, block in blocks]


def test_there_is_a_recipe_for_each_place() -> None:
    titles = " ".join(title for title, _ in recipes())
    assert len(recipes()) == 9
    for place in ("laptop", "One GPU", "8 H100s", "FineWeb", "Slurm", "Spot", "Own data", "own model", "elsewhere"):
        assert place in titles


@pytest.mark.parametrize(("title", "lines"), recipes(), ids=lambda value: value[:12] if isinstance(value, str) else "")
def test_a_recipe_composes(
    title: str,
    lines: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpus = 8 if "8 H100s" in title else 1 if "GPU" in title else 0
    monkeypatch.setattr(hardware, "gpus", lambda: (hardware.Gpu("NVIDIA H100 80GB HBM3", 80 * 2**30),) * gpus)
    monkeypatch.setenv("HOME", str(tmp_path))
    for there in ("notes", "src", "shared/books", "models/gpt2"):  # what the recipes take to be yours
        (tmp_path / there).mkdir(parents=True)
        (tmp_path / there / "a.txt").write_text("text")
    (tmp_path / "models/gpt2/config.json").write_text(json.dumps(GPT2))
    (tmp_path / "models/gpt2/model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert 2 <= len(lines) <= 4
    for line in lines:
        command, *words = shlex.split(line.replace("/shared", f"{tmp_path}/shared"))
        if command != "colossus":
            assert command in HANDMADE
            if command == "mkdir":
                subprocess.run(["bash", "-c", line], check=True)
            continue
        name, *overrides = words
        if name == "launch":
            assert cli.main(["launch", *overrides, "dry=true"]) == 0, capsys.readouterr().err
            continue
        config = compose.config(name, overrides)
        if isinstance(config, Train):
            plan.resolve(config)
            if "model=mine" in overrides:
                assert isinstance(config.model, Llama)
                assert config.model.layers == 8
