"""The image: built by buildah from a Debian made here, and `make train`'s job in it, for a few steps.

Building takes minutes and 3 GB, most of it for packages, so it is asked for: `COLOSSUS_IMAGE=1 make test-system`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.packages import need, need_root
from train import events

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parent.parent.parent


class Images:
    """buildah with a store of its own, which the tests' folder takes along when it goes."""

    def __init__(self, folder: Path) -> None:
        self._command = ["buildah", "--storage-driver=overlay", f"--root={folder}/store", f"--runroot={folder}/run"]

    def start(self, box: str, *words: str, **variables: str) -> subprocess.Popen[str]:
        """`colossus` in a container, left running."""
        more = [f"--env={name}={value}" for name, value in variables.items()]
        command = [
            *self._command,
            "run",
            "--isolation=chroot",
            *more,
            box,
            "--",
            "tini",
            "-s",
            "--",
            "colossus",
            *words,
        ]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def __call__(self, *words: str | Path) -> str:
        done = subprocess.run([*self._command, *words], capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout.strip()


def site(base: Path) -> list[str]:
    """Let pip in the image find packages as it does here; the folders that it needs for that, as volumes."""
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", base / "etc/ssl/certs/ca-certificates.crt")
    links = [path for path in os.environ.get("PIP_FIND_LINKS", "").split() if Path(path).is_dir()]
    lines = ["[global]", "cert = /etc/ssl/certs/ca-certificates.crt", "timeout = 180"]
    lines += [f"find-links = {' '.join(links)}"] if links else []
    (base / "etc/pip.conf").write_text("\n".join(lines) + "\n")
    return [word for path in links for word in ("--volume", f"{path}:{path}:ro")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    if not os.environ.get("COLOSSUS_IMAGE"):
        pytest.skip("skipped, because it takes minutes and 3 GB: COLOSSUS_IMAGE=1 runs it")
    need_root("building an image")
    need("buildah debootstrap", "buildah", "debootstrap", "runc")
    folder = tmp_path_factory.mktemp("images")
    base = folder / "base"
    made = ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(base)]
    if (done := subprocess.run(made, capture_output=True, text=True)).returncode:
        pytest.skip(f"skipped, because no Debian can be made here: {done.stdout[-200:]}")
    volumes = site(base)
    (folder / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    found = Images(folder)
    found("bud", "--isolation=chroot", "--file", folder / "Dockerfile", "--tag=localhost/base", base)
    arguments = ["--build-arg=BASE=localhost/base", "--build-arg=TORCH_INDEX=https://pypi.org/simple", *volumes]
    words = ["--isolation=chroot", "--format=docker", "--target=cpu", "--tag=colossus:cpu", *arguments]
    found("bud", *words, "--file", ROOT / "docker/Dockerfile", ROOT)
    for name in ("box", "node0", "node1"):
        found("from", f"--name={name}", "localhost/colossus:cpu")
    yield found
    found("rm", "--all")
    found("rmi", "--all", "--force")


def test_the_image_is_nobodys_root_and_holds_no_secret(images: Images) -> None:
    config: dict[str, Any] = json.loads(images("inspect", "--type=image", "localhost/colossus:cpu"))["Docker"]["config"]
    assert config["User"] == "1000"
    assert config["Entrypoint"] == ["tini", "--", "colossus"]
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    names = images("run", "--isolation=chroot", "box", "--", "env").upper()
    assert not any(word in names for word in ("TOKEN", "SECRET", "PASSWORD", "_KEY="))
    rest = images("run", "--isolation=chroot", "box", "--", "sh", "-c", "ls -a / /work /src 2>&1; true")
    assert not any(word in rest for word in (".git", ".ssh", ".env", "tests"))


def test_the_main_job_trains_in_it(images: Images) -> None:
    job = ["tini", "--", "colossus", "train", "steps=6", "eval.tokens=4096"]
    said = images("run", "--isolation=chroot", "box", "--", *job)
    assert "done: 6/6 steps" in said
    again = images("run", "--isolation=chroot", "box", "--", *job)
    assert "6" in again, "the run folder is the user's, and stays in the container"


JOB = ["name=pair", "devices=1", "model=llama_micro", "model.context=32", "data=synthetic", "precision=fp32"]
JOB += ["data.synthetic_tokens=100_000", "schedule=constant", "eval.every=0", "checkpoint.every=0", "logger=[]"]


def test_two_containers_train_together_and_one_is_killed(images: Images) -> None:
    """The other goes on; the lost one, started again as Compose would, joins it; the state is that of one process."""
    path = Path(images("mount", "node0")) / "work/runs/pair"

    def node(index: int) -> subprocess.Popen[str]:
        where = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "29417", "COLOSSUS_TOKEN": "of these two"}
        return images.start(f"node{index}", "train", "nodes=2", "steps=100000", *JOB, PET_NODE_RANK=str(index), **where)

    def wait_for(seen: Callable[[dict[str, Any]], bool]) -> None:
        until = time.monotonic() + 300
        while not any(map(seen, events.read(path / "events.jsonl"))):
            assert time.monotonic() < until, [one.communicate() for one in (head, other) if one.poll() is not None]
            time.sleep(0.1)

    head, other = node(0), node(1)
    wait_for(lambda record: record["kind"] == "step")
    for pid in supervisors(b"PET_NODE_RANK=1"):
        os.kill(pid, signal.SIGKILL)
    assert other.wait(timeout=300) != 0
    other = node(1)
    wait_for(lambda record: record["kind"] == "regroup" and record["world"] == 2)
    for pid in supervisors(b"PET_NODE_RANK=0"):
        os.kill(pid, signal.SIGINT)
    for process in (head, other):
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 75, out
    end = json.loads((path / "summary.json").read_text())
    images("run", "--isolation=chroot", "box", "--", "colossus", "train", *JOB, f"steps={end['steps']}")
    alone = Path(images("mount", "box")) / "work/runs/pair/summary.json"
    assert json.loads(alone.read_text())["state_sha256"] == end["state_sha256"]
    found = list(events.read(path / "events.jsonl"))
    assert [record["kind"] for record in found].count("start") == 1
    assert [record["world"] for record in found if record["kind"] == "regroup"] == [1, 2]


def supervisors(variable: bytes) -> list[int]:
    """The processes of `colossus` in a container, told by a variable that only its command has."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            here = variable in (path / "environ").read_bytes().split(b"\0")
            if here and b"name=pair" in words and words[0].startswith(b"/opt/venv/bin/python"):
                found.append(int(path.name))
    assert found
    return found
