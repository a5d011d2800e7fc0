"""Run folders: `runs/<name>/`, one writer at a time, continued by whoever asks for the same name.

config.yaml    the resolved configuration        events.jsonl   what happened, across restarts
data.json      which tokens it was trained on    summary.json   how it ended
checkpoints/   logs/   tensorboard/   csv/      report.html    all of it to look at
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train import events, locks, manifest
from train.checks import MALFORMED, Refused, needed, place, require
from train.config import GROUPS, ResumeMode, Train
from train.data.order import passing
from train.shapes import MODELS

# What may differ between the nodes of a run: each one's own affair. The rest steers what the ranks do together.
LOCAL = (
    *("name", "runs", "devices", "backend", "stop_after", "logger", "log", "profile", "sample"),
    *("report", "resume", "resume_from"),
    *("data.cache", "data.path", "data.parts.*.path", "data.tokenizer.path"),  # the corpus's digest is compared
    *("data.revision", "data.parts.*.revision"),
)
# What may change when a run is continued: nothing here has a say in the bits.
FREE = (
    *LOCAL,
    *("nodes", "eval", "checkpoint", "recovery", "faults", "evidence", "sharding"),
    *("batch.weights", "reduce.bucket_mib", "reduce.hosts_first"),
)
WISH = "resize.json"  # in a run's folder: how many ranks it shall have from now on
PINNED = ("precision", "compile", "accelerator", "batch.micro_batch")  # `auto` means: as this run has it


def flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A configuration's keys, dots between them; enums by name."""
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item.name if isinstance(item, Enum) else item


def identity(config: Train, free: Iterable[str] = FREE) -> dict[str, Any]:
    """The keys that make the result what it is, flattened: two runs that agree in them train the same model."""
    return {key: value for key, value in flatten(asdict(config)) if not _among(key, free)}


def _among(key: str, names: Iterable[str]) -> bool:
    """Whether a key, or a group that it belongs to, is named."""
    return any(fnmatchcase(key, name) or key.startswith(name + ".") for name in names)


def plain_identity(config: Train, free: Iterable[str] = FREE) -> dict[str, Any]:
    """The same as JSON gives it back: what a checkpoint carries."""
    return dict(json.loads(json.dumps(identity(config, free), default=str)))


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, in order -> both values, None where there is none."""
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def compare(old: dict[str, Any], config: Train, whose: str, otherwise: str) -> None:
    """Raises Refused where `config` would train another model than that with the plain identity `old`."""
    allowed, different = config.resume.allowed(), differences(old, plain_identity(config))
    refused = {key: both for key, both in different.items() if not _among(key, allowed)}
    if refused:
        changes = ", ".join(f"{key}: {before} -> {now}" for key, (before, now) in refused.items())
        names = [*allowed, *refused]
        allow = names[0] if len(names) == 1 else f"[{','.join(names)}]"
        raise Refused(whose, f"{changes}: {otherwise} or allow it with resume.allow={allow}")


class RunFolder:
    """A run's folder, held by this process while it is entered."""

    def __init__(self, path: Path, node: int = 0) -> None:
        """Make it if need be and lock it; raises Refused where another process holds it."""
        self.path, self.node = path, node
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = locks.take(path / (".lock" if node == 0 else f".lock-{node}"))
        except OSError as error:
            raise Refused(str(path), f"cannot be written ({error.strerror})") from error
        self._held = needed(lock, str(path), "another process is training this run: choose another name=…")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._held)

    @property
    def events_path(self) -> Path:
        return self.path / ("events.jsonl" if self.node == 0 else f"events-{self.node}.jsonl")

    def events(self) -> Iterator[dict[str, Any]]:
        return events.read(self.events_path)

    def checkpointed(self) -> bool:
        return bool(manifest.candidates(self.path / "checkpoints"))

    def pinned(self, config: Train, origin: dict[str, Any] | None = None) -> Train:
        """The configuration with `auto` replaced by what this run, if it has begun, was pinned to.

        `origin` is the manifest of a checkpoint that an empty folder will go on from.
        """
        if (self.path / "config.yaml").exists():
            stored = identity(read_train(self.path / "config.yaml"))
        else:
            stored = origin.get("identity", {}) if origin else {}
        for key in PINNED:
            *groups, last = key.split(".")
            place = functools.reduce(getattr, groups, config)
            if getattr(place, last) == "auto" and key in stored:
                setattr(place, last, stored[key])
        return config

    def finished(self, config: Train) -> dict[str, Any] | None:
        """The summary of a run that has done all its steps already."""
        summary = read_json(path := self.path / "summary.json")
        whole = not summary or (type(summary.get("stopped")), type(summary.get("steps"))) == (bool, int)
        require(whole, str(path), "is no summary of a run: remove it, and the run goes on")
        return summary if summary and not summary["stopped"] and summary["steps"] >= config.steps else None

    def admit(self, config: Train, origin: dict[str, Any] | None = None) -> bool:
        """Check that this configuration may go on here; returns whether there is something to resume in this folder.

        `origin` is the manifest of a checkpoint elsewhere that may be fetched.

        Raises Refused: `resume=never` on a run, `resume=required` without a checkpoint, or other settings than the
        run's own: all that differ, with the override that allows them.
        """
        if self.node == 0:
            manifest.tidy(self.path / "checkpoints")
        begun = (self.path / "config.yaml").exists()
        mode = config.resume.mode
        if begun and mode is ResumeMode.never:
            raise Refused(str(self.path), "holds a run already, and resume=never: choose another name=…")
        if not self.checkpointed():
            if mode is ResumeMode.required and origin is None:
                nor = f", nor has {config.resume_from}" if config.resume_from else ""
                raise Refused(str(self.path), f"has no checkpoint to go on from{nor}, and resume=required")
            return False
        compare(plain_identity(read_train(self.path / "config.yaml")), config, "", "choose another name=…")
        return True

    def write(self, config: Train, data: dict[str, Any]) -> None:
        """Write the configuration, and the data that ranks read; Refused: a run begun with other data, a full disk."""
        stored = read_json(self.path / "data.json")
        if stored is not None and self.checkpointed() and stored.get("digest") != data["digest"]:
            more = "choose another name=…, or the data.revision=COMMIT of then, if it is the Hub's"
            raise Refused("data", f"the corpus is not the one that {self.path} began with: {more}")
        try:
            replace(self.path / "data.json", json.dumps({**data, "left_out": self.left_out()}, indent=1))
            replace(self.path / "config.yaml", to_yaml(config))
            for of_before in ("summary.json", WISH):
                (self.path / of_before).unlink(missing_ok=True)
        except OSError as error:
            raise Refused(str(self.path), f"cannot be written ({error.strerror})") from error

    def left_out(self) -> list[int]:
        """The batches that this run passes over, in order."""
        return list((read_json(self.path / "data.json") or {}).get("left_out", []))

    def go_back(self, step: int, width: int) -> None:
        """Let the next start be from there or before, and pass over the next so many batches."""
        for path in manifest.candidates(self.path / "checkpoints"):
            if (manifest.step_of(path.name) or 0) > step:
                shutil.rmtree(path)
        before = self.left_out()
        self.leave_out(passing(i, before) for i in range(step, step + width))

    def leave_out(self, batches: Iterable[int]) -> None:
        """Let the ranks that are started from now on pass over these too."""
        data = read_json(self.path / "data.json")
        assert data is not None, "it was written before any rank was started"
        data["left_out"] = sorted({*self.left_out(), *batches})
        replace(self.path / "data.json", json.dumps(data, indent=1))


def under_way(path: Path) -> bool:
    """Whether a supervisor holds this run's folder."""
    try:
        lock = locks.take(path / ".lock")
    except OSError as error:
        raise Refused(str(path / ".lock"), f"cannot be locked ({error.strerror})") from error
    if lock is not None:
        os.close(lock)
    return lock is None


def replace(path: Path, text: str) -> None:
    """Write a small file whole or not at all, whoever else does: in containers, processes have the same numbers."""
    draft = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        draft.write_text(text)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)  # of a full disk, or a folder in the file's place


def deliver(out: Path, text: str) -> None:
    """The same for what `out=` names."""
    try:
        replace(out, text)
    except OSError as error:
        raise Refused("out", f"'{out}' cannot be written ({error.strerror})") from error


def wished(path: Path) -> int | None:
    """How many ranks `colossus resize` asks for. A wish that cannot be read is none, and is taken away."""
    with contextlib.suppress(Refused):
        if (wish := read_json(path / WISH)) is None:
            return None
        if isinstance(devices := wish.get("devices"), int) and devices > 0:
            return devices
    (path / WISH).unlink(missing_ok=True)
    return None


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file."""
    try:
        if isinstance(value := json.loads(path.read_text()), dict):
            return value
        raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(str(path), f"cannot be read ({error})") from error


def locate(run: str, runs: str = "runs") -> Path:
    """The folder that `run=` names: a path, or a name under runs/. Raises Refused with the nearest name there is."""
    for path in (place(run, "run"), Path(runs) / run):
        if (path / "config.yaml").exists():
            return path
    there = sorted(path.parent.name for path in Path(runs).glob("*/config.yaml"))
    if not there:
        raise Refused("run", f"no run '{run}' here, and none under {runs}/: `colossus train` makes one")
    near = [f": did you mean {name}?" for name in difflib.get_close_matches(run, there, n=1)]
    raise Refused("run", f"no run '{run}' here or under {runs}/{''.join(near)} (`colossus runs` lists what is there)")


def to_yaml(config: Any) -> str:
    """Plain YAML, nothing left to resolve: what any YAML reader reads."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any, text: Callable[[str], str] = str) -> Any:
    """Enums by name; every string through `text`."""
    if isinstance(value, dict):
        return {key: _plain(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, text) for item in value]
    return value.name if isinstance(value, Enum) else text(value) if isinstance(value, str) else value


@functools.cache
def _schema(family: str) -> DictConfig:
    """What a run's configuration looks like, as OmegaConf has it: made once, since that is most of reading one."""
    schema = OmegaConf.structured(Train)
    for group, node in GROUPS.items():
        schema[group] = OmegaConf.structured(node)
    schema.model = OmegaConf.structured(MODELS[family])
    assert isinstance(schema, DictConfig)
    return schema


def read_train(path: Path, changes: Mapping[str, Any] | None = None) -> Train:
    """A run's `config.yaml` as it was written, with other values for some keys; `Refused` where it is none."""
    try:
        stored = yaml.safe_load(path.read_text())
        for key, value in (changes or {}).items():
            *groups, last = key.split(".")
            functools.reduce(dict.__getitem__, groups, stored)[last] = value
        stored = _plain(stored, lambda text: text.replace("${", "\\${"))  # not to be resolved
        config = OmegaConf.to_object(OmegaConf.merge(_schema(stored["model"]["family"]), stored))
    except (*MALFORMED, OmegaConfBaseException, yaml.YAMLError) as error:
        raise Refused(str(path), f"is not a run's configuration ({next(iter(str(error).splitlines()), '')})") from error
    assert isinstance(config, Train)
    return config
