"""Slurm itself: a controller and two nodes on this machine, in namespaces of their own; what `launch` submits there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.packages import need, need_root
from tests.test_train import sha256, summary
from train import events

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

# `high` takes nodes from `low`, whose jobs are asked to stop (SIGTERM) and have a minute for it.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=alpha
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
NodeName=alpha NodeHostname=alpha NodeAddr=10.78.0.1 Port=17001 CPUs=2
NodeName=beta NodeHostname=alpha NodeAddr=10.78.0.1 Port=17002 CPUs=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2
"""

# The first process of the namespaces: when it goes, the kernel ends all others.
CLUSTER = """\
set -e
hostname alpha
ip link set lo up
ip link add pc0 type veth peer name pc1  # Slurm looks for an address that is not loopback's
ip addr add 10.78.0.1/24 dev pc0
ip link set pc0 up
ip link set pc1 up
printf '127.0.0.1 localhost\\n10.78.0.1 alpha beta\\n' > {folder}/hosts
mount --bind {folder}/hosts /etc/hosts
mkdir {folder}/state {folder}/spool-alpha {folder}/spool-beta
head -c 1024 /dev/urandom > {folder}/munge.key
chmod 600 {folder}/munge.key
munged --force --key-file={folder}/munge.key --socket={folder}/munge.socket --log-file={folder}/munged.log \
  --pid-file={folder}/munged.pid --seed-file={folder}/munged.seed
export SLURM_CONF={folder}/slurm.conf
slurmctld -D &
slurmd -D -N alpha &
slurmd -D -N beta &
echo $$ > {folder}/up
wait
"""


class Cluster:
    def __init__(self, process: int, folder: Path) -> None:
        self.process, self.folder = process, folder

    def run(self, *words: str | Path) -> str:
        """What a command prints there."""
        variables = [f"SLURM_CONF={self.folder}/slurm.conf", "SLURM_TIMEOUT=60"]
        inside = ["nsenter", "--target", str(self.process), "--mount", "--net", "--pid", "--uts", f"--wd={Path.cwd()}"]
        done = subprocess.run([*inside, "env", *variables, *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def launch(self, *arguments: str) -> str:
        """The number of the job that `colossus launch` submits."""
        code = "import sys; from train.cli import main; sys.exit(main())"
        said = self.run(sys.executable, "-c", code, "launch", "target=slurm", *arguments)
        return said.rsplit(" ", 1)[-1]

    def state(self, job: str) -> str:
        return " ".join(
            sorted(set(self.run("squeue", "--noheader", "--states=all", "--format=%T", f"--job={job}").split()))
        )

    def wait_for(self, job: str, *states: str, seconds: float = 240) -> str:
        until = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < until, f"job {job} is {state}: {self.run('scontrol', 'show', 'job', job)}"
            time.sleep(0.5)
        return state


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    need_root("Slurm as several nodes on one machine")
    need("slurmctld slurmd sbatch munged", "slurmctld", "slurmd", "slurm-client", "munge")
    need("ip", "iproute2")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
    (folder / "cluster").write_text(CLUSTER.format(folder=folder))
    spaces = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with (folder / "log").open("w") as log:
        outer = subprocess.Popen([*spaces, "bash", folder / "cluster"], stdout=log, stderr=log)
    try:
        until = time.monotonic() + 30
        while not (folder / "up").exists():
            if outer.poll() is not None or time.monotonic() > until:
                pytest.skip(f"skipped, because no Slurm starts here: {(folder / 'log').read_text()[-300:]}")
            time.sleep(0.1)
        first = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0]
        found = Cluster(int(first), folder)
        while "idle" not in found.run("sinfo", "--noheader", "--format=%T %D") and time.monotonic() < until:
            time.sleep(0.2)
        yield found
    finally:
        outer.kill()
        outer.wait()


def recorded(folder: Path, *kinds: str) -> int:
    path = folder / "events.jsonl"
    return sum(record["kind"] in kinds for record in events.read(path)) if path.exists() else 0


@pytest.fixture
def job(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder of its own, and a job of two nodes that takes a while."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH", "")))))
    monkeypatch.chdir(tmp_path)
    return [*tiny, "devices=1", "steps=60", "eval.every=0", "checkpoint.every=0", "log.every=50"]


def test_a_job_of_two_nodes_is_preempted_saves_and_is_finished(
    cluster: Cluster, job: list[str], tmp_path: Path
) -> None:
    number = cluster.launch("nodes=2", "name=a", "target.partition=low", *job)
    folder = tmp_path / "runs/a"
    until = time.monotonic() + 120
    while recorded(folder, "step") < 5:
        assert time.monotonic() < until, cluster.run("scontrol", "show", "job", number)
        time.sleep(0.1)
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--exclusive", "--nodes=2", "--wrap=sleep 3", "--output=/dev/null"
    )
    cluster.wait_for(urgent, "COMPLETED")
    cluster.wait_for(number, "PENDING", seconds=60)
    cluster.run("scontrol", "update", f"job={number}", "StartTime=now")  # Slurm would wait for two minutes
    cluster.wait_for(number, "COMPLETED")
    found = summary(folder)
    assert recorded(folder, "start") == 2, "it was started once more"
    assert recorded(folder, "step") == 60, "no step was done twice: what was stopped had saved"
    assert found["world_sizes"] == [2, 2]
    assert found["state_sha256"] == sha256(job, "name=b")


def test_a_job_that_is_cancelled_does_not_come_back(cluster: Cluster, job: list[str], tmp_path: Path) -> None:
    number = cluster.launch("name=a", *job, "steps=100000")
    until = time.monotonic() + 120
    while recorded(tmp_path / "runs/a", "step") < 5:
        assert time.monotonic() < until
        time.sleep(0.1)
    cluster.run("scancel", number)
    assert cluster.wait_for(number, "CANCELLED", seconds=60)
    time.sleep(3)
    assert cluster.state(number) == "CANCELLED"


def test_a_sweep_is_an_array(cluster: Cluster, job: list[str], tmp_path: Path) -> None:
    number = cluster.launch("--multirun", "name=s", "seed=1,2", *job, "steps=6")
    cluster.wait_for(number, "COMPLETED")
    found = {name: summary(tmp_path / f"runs/s-seed={name}")["state_sha256"] for name in "12"}
    assert len(set(found.values())) == 2
    assert found["2"] == sha256(job, "name=b", "seed=2", "steps=6")
