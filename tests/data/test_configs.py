from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from train.checks import Refused
from train.commands import register
from train.config import Data, SourceKind

CONFIGS = Path(__file__).parents[2] / "configs"
NEEDS = {
    "stdlib": [],
    "synthetic": [],
    "text": ["data.path=."],
    "bin": ["data.path=."],
    "hf": ["data.name=HuggingFaceFW/fineweb-edu"],
    "mix": ["data.parts.prose.path=."],
}


def composed(kind: str, overrides: list[str]) -> Data:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose(overrides=[f"+data={kind}", *overrides])
    data = OmegaConf.to_object(config.data)
    assert isinstance(data, Data)
    return data


def test_every_file_has_its_test() -> None:
    assert {path.stem for path in (CONFIGS / "data").glob("*.yaml")} == set(NEEDS)


@pytest.mark.parametrize("kind", sorted(NEEDS))
def test_composes_with_what_its_comment_asks_for(kind: str) -> None:
    data = composed(kind, NEEDS[kind])
    assert data.kind is SourceKind[kind]
    assert sum(part.weight for part in data.parts.values()) == (4 if kind == "mix" else 0)


@pytest.mark.parametrize("kind", ["text", "bin", "hf", "mix"])
def test_is_refused_without_it(kind: str) -> None:
    with pytest.raises(Refused, match=r"data\.(path|name|parts)"):
        composed(kind, [])
