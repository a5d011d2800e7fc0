"""Checkpoints in a bucket that fails now and then, on another host: nothing is lost, and nothing there is torn."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import Fresh
from tests.system import bad_bucket
from tests.system.hosts import address, on
from tests.system.test_hosts import Host, hosts
from tests.test_mirror import environment
from tests.test_recovery import of_kind, records
from tests.test_train import sha256, summary
from train import manifest
from train.manifest import SEAL

__all__ = ["hosts"]  # a fixture

pytestmark = pytest.mark.system

URL = "s3://bucket/run"
ENDLESS = ("steps=100000", "schedule=constant", "eval.every=0", "checkpoint.every=3")
CALM = "faults.at=[slow:1@forward:0:10:1000000]"  # steps take a while, so that the store keeps up with them
PATIENCE = 300.0  # seconds
# Everything that is there, fetched: what is torn or damaged raises.
FETCH = """import sys; from pathlib import Path; from train.mirror import Remote
store = Remote(sys.argv[1], "")
print(*[store.download(step, Path(sys.argv[2])).name for step in store.steps()])"""


class Bucket:
    """The store, on the second host."""

    def __init__(self, host: str, record: Path) -> None:
        self._record = record
        self.environment = environment(f"http://{address(1)}:{bad_bucket.PORT}")
        command = on(host, "python", "-m", "tests.system.bad_bucket", address(1), str(record))
        self.process = subprocess.Popen(command, env=os.environ | self.environment, stderr=subprocess.DEVNULL)

    def requests(self) -> list[list[str]]:
        """What was done to each so far, its method and path."""
        return [line.split() for line in self._record.read_text().splitlines()] if self._record.exists() else []

    def sealed(self) -> int:
        """How many checkpoints have been sealed there."""
        done = [one for one in self.requests() if one[1:2] == ["PUT"] and one[0] in ("served", "slow", "unanswered")]
        return sum(path.endswith(SEAL) for _, _, path in done)


@pytest.fixture
def bucket(hosts: list[str], tmp_path: Path) -> Iterator[Bucket]:
    store = Bucket(hosts[1], tmp_path / "requests")
    try:
        until = time.monotonic() + 60
        while ["ready"] not in store.requests():
            assert store.process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        yield store
    finally:
        store.process.kill()
        store.process.wait()


def seals(store: Bucket, node: Fresh, many: int) -> None:
    """Wait for so many checkpoints more to be sealed in the store."""
    before, until = store.sealed(), time.monotonic() + PATIENCE
    while store.sealed() < before + many:
        assert node.code() is None, node.end()
        assert time.monotonic() < until, Counter(one[0] for one in store.requests())
        time.sleep(0.02)


def test_a_host_is_lost_with_its_disk_beside_a_store_that_fails(
    hosts: list[str], bucket: Bucket, tiny: list[str], tmp_path: Path
) -> None:
    """Node 0 of two, which saves, is killed in the middle of an upload; the same command on an empty disk goes on."""
    more = (*ENDLESS, CALM, f"checkpoint.store={URL}", f"resume_from={URL}")
    first, other = (Host(hosts, index, tiny, tmp_path, *more, **bucket.environment) for index in (0, 1))
    seals(bucket, first, 3)
    first.process.kill()
    first.end()
    again = Host(hosts, 0, tiny, tmp_path / "an empty disk", *more, "resume=required", **bucket.environment)
    seals(bucket, again, 4)
    again.send(signal.SIGINT)
    code, said, err = again.end()
    assert code == 75, said + err
    assert other.end()[0] == 75
    found, end = records(again.folder), summary(again.folder)
    (restore,) = of_kind(found, "restore")
    assert f"fetched {manifest.folder_name(restore['step'])} from {URL}" in said
    assert restore["step"] % 3 == 0 < restore["step"]
    assert [start["world"] for start in of_kind(found, "start")] == [4]
    assert end["state_sha256"] == sha256(tiny, *ENDLESS, f"steps={end['steps']}", "devices=1", "name=alone")

    copies = tmp_path / "copies"
    fetched = subprocess.run(
        on(hosts[0], "python", "-c", FETCH, URL, str(copies)),
        env=os.environ | bucket.environment,
        capture_output=True,
        text=True,
    )
    assert fetched.returncode == 0, fetched.stderr
    newest = manifest.folder_name(end["steps"])
    assert fetched.stdout.split()[0] == newest
    assert (copies / newest / SEAL).read_bytes() == (again.folder / "checkpoints" / newest / SEAL).read_bytes()
    done = Counter(one[0] for one in bucket.requests())
    assert all(done[fault] for fault in bad_bucket.FAULTS.values()), done
