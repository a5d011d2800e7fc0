"""A run's settings beside the defaults, and several runs' beside each other."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from train.config import CONFIGS, GROUPS, Train
from train.folder import flatten
from train.shapes import MODELS

Settings = dict[str, Any]
HIDDEN = ("name", "runs", "report", "data.cache")  # differ always, and mean nothing


@cache
def defaults() -> Settings:
    """What `colossus train` does if nobody says otherwise, flattened.

    Composed without Hydra, whose one global instance a sweep is in the middle of when a run of it is reported.
    """
    job = yaml.safe_load((CONFIGS / "job.yaml").read_text())
    chosen = {k: v for entry in job["defaults"] if isinstance(entry, dict) for k, v in entry.items()}
    model = yaml.safe_load((CONFIGS / "model" / f"{chosen['model']}.yaml").read_text())
    schemas = GROUPS | {"model": MODELS[model["defaults"][0].removeprefix("schema_")]}
    whole = OmegaConf.structured(Train)
    for group, schema in schemas.items():
        whole[group] = OmegaConf.merge(OmegaConf.structured(schema), _own(CONFIGS / group / f"{chosen[group]}.yaml"))
    found: Any = OmegaConf.to_container(OmegaConf.merge(whole, _own(CONFIGS / "job.yaml")))
    return dict(flatten(found))


def _own(path: Path) -> Settings:
    """A YAML file's values without what is Hydra's."""
    return {key: value for key, value in yaml.safe_load(path.read_text()).items() if key not in ("defaults", "hydra")}


def changed(settings: Settings) -> list[tuple[str, Any, Any]]:
    """(key, the run's value, the default, None where there is none) of those that differ."""
    rows = differing([settings, defaults()])
    return [(key, ours, usual) for key, (ours, usual) in rows.items() if key in settings]


def differing(several: list[Settings]) -> dict[str, list[Any]]:
    """The keys in which runs differ -> each one's value, None where it has none."""
    keys = sorted(set().union(*several) - set(HIDDEN))
    rows = {key: [settings.get(key) for settings in several] for key in keys}
    return {key: values for key, values in rows.items() if len(set(map(str, values))) > 1}
