"""Configuration: what is valid is composed, what is not is refused by name, with the nearest valid one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from train import cli, compose
from train.checks import Refused, seconds
from train.config import ResumeMode, SourceKind, Train
from train.folder import read_train, to_yaml
from train.shapes import Llama

TEXT_SOURCE = Path(__file__).parent


def refused(*overrides: str, command: str = "train") -> str:
    with pytest.raises(Refused) as caught:
        compose.config(command, list(overrides))
    return str(caught.value)


def test_the_main_job_composes() -> None:
    config = compose.config("train", [])
    assert isinstance(config, Train)
    assert isinstance(config.model, Llama)
    assert config.data.kind is SourceKind.stdlib
    assert config.name == "llama_nano"
    assert config.resume.mode is ResumeMode.auto


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trian.steps=3", ["trian.steps", "did you mean steps?"]),
        ("+nope=1", ["nope"]),
        ("++model.layerz=3", ["model.layerz", "did you mean model.layers?"]),
        ("model=nope", ["model", "nope", "llama_nano"]),
        ("optimizer=admw", ["did you mean adamw?"]),
        ("steps=x", ["steps", "Integer"]),
        ("steps", ["steps", "key=value"]),
        ("steps=0", ["steps", "use 1 or more"]),
        ("batch.virtual_ranks=0", ["batch.virtual_ranks", "use 1 or more"]),
        ("batch.sequences=63", ["batch.sequences", "virtual ranks", "multiple of 8"]),
        ("batch.micro_batch=5", ["batch.micro_batch", "does not divide"]),
        ("devices=9", ["devices", "batch.virtual_ranks"]),
        ("devices=none", ["devices", "auto"]),
        ("model.heads=5", ["model.heads", "width"]),
        ("precision=fp8", ["precision", "fp32, bf16"]),
        ("logger=[tensorbord]", ["logger", "tensorboard"]),
        ("name=a/b", ["name", "a/b"]),
        ("stop_after=5", ["stop_after", "50min"]),
        ("reduce.bucket_mib=0", ["reduce.bucket_mib"]),
        ("schedule.decay=2", ["schedule.decay"]),
        ("model=null", ["model", "llama_nano"]),
        ("model=[a,b]", ["model", "llama_nano"]),
        ("data=5", ["data", "'5' is unknown"]),
        ("~model", ["model", "llama_nano"]),
        ("~model=llama_nano", ["model: is required"]),
        ("~name", ["name", "does not exist"]),
        ("logger.9=csv", ["logger.9: no such key"]),
        ("logger.0=x", ["logger: 'x' is unknown"]),
        ("resume.allow=5", ["resume.allow", "no key 5"]),
        ("resume.allow=[1,2]", ["resume.allow", "no key 1"]),
        ("stop_after=1.2.3h", ["stop_after", "50min"]),
        ("stop_after=.s", ["stop_after", "50min"]),
        ("optimizer.lr=inf", ["optimizer.lr", "finite"]),
        ("model.rope_base=nan", ["model.rope_base", "finite"]),
        ("batch.weights=[inf,1]", ["batch.weights", "finite"]),
        ("faults.days=nan", ["faults.days", "finite"]),
        ("runs=~nope/x", ["runs", "~nope"]),
        ("runs=a\nb", ["runs", "cannot be printed"]),
        (f"runs={'a' * 300}", ["runs", "too long"]),
        (f"name={'a' * 300}", ["name", "cannot be a folder's name"]),
        ("data.cache=~nope/x", ["data.cache", "~nope"]),
    ],
)
def test_a_mistake_is_named(override: str, words: list[str]) -> None:
    message = refused(override)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=grok_nano", "model.layers=3", "data=synthetic", "seed=7", "eval.every=${steps}"],
        ["++seed=4", "logger=[csv,csv]", "logger.1=tensorboard", "batch.weights=[1,2]", "steps=5", "steps=6"],
        ["data=mix", "data.parts.prose.path=.", "data.parts.prose.weight=7", "faults=drill", "faults.count=3"],
        ["reduce=fast", "optimizer=muon", "resume=never", "schedule.decay=0.5", "hydra.job.name=x", "name=y"],
    ],
)
def test_what_is_composed_is_what_hydra_composes_at_once(overrides: list[str]) -> None:
    """Here variants of groups come first, which are kept, and then one key after the other."""
    with compose.hydra():
        whole = hydra.compose("train", overrides)
        if OmegaConf.is_missing(whole, "name"):
            whole.name = whole.model.family + "_nano"
        assert compose._compose("train", overrides) == whole


def test_variants_are_composed_once_and_handed_out_as_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any, **more: Any) -> Any:
        calls.append(arguments)
        return hydra.compose(*arguments, **more)

    monkeypatch.setattr(compose, "compose", counted)
    compose._kept.cache_clear()
    first = compose.config("train", ["model=llama_micro"])
    other = compose.config("train", ["model=llama_micro", "seed=5", "model.layers=7", "logger=[csv]"])
    assert (other.seed, other.model.layers, other.logger) == (5, 7, ["csv"])
    assert compose.config("train", ["model=llama_micro"]) == first
    assert len(calls) == 1


def test_a_missing_data_path_is_named() -> None:
    assert "missing" in refused("data=text", "data.path=missing")
    assert "data.path" in refused("data=text")


def test_values_of_text_and_path_keys_are_quoted_for_the_user() -> None:
    for prompt in ("def f(n): return {n: '${x}'}", "it's, a = [b]", "~/x", "back\\slash\\", "a\\'b", "[1, 2", "=="):
        assert compose.config("sample", ["run=x", f"prompt={prompt}"]).prompt == prompt
    assert compose.config("sample", ["run=~/a b=c"]).run == "~/a b=c"
    assert compose.config("sample", ["run=x", "prompt='quoted by hand'"]).prompt == "quoted by hand"
    config = compose.config("train", ["data=text", f"data.path=[{TEXT_SOURCE},{TEXT_SOURCE}]"])
    assert config.data.paths() == [str(TEXT_SOURCE)] * 2
    url = "s3://bucket/a run=1,2"
    config = compose.config("train", [f"checkpoint.store={url}", f"resume_from={url}"])
    assert (config.checkpoint.store, config.resume_from) == (url, url)


def test_a_prompt_in_another_encoding_is_refused() -> None:
    latin = b"caf\xe9".decode(errors="surrogateescape")  # as Python decodes arguments
    with pytest.raises(Refused, match="prompt: is not UTF-8"):
        compose.config("sample", ["run=x", f"prompt={latin}"])
    with pytest.raises(Refused, match="sample: is not UTF-8"):
        compose.config("train", [f"sample={latin}"])


def test_a_mix_is_described_in_a_file_and_adjusted_on_the_command_line() -> None:
    """configs/data/mix.yaml as it ships, with other weights."""
    parts = compose.config("train", ["data=mix", "data.parts.prose.path=."]).data.parts
    assert {"code", "prose"} == set(parts)
    overrides = ["data=mix", "data.parts.prose.path=.", "data.parts.code.weight=7"]
    assert compose.config("train", overrides).data.parts["code"].weight == 7
    assert "data.parts.code.wait" in refused("data=mix", "data.parts.code.wait=7")


def test_own_configs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs/model").mkdir(parents=True)
    (tmp_path / "configs/model/mine.yaml").write_text("defaults: [schema_llama, _self_]\nlayers: 3\n")
    monkeypatch.chdir(tmp_path)
    config = compose.config("train", ["model=mine"])
    assert (config.model.layers, config.name) == (3, "mine")
    assert "mine" in refused("model=nope")
    (tmp_path / "configs/model/mine.yaml").write_text("defaults: [schema_llama, _self_]\nlayers: 5\n")
    assert compose.config("train", ["model=mine"]).model.layers == 5, "one's own files may change"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"defaults: [schema_llama, _self_]\nlayerz: 3\n", "model/mine.*'layerz'"),
        (b"layers: 3\n width: [\n", r"not allowed here.*mine\.yaml.*line 2"),
        (b"layers: \xff\n", "configs: 'utf-8'.*0xff"),
    ],
)
def test_a_mistake_in_a_file_of_ones_own_is_said_in_one_line(
    written: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs/model").mkdir(parents=True)
    (tmp_path / "configs/model/mine.yaml").write_bytes(written)
    monkeypatch.chdir(tmp_path)
    assert re.search(said, message := refused("model=mine"))
    assert "\n" not in message


def test_a_written_configuration_reads_back(tmp_path: Path) -> None:
    overrides = ["optimizer.lr=0.1", "data=mix", "data.parts.prose.path=.", "devices=3", "sample=a: ${b}"]
    config = compose.config("train", overrides)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_train(tmp_path / "config.yaml") == config
    (tmp_path / "config.yaml").write_text("nonsense")
    with pytest.raises(Refused, match=r"config\.yaml"):
        read_train(tmp_path / "config.yaml")


def test_durations() -> None:
    assert [seconds(text) for text in ("", "90s", "50min", "1.5h", "2d")] == [None, 90, 3000, 5400, 172800]


class Job:
    """Stands for a training run in a sweep: remembers what it was called with."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.seen: list[tuple[str, int]] = []

    def __call__(self, config: Train) -> int:
        self.seen.append((config.name, config.steps))
        return self.code


def test_a_sweep_runs_each_combination_under_its_own_name(tmp_path: Path) -> None:
    job = Job()
    assert compose.sweep("train", [f"runs={tmp_path}", "steps=1,2", "seed=3", "devices=2"], job) == 0
    assert job.seen == [("llama_nano-steps=1", 1), ("llama_nano-steps=2", 2)]


def test_a_sweep_with_one_bad_combination_starts_nothing(tmp_path: Path) -> None:
    job = Job()
    with pytest.raises(Refused, match="steps"):
        compose.sweep("train", [f"runs={tmp_path}", "steps=1,0"], job)
    assert job.seen == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("name=a,a", "name: two jobs of the sweep are called 'a'"),
        ("seed=1,1", "name: two jobs"),
        ("steps=range(1,1)", "no job in it"),
        ("steps=interval(1,3)", "--multirun: .*key=a,b"),
        ("steps=glob(*)", "--multirun: "),
        ("hydra/sweeper=nope", "--multirun: .*nope"),
    ],
)
def test_what_is_no_sweep_starts_nothing(override: str, words: str, tmp_path: Path) -> None:
    job = Job()
    with pytest.raises(Refused, match=words):
        compose.sweep("train", [f"runs={tmp_path}", override], job)
    assert job.seen == []


def test_a_sweep_stops_on_request_and_reports_the_first_failure(tmp_path: Path) -> None:
    assert compose.sweep("train", [f"runs={tmp_path}", "steps=1,2,3"], lambda c: 1 if c.steps == 2 else 0) == 1
    job = Job(code=75)
    with pytest.raises(SystemExit) as stopped:
        compose.sweep("train", [f"runs={tmp_path}", "steps=1,2,3"], job)
    assert stopped.value.code == 75
    assert len(job.seen) == 1


def test_help_names_every_key_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for words in ("batch.sequences=16", "the whole global batch", "llama_nano", "model.kv_heads", "exact | fast", "75"):
        assert words in text
    assert cli.main([]) == 0
    assert "sample" in capsys.readouterr().out


def test_unknown_commands_and_flags() -> None:
    assert cli.main(["trian"]) == 2
    assert cli.main(["train", "--frobnicate"]) == 2


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert cli.main(["train"]) == 2
    assert "devices=N" in capsys.readouterr().err


# What `python -m train` does; then, which of the slow ones it has imported.
MODULE = """
import runpy, sys
try:
    runpy.run_module("train", run_name="__main__", alter_sys=True)
finally:
    print("imported:", [name for name in ("torch", "lightning", "transformers") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["trian.steps=3"], "trian"),
        (["model=nope"], "nope"),
        (["batch.virtual_ranks=0"], "batch.virtual_ranks"),
        (["data=text", "data.path=missing"], "missing"),
        (["data.path=a\nb", "data=text"], "no such file or folder: a b"),
    ],
)
def test_refusals_from_the_outside(arguments: list[str], word: str, tmp_path: Path) -> None:
    """Exit code 2, one line, nothing started, nothing imported that takes seconds."""
    command = [sys.executable, "-c", MODULE, *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert word in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert result.stdout == "imported: []\n"


def test_output_that_cannot_be_written_is_one_line() -> None:
    """A full disk; a terminal without our signs; a file that a command stumbles on."""
    command = [sys.executable, "-m", "train"]
    with open("/dev/full", "w") as full:
        result = subprocess.run([*command, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (1, "colossus: the output: No space left on device\n")
    result = subprocess.run(
        [*command, "--help"], capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_file_in_the_way_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._guarded(lambda: len(Path("/proc/nothing").read_bytes())) == 1
    assert capsys.readouterr().err == "colossus: /proc/nothing: No such file or directory\n"


def test_groups_and_keys_of_other_commands() -> None:
    assert "no such key" in refused("run=R", "data.tokenizer.kind=bytes", command="eval")
    assert "colossus_100k" in refused("cluster=5", command="scale")
    assert "target: " in refused("target=null", command="launch")
    assert "seed" in refused("run=R", f"seed={10**20}", command="sample")
    assert "count" in refused("run=R", f"count={10**12}", command="sample")
    assert "micro_batch" in refused("run=R", f"micro_batch={10**12}", command="eval")


def test_a_sweep_is_for_what_trains(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "--multirun", "format=json,table"]) == 2
    assert "--multirun: sweeps are for train, plan, drill and launch" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_failure_to_explain() -> None:
    command = f"set -o pipefail; {sys.executable} -m train --help | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert result.stdout.startswith("colossus train")
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr
