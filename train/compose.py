"""From an argument list to a checked configuration: Hydra composes, and what it refuses is said in one line.

Hydra's own errors fill a screen and end with code 1. Here a bad key is found before Hydra stumbles on it, and named
together with the nearest valid one; text is quoted for the user before Hydra's grammar sees it; and what remains is
turned into `Refused`.
"""

from __future__ import annotations

import copy
import difflib
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from train.checks import STOPPED, Refused, require
from train.commands import register
from train.config import CONFIGS, Train
from train.faults.plan import plan
from train.models.hf_config import adopt

# The last part of keys whose values are text, quoted whole; and of those where a list [a,b] may stand as well.
TEXT, PATHS = {"prompt", "sample", "store", "resume_from"}, {"path", "run", "runs", "cache"}
FILES = {"table", "out", "nanogpt"}  # the same, as whole keys only: faults.table is no path


@contextmanager
def hydra() -> Iterator[None]:
    register()
    GlobalHydra.instance().clear()
    here = initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3", job_name="colossus")
    with warnings.catch_warnings(action="ignore"), here:
        try:
            yield
        except HydraException as error:  # of a sweep: what can be said of a key has been
            raise Refused("--multirun", f"{_first_line(error)} (write key=a,b or key=range(1,4))") from error
        except OmegaConfBaseException as error:
            raise Refused(error.full_key or "", _first_line(error)) from error


def config(command: str, arguments: list[str]) -> Any:
    """The checked configuration of a command; raises `Refused`."""
    with hydra():
        return _checked(_compose(command, arguments))


def text(command: str, arguments: list[str]) -> str:
    """The same as YAML."""
    with hydra():
        return OmegaConf.to_yaml(_compose(command, arguments))


def sweep(command: str, arguments: list[str], job: Callable[[Any], int]) -> int:
    """Run `job` for every combination of `key=a,b` (or what another Hydra sweeper makes of it).

    All combinations are checked before the first one starts. A job whose name is not swept gets its own: the name,
    then what makes it different, `llama_nano-seed=1`. Returns the first exit code that is not 0.
    """
    with hydra():
        overrides = [_quoted(argument) for argument in arguments]
        parsed = _parse(overrides)
        swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
        if not any(o.startswith("hydra/sweeper=") for o in overrides):
            names = []
            for number, combination in enumerate(BasicSweeper.split_arguments(parsed, None)[0]):
                composed = _compose(command, list(combination))
                _name(composed, combination, swept, number)
                names.append(_checked(composed).name)
            _differ(names)

        def task(composed: DictConfig) -> int:
            hydra_config = HydraConfig.get()
            _default_name(composed, hydra_config.runtime.choices)
            _name(composed, hydra_config.overrides.task, swept, hydra_config.job.num)
            code = job(_checked(composed))
            if code == STOPPED:
                raise SystemExit(code)  # a request to stop stops the sweep, not one job of it
            return code

        engine = GlobalHydra.instance().hydra
        assert engine is not None
        jobs = engine.multirun(command, task, overrides=[*overrides, *_search_path()], with_log_configuration=False)
        codes = [result.return_value for batch in jobs for result in batch]
        return next((code for code in codes if code), 0)


def jobs(command: str, arguments: list[str], *, several: bool) -> list[tuple[Any, list[str]]]:
    """Each job of `launch`: its checked configuration, and the same as arguments of `colossus train`.

    With `several`, a job for each combination of `key=a,b`, under names as a sweep gives them. Paths of data below a
    mount are where the job will run, not here: in the configuration they are `/`.
    """
    with hydra():
        parsed = _parse([_quoted(argument) for argument in arguments])
        swept = {o.key_or_group for o in parsed if o.is_sweep_override()} if several else set()
        found: list[tuple[Any, list[str]]] = []
        for overrides in BasicSweeper.split_arguments(parsed, None)[0] if several else [arguments]:
            keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
            composed = _compose(command, list(overrides))
            if swept:
                _name(composed, overrides, swept, len(found))
            places = [str(mount).rpartition(":")[2] for mount in composed.target.mounts]
            for key in [key for key in _keys(composed.data) if key.split(".")[-1] == "path"]:
                OmegaConf.update(composed.data, key, _here(OmegaConf.select(composed.data, key), places))
            own = ("target", "dry", "name")
            kept = [o for key, o in zip(keys, overrides, strict=True) if key.split(".")[0] not in own]
            name = composed.name if re.fullmatch(r"[\w.-]+", composed.name) else f"'{composed.name}'"
            found.append((_checked(composed), [*kept, f"name={name}"]))
        _differ([config.name for config, _ in found])
    return found


def _name(composed: DictConfig, overrides: Iterable[str], swept: set[str], number: int) -> None:
    """A job of a sweep is called after what makes it different, unless names are swept over."""
    if "name" not in swept:
        different = [o for o in overrides if o.lstrip("+").split("=")[0] in swept]
        composed.name += "-" + (",".join(different).replace("/", "_") or str(number))


def _differ(names: list[str]) -> None:
    require(bool(names), "--multirun", "there is no job in it: a key is swept over no value")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), "")
    require(not twice, "name", f"two jobs of the sweep are called '{twice}': they would be one run")


def _here(path: Any, places: list[str]) -> Any:
    """`/` for a path below one of `places`."""
    if OmegaConf.is_list(path):
        return [_here(one, places) for one in path]
    return "/" if path and any(f"{path}/".startswith(f"{place}/") for place in places) else path


def values(command: str) -> dict[str, Any]:
    """A command's keys and what they are if nobody says otherwise; required ones are missing."""
    composed = _compose(command, [])
    return {key: OmegaConf.select(composed, key, throw_on_missing=False) for key in _keys(composed)}


def options(group: str) -> list[str]:
    """The variants of a config group, one's own in ./configs included; empty where it is none."""
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, ConfigLoaderImpl)  # its own get_group_options copies all schemas first, for each key
    names = set(loader.repository.get_group_options(group))
    names |= {path.stem for path in (Path.cwd() / "configs" / group).glob("*.yaml")}
    return sorted(name for name in names if not name.startswith("schema"))


def _checked(composed: DictConfig) -> Any:
    for key in _keys(composed):
        value = OmegaConf.select(composed, key, throw_on_missing=False)
        for one in value if OmegaConf.is_list(value) else [value]:
            require(not isinstance(one, float) or math.isfinite(one), key, f"{one} is no finite number")
    try:
        checked = OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        raise Refused(error.full_key or "", f"is required: add {error.full_key}=…") from error
    if isinstance(checked, Train):
        adopt(checked)
        keys = list(_keys(composed))
        for key in checked.resume.allowed():
            if key not in keys:
                raise Refused("resume.allow", f"there is no key {key}{did_you_mean(key, keys)}")
        plan(checked)  # refuses bad faults
    return checked


def _compose(command: str, arguments: list[str]) -> DictConfig:
    parsed = _parse([_quoted(argument) for argument in arguments])
    chosen = [override for override in parsed if _chooses(override)]
    words, own = [str(o.input_line) for o in chosen], _search_path()
    try:
        ConfigLoaderImpl.validate_sweep_overrides_legal(parsed, RunMode.RUN, from_shell=False)
        composed, choices = _variants(command, *words, *own) if own else copy.deepcopy(_kept(command, *words))
        for override in [o for o in parsed if o not in chosen]:
            _check_key(override, composed)  # in turn: one may name an element of a list that the one before has made
            ConfigLoaderImpl._apply_overrides_to_config([override], composed)
    except HydraException as error:
        cause = error.__cause__ or error
        key = next((o.key_or_group for o in parsed if o.input_line and o.input_line in str(error)), "")
        raise Refused(key or getattr(cause, "full_key", None) or "", _first_line(cause)) from error
    except (YAMLError, UnicodeDecodeError) as error:  # of a file of one's own, which the former names
        raise Refused("./configs", " ".join(str(error).split())) from error
    _default_name(composed, choices)
    return composed


def _variants(command: str, *chosen: str) -> tuple[DictConfig, dict[str, str]]:
    """What Hydra makes of the chosen variants of groups, and which ones those are; its 0.3 s are most of composing."""
    composed = compose(command, list(chosen), return_hydra_config=True)
    choices = dict(composed.hydra.runtime.choices)
    with open_dict(composed):
        del composed["hydra"]
    return composed, choices


_kept = functools.cache(_variants)  # the package's own files do not change while a process lives


def _default_name(composed: DictConfig, choices: dict[str, str]) -> None:
    """A run without a name is called after its experiment, or else its model."""
    if OmegaConf.is_missing(composed, "name"):
        composed.name = choices.get("experiment") or choices.get("model", "")


def _parse(overrides: list[str]) -> list[Override]:
    parsed = []
    for override in overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([override])
        except HydraException as error:
            key, equals, _ = override.partition("=")
            why = "its value cannot be read: put it in quotes, 'key=\"…\"'" if equals else "write it as key=value"
            raise Refused(key, why) from error
    return parsed


def _quoted(argument: str) -> str:
    """Quote the value of a text or path key, so that `prompt=def f(n):` means what it says."""
    key, _, value = argument.partition("=")
    last = key.rsplit(".", 1)[-1].lstrip("+")
    is_list, is_text = last in PATHS and value.startswith("["), last in TEXT | PATHS or key in FILES
    if not value or is_list or not is_text or re.fullmatch(r"'.*'|\".*\"", value, re.S):
        return argument
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)  # backslashes count only before a quote
    if escaped.endswith("\\"):
        escaped += "\\" * (len(escaped) - len(escaped.rstrip("\\")))
    return f"{key}='{escaped}'".replace("${", "\\${")


def _chooses(override: Override) -> bool:
    """Whether it chooses a variant of a group, or is a key of Hydra's own. Refuses a variant that there is not."""
    group, value = override.key_or_group, override.value()
    available = options(group)
    if available and value not in available and not override.is_sweep_override():  # `null` and `~group` have no value
        near, shown = did_you_mean(str(value), available), override.input_line if value is None else value
        raise Refused(group, f"'{shown}' is unknown{near} (choose from {', '.join(available)})")
    return bool(available) or group.startswith("hydra.")


def _check_key(override: Override, known: DictConfig) -> None:
    """Refuse a key that the composed configuration does not have, and name the nearest that it has."""
    key = override.key_or_group
    node: Any = known
    for part in key.split("."):
        if isinstance(node, ListConfig) and not node._is_none():
            node = node._get_node(int(part)) if part.isdecimal() and int(part) < len(node) else None
        else:
            inner = isinstance(node, DictConfig) and not node._is_none()
            node = node._get_node(part, validate_access=False) if inner else None
        if node is None:
            raise Refused(key, f"no such key{did_you_mean(key, list(_keys(known)))}")


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in map(str, node):
        key = f"{prefix}{name}"
        child = node._get_node(name)
        yield key
        if isinstance(child, DictConfig) and not child._is_missing() and not child._is_none():
            yield from _keys(child, key + ".")


def did_you_mean(word: str, valid: list[str]) -> str:
    """`: did you mean x?`: the nearest valid word, comparing last parts before whole keys."""
    last = word.rsplit(".", 1)[-1]
    same_end = [key for key in valid if key.rsplit(".", 1)[-1] == last]
    near = difflib.get_close_matches(word, same_end or valid, n=1, cutoff=0.3 if same_end else 0.5)
    if not near:
        by_end = {key.rsplit(".", 1)[-1]: key for key in reversed(valid)}
        near = [by_end[end] for end in difflib.get_close_matches(last, by_end, n=1, cutoff=0.6)]
    return f": did you mean {near[0]}?" if near else ""


def _search_path() -> list[str]:
    """`./configs` is searched too, so that one's own models and data sets need no edit here."""
    own = Path.cwd() / "configs"
    return [f"hydra.searchpath=['file://{own}']"] if own.is_dir() and own.resolve() != CONFIGS.resolve() else []


def _first_line(error: BaseException) -> str:
    """What an error says in its first line, or in two, where that one only leads to what it is."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])
