"""`colossus launch`: what is submitted says what the user said, and nothing that training would refuse is submitted."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from train import cli, compose
from train.checks import Refused
from train.commands import HEEDED, Place, Target
from train.config import Train
from train.launch.job import Job
from train.launch.submit import PLACES
from train.remote import TOKEN

STRANGE = 'it\'s "$HOME" $(touch pwned) `id` ${x} \\ end'
STORE = "checkpoint.store=s3://bucket/run"
WHOLE = {
    "slurm": ["nodes=2", "target.gpus=8", "target.gpu=h100", "target.time=90min", "target.partition=big"],
    "skypilot": ["nodes=2", "target.gpus=8", "target.gpu=H100", STORE],
    "kubernetes": ["nodes=2", "target.gpus=8", "target.image=registry/colossus:cuda", STORE, "name=job"],
    "compose": ["nodes=2", "target.image=colossus:cpu"],
    "local": ["devices=2"],
}


def text(capsys: pytest.CaptureFixture[str], target: str, *arguments: str) -> str:
    code = cli.main(["launch", f"target={target}", *WHOLE[target], "dry=true", *arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def refused(target: str, *arguments: str) -> str:
    with pytest.raises(Refused) as caught:
        PLACES[(found := jobs(target, *arguments))[0].config.target.kind](found)
    return str(caught.value)


def jobs(target: str, *arguments: str, several: bool = False) -> list[Job]:
    return [Job(*one) for one in compose.jobs("launch", [f"target={target}", *arguments], several=several)]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins: each appends its name and words to `calls` and ends with what `<name>.code` says."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol", "sky", "kubectl", "docker"):
        path = folder / name
        path.write_text(
            f"#!/bin/bash\nprintf '%s\\n' \"$(basename $0)\" \"$@\" '' >> {folder}/calls\n"
            f"exit $(cat {folder}/{name}.code 2>/dev/null || echo 0)\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return folder


def calls(tools: Path) -> list[list[str]]:
    text = (tools / "calls").read_text() if (tools / "calls").exists() else ""
    return [call.split("\n") for call in text.split("\n\n") if call]


@pytest.mark.parametrize("target", list(WHOLE))
def test_a_mistake_submits_nothing(target: str, tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", f"target={target}", *WHOLE[target], "model.layerz=3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "did you mean model.layers?" in line
    assert calls(tools) == []
    assert not (Path.cwd() / "runs").exists()


@pytest.mark.parametrize("target", [target for target in WHOLE if target != "local"])
def test_a_missing_tool_is_one_line(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["launch", f"target={target}", *WHOLE[target]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert target in line
    assert "which is not here" in line


@pytest.mark.parametrize("several", [False, True])
def test_what_is_submitted_composes_to_the_same_job(several: bool) -> None:
    arguments = ["model=llama_mini", "optimizer.lr=1e-4", f"sample={STRANGE}", "logger=[]", *(["seed=1,2"] * several)]
    for seed, job in enumerate(jobs("slurm", *arguments, several=several), start=1):
        again = compose.config("train", job.arguments)
        assert type(again) is Train
        assert all(getattr(again, key) == getattr(job.config, key) for key in Train.__dataclass_fields__)
        assert again.sample == STRANGE
        assert not several or (again.seed, again.name) == (seed, f"llama_mini-seed={seed}")


def test_local_is_the_command_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[str]] = []

    def execv(path: str, words: list[str]) -> None:
        seen.append(words)
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    assert text(capsys, "local").endswith("-m train devices=2 name=llama_nano\n")
    with pytest.raises(SystemExit):
        cli.main(["launch", "devices=2", "steps=3"])
    assert seen[0][-3:] == ["devices=2", "steps=3", "name=llama_nano"]
    assert "devices=N" in refused("local", "nodes=2")


def submitted(*arguments: str) -> Path:
    """The batch script for these arguments."""
    assert cli.main(["launch", "target=slurm", *arguments]) == 0
    return next(Path("runs/.launch").absolute().glob("*.sbatch"))


def ran(tools: Path, script: Path, code: int = 0, **variables: str) -> tuple[int, list[list[str]]]:
    """How the batch script ends when srun ends with `code`, and what it called."""
    (tools / "srun.code").write_text(str(code))
    (tools / "scontrol.code").write_text("1")  # or the script waits to be taken back
    (tools / "calls").unlink()
    run = subprocess.run(["bash", script], env={**os.environ, "SLURM_JOB_ID": "12001", **variables}, cwd="/")
    return run.returncode, calls(tools)


def test_slurm_asks_for_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split("--")[1] for line in text(capsys, "slurm").splitlines() if line.startswith("#SBATCH")]
    wanted = {"nodes=2", "ntasks-per-node=1", "gpus-per-node=h100:8", "time=90", "partition=big", "signal=USR1@120"}
    assert {*wanted, "requeue", "open-mode=append"} <= set(lines)


def test_slurm_runs_the_words_as_they_are_and_queues_again_what_was_saved(tools: Path) -> None:
    script = submitted(f"sample={STRANGE}")
    assert calls(tools) == [["sbatch", f"runs/.launch/{script.name}"]]
    for code in (0, 1, 2, 75, 137):
        ended, called = ran(tools, script, code)
        assert ended == code
        assert called[0][0] == "srun"
        assert f"sample={STRANGE}" in called[0]
        assert called[1:] == [["scontrol", "requeue", "12001"]] * (code == 75)
    assert not any(path.name == "pwned" for path in Path.cwd().iterdir())


def test_slurm_sweeps_as_an_array(tools: Path) -> None:
    script = submitted("--multirun", "seed=5,6", "steps=3")
    assert "#SBATCH --array=0-1" in script.read_text().splitlines()
    _, ((_, *words),) = ran(tools, script, SLURM_ARRAY_TASK_ID="1")
    assert {"seed=6", "name='llama_nano-seed=6'"} <= set(words)


def test_skypilot_goes_on_from_75(capsys: pytest.CaptureFixture[str]) -> None:
    task = yaml.safe_load(text(capsys, "skypilot", f"sample={STRANGE}"))
    assert task["num_nodes"] == 2
    assert task["resources"]["accelerators"] == "H100:8"
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert task["resources"]["use_spot"] is True
    words = subprocess.run(
        ["bash", "-c", task["run"].replace("exec .venv/bin/colossus", "printf '%s\\n'")], capture_output=True, text=True
    ).stdout.splitlines()
    assert {f"sample={STRANGE}", "resume_from=s3://bucket/run"} <= set(words)


def test_kubernetes_trains_on_so_many_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    mounts = ["target.mounts=[corpus:/data]", "data=text", "data.path=/data/books", f"sample={STRANGE}"]
    secret, runtime, job = yaml.safe_load_all(text(capsys, "kubernetes", *mounts))
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"] == "job"
    assert job["spec"]["trainer"]["numNodes"] == 2
    assert job["spec"]["trainer"]["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "8"}
    assert f"sample={STRANGE}" in [word.replace("$$", "$") for word in job["spec"]["trainer"]["args"]]
    assert "data.path=/data/books" in job["spec"]["trainer"]["args"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert {"name": "mount-0", "persistentVolumeClaim": {"claimName": "corpus"}} in pod["volumes"]
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
    assert node["template"]["spec"]["backoffLimit"] == 100, "a pod that is lost comes back alone"


def test_compose_has_a_service_for_each_node(capsys: pytest.CaptureFixture[str]) -> None:
    services = yaml.safe_load(text(capsys, "compose", f"sample={STRANGE}"))["services"]
    assert [one["environment"]["PET_NODE_RANK"] for one in services.values()] == ["0", "1"]
    assert {one["environment"]["PET_MASTER_ADDR"] for one in services.values()} == {"node0"}
    assert f"sample={STRANGE}" in [word.replace("$$", "$") for word in services["node1"]["command"]]


def test_nodes_share_a_token_that_nobody_else_reads(tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another one for each job; on Slurm made there, for all nodes at once. One node needs none."""
    found: dict[str, Callable[[str], str]] = {
        "kubernetes": lambda text: next(yaml.safe_load_all(text))["stringData"][TOKEN],
        "skypilot": lambda text: yaml.safe_load(text)["secrets"][TOKEN],
        "compose": lambda text: "".join(
            {service["environment"][TOKEN] for service in yaml.safe_load(text)["services"].values()}
        ),
    }
    for target, read in found.items():
        tokens = {read(text(capsys, target)) for _ in range(2)}
        assert [len(token) for token in tokens] == [32, 32], target
    assert TOKEN not in text(capsys, "compose", "nodes=1")
    script = submitted()
    assert script.stat().st_mode & 0o077 == 0
    shebang, rest = (tools / "srun").read_text().split("\n", 1)
    (tools / "srun").write_text(f'{shebang}\necho "${TOKEN}" >> {tools}/tokens\n{rest}')
    for _ in range(2):
        ran(tools, script)
    assert [len(token) for token in set((tools / "tokens").read_text().split())] == [32, 32]


def test_a_sweep_elsewhere_is_a_job_each(tools: Path) -> None:
    arguments = ["--multirun", "target=kubernetes", "target.image=x", STORE, "name=a,b"]
    assert cli.main(["launch", *arguments]) == 0
    assert [call[-1] for call in calls(tools)] == [f"runs/.launch/{name}.k8s.yaml" for name in "ab"]
    (tools / "kubectl.code").write_text("3")
    assert cli.main(["launch", *arguments]) == 1


@pytest.mark.parametrize(
    ("target", "arguments", "words"),
    [
        ("skypilot", [], ["checkpoint.store", "s3://"]),
        ("skypilot", [STORE, "target.gpus=8"], ["target.gpu", "H100"]),
        ("skypilot", [STORE, "data=text", "data.path=."], ["data.path", "this machine only", "target.mounts"]),
        ("slurm", ["name='a b'"], ["name"]),
        ("kubernetes", [STORE, "target.image=x", "name=a_b"], ["name", "a_b"]),
        ("compose", ["target.image=x", "runs=/elsewhere"], ["runs", "leave it out"]),
        ("slurm", ["runs=/tmp/a\n#SBATCH --wrap=x"], ["runs", "cannot be printed"]),
        ("slurm", ["data=text", "data.path=[5]"], ["data.path", "5"]),
    ],
)
def test_what_a_place_cannot_do_is_refused(target: str, arguments: list[str], words: list[str]) -> None:
    message = refused(target, *arguments)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["target=slurm,local"], "target: "),
        (["target=slurm", "target.gpus=1,2"], "target: "),
        (["target=slurm", "nodes=1,2"], "nodes: "),
        (["target=slurm", "dry=true,false"], "dry: "),
        (["target=slurm", "steps=range(1,1)"], "no job"),
        (["target=slurm", "name=a,a"], "name: two jobs"),
    ],
)
def test_what_one_submission_cannot_vary_is_refused(
    arguments: list[str], word: str, tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", "--multirun", *arguments]) == 2
    captured = capsys.readouterr()
    assert word in captured.err
    assert (len(captured.err.splitlines()), captured.out, calls(tools)) == (1, "", [])


@pytest.mark.parametrize(
    ("kind", "keys", "words"),
    [
        (Place.skypilot, {"time": "2h"}, ["target.time", "slurm only"]),
        (Place.slurm, {"image": "x"}, ["target.image", "skypilot, kubernetes, compose"]),
        (Place.slurm, {"time": "2"}, ["target.time", "2h"]),
        (Place.slurm, {"partition": "a\nb"}, ["target.partition"]),
        (Place.slurm, {"gpu": "h100"}, ["target.gpus"]),
        (Place.kubernetes, {"mounts": ["a:b"]}, ["target.mounts", "/there"]),
    ],
)
def test_what_a_target_cannot_be_is_refused(kind: Place, keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(Refused) as caught:
        Target(kind=kind, **keys)
    assert all(word in str(caught.value) for word in words), caught.value


def test_every_key_of_a_target_has_places() -> None:
    assert set(HEEDED) == set(Target.__dataclass_fields__) - {"kind"}


def test_checkpoints_on_a_volume_need_no_bucket() -> None:
    (job,) = jobs("kubernetes", "target.image=x", "name=a", "runs=/kept/runs", "target.mounts=[claim:/kept]")
    _, trained = yaml.safe_load_all(PLACES[job.config.target.kind]([job])[0].text)
    assert not any(word.startswith("resume_from") for word in trained["spec"]["trainer"]["args"])
