"""Saving while training goes on: by several ranks, through errors, to a bucket and back onto another machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins import Precision
from torch._C._distributed_c10d import HashStore

from tests import dist
from tests.running import Running, at_step, descendants, gone
from tests.test_checkpoint import cut, digest, flip, pieces, restored, simple, state
from tests.test_mirror import aws, environment, s3
from tests.test_resume import ENDLESS
from tests.test_train import sha256, summary, train
from train import checkpoint, cli, events, folder, manifest, saver
from train.checks import Refused
from train.config import Checkpoint
from train.console import Console
from train.group import Group, Place
from train.mirror import Remote
from train.saver import NotSaved, Saver

__all__ = ["aws", "s3"]  # fixtures


class Threads(Group):
    """A group whose ranks are threads of this process, whose collectives nobody needs here."""

    def barrier(self, name: str | None = None) -> None:
        pass


def savers(root: Path, world: int, heard: list[events.Event], restored: int = 0, **policy: Any) -> list[Saver]:
    store, found = HashStore(), []
    for rank in range(world):
        group = Threads(Place.alone(), Precision())
        group.store = store
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(saver, "find_writers", lambda *_: list(range(world)))
            group.rank = rank
            about = {"writer_epoch": 1}
            found.append(Saver(root, group, about=about, policy=Checkpoint(**policy), send=heard.append))
            found[-1].regrouped(cut(state(0.0), rank, world), restored)
    root.mkdir(exist_ok=True)
    return found


def save(all_of_them: list[Saver], step: int, value: float) -> None:
    world = len(all_of_them)
    for rank, one in enumerate(all_of_them):
        one.save(step, cut(state(value), rank, world), {})


def wait(all_of_them: list[Saver]) -> None:
    """Wait until the last save has been written, or given up."""
    for one in all_of_them:
        one._join()


def finish(all_of_them: list[Saver]) -> None:
    for one in reversed(all_of_them):
        one.finish()


def test_ranks_save_together_and_old_checkpoints_go(tmp_path: Path) -> None:
    heard: list[events.Event] = []
    ranks = savers(tmp_path / "c", 3, heard, keep=2)
    for step in (1, 2, 3):
        save(ranks, step, float(step))
    finish(ranks)
    assert [path.name[-1] for path in manifest.candidates(tmp_path / "c")] == ["3", "2"]
    assert digest(3, restored(tmp_path / "c/step-00000003")) == digest(3, state(3.0))
    assert [event.kind for event in heard] == ["checkpoint"] * 3
    assert not list((tmp_path / "c").glob(".*"))


def test_a_checkpoint_that_was_passed_over_pushes_no_whole_one_out(tmp_path: Path) -> None:
    """The run went on from step 4 because 6 was damaged: 6 is not the newest of those that count."""
    root = tmp_path / "c"
    simple(root, 4)
    flip(simple(root, 6) / "model-00000.safetensors")
    ranks = savers(root, 2, [], restored=4, keep=1, store=f"{tmp_path}/store")
    save(ranks, 5, 5.0)
    finish(ranks)
    assert [path.name for path in root.iterdir()] == ["step-00000005"]
    assert Remote(f"{tmp_path}/store", "").steps() == [5]


def test_a_step_waits_for_the_copy_and_the_end_for_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, sync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (go.wait(30), sync(descriptor))[1])
    ranks = savers(tmp_path / "c", 2, [])
    tensors = [cut(state(1.0), rank, 2) for rank in range(2)]
    for one, mine in zip(ranks, tensors, strict=True):
        one.save(1, mine, {})
    for piece in (piece for mine in tensors for piece in mine):
        piece.data.fill_(7.0)  # training goes on
    assert manifest.candidates(tmp_path / "c") == []
    threading.Timer(0.2, go.set).start()
    finish(ranks)
    assert digest(1, restored(tmp_path / "c/step-00000001")) == digest(1, state(1.0))


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_a_rank_that_cannot_write_costs_a_checkpoint_and_no_more(
    call: str, culprit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[events.Event] = []
    root = tmp_path / "c"
    ranks = savers(root, 2, heard)
    save(ranks, 1, 1.0)
    wait(ranks)
    write, real, troubled = checkpoint._write_file, getattr(os, call), threading.local()

    def full(path: Path, mine: Any) -> dict[str, Any]:
        troubled.here = f"-0000{culprit}." in path.name
        try:
            return write(path, mine)
        finally:
            troubled.here = False

    def fails(*args: Any, **kwargs: Any) -> Any:
        if getattr(troubled, "here", False):
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_file", full)
        patch.setattr(os, call, fails)
        save(ranks, 2, 2.0)
        wait(ranks)
    (warning,) = [event for event in heard if isinstance(event, events.Warned)]
    assert (warning.step, warning.rank) == (2, culprit)
    assert "No space left on device" in warning.text
    assert [path.name for path in root.iterdir()] == ["step-00000001"], "nothing of it is left"
    with pytest.raises(NotSaved, match=f"step 2 was not saved.*rank {culprit}.*step-00000001"):
        finish(ranks)
    save(ranks, 3, 3.0)
    finish(ranks)
    assert digest(3, restored(root / "step-00000003")) == digest(3, state(3.0))


def test_a_rank_that_says_nothing_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each writer in turn is gone; the old checkpoint stays, and no draft."""
    heard: list[events.Event] = []
    root = tmp_path / "c"
    ranks = savers(root, 3, heard)
    save(ranks, 1, 1.0)
    wait(ranks)
    monkeypatch.setattr(saver, "LIMIT", 0.2)
    for silent in (1, 2):
        for rank in (2, 1, 0):  # who answers at all has done so by the time that rank 0 looks
            if rank != silent:
                ranks[rank].save(1 + silent, cut(state(2.0), rank, 3), {})
                wait(ranks)
        warning = heard[-1]
        assert isinstance(warning, events.Warned)
        assert (warning.step, warning.rank) == (1 + silent, silent)
        assert "no answer" in warning.text
        assert [path.name for path in root.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("lost", [False, True])
def test_a_save_outlasts_a_change_of_ranks_that_loses_none(tmp_path: Path, lost: bool) -> None:
    """Rank 1 answers in rank 0's second look around; of a rank that is lost no answer is waited for."""
    heard: list[events.Event] = []
    ranks = savers(tmp_path / "c", 2, heard)
    ranks[0].save(1, cut(state(1.0), 0, 2), {})
    looks: list[bool] = []

    def look() -> bool:
        looks.append(lost)
        if len(looks) == 2:
            ranks[1].save(1, cut(state(1.0), 1, 2), {})
        return lost

    assert ranks[0].part(look) is lost
    assert [event.kind for event in heard] == ["warning" if lost else "checkpoint"]
    assert not ranks[1].part(look)


def test_what_is_being_uploaded_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a store that is slower than `keep` saves would never have a whole one."""
    go, begun, upload, whole = threading.Event(), threading.Event(), Remote.upload, list[int]()

    def slow(self: Remote, path: Path) -> None:
        begun.set()
        assert go.wait(60)
        upload(self, path)
        whole.append(manifest.verify(tmp_path / "there" / path.name).step)

    monkeypatch.setattr(Remote, "upload", slow)
    heard: list[Any] = []
    (one,) = savers(tmp_path / "here", 1, heard, keep=1, store=str(tmp_path / "there"))
    for step in (1, 2, 3):
        save([one], step, float(step))
        wait([one])
        assert begun.wait(60)
    assert [path.name[-1] for path in manifest.candidates(tmp_path / "here")] == ["3", "1"]
    go.set()
    one.finish()
    assert whole[0] == 1
    assert [Remote(str(tmp_path / name), "").steps() for name in ("here", "there")] == [[3], [3]]
    assert not [event for event in heard if isinstance(event, events.Warned)]


def seen(group: Group, root: str, partial: bool) -> Any:
    """Rank 1 of 2 looks into another folder, as on a node that does not share rank 0's."""
    mine = cut(state(0.0), group.rank, group.world) if partial else pieces(state(0.0))
    folder = Path(root) / ("a" if group.rank != 1 else "b")
    try:
        return saver.find_writers(folder, mine, group)
    except Refused as refusal:
        return str(refusal)


def test_who_does_not_see_the_folder_writes_nothing_or_is_refused(tmp_path: Path) -> None:
    assert dist.run("tests.test_saving:seen", 3, root=str(tmp_path), partial=False) == [[0, 2]] * 3
    first, second, third = dist.run("tests.test_saving:seen", 3, root=str(tmp_path), partial=True)
    assert first == third == [0, 2]
    assert second.startswith("runs: ")
    assert "rank 1" in second
    assert not (tmp_path / "b").exists()
    assert list((tmp_path / "a").iterdir()) == []


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def finds_no_room(group: Group, root: str) -> list[int]:
    Path.touch = full  # type: ignore[method-assign,assignment]
    return saver.find_writers(Path(root), pieces(state(0.0)), group)


def test_rank_0_tries_to_save_where_the_disk_is_full(tmp_path: Path) -> None:
    """Ranks that regroup find out who can write: that nobody can just now is no reason to end the run."""
    assert dist.run("tests.test_saving:finds_no_room", 2, root=str(tmp_path)) == [[0], [0]]


def test_what_is_said_on_a_full_disk_is_lost_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where standard output goes to a file."""
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: False, write=full, flush=full))
    Console().say("step 1")


# --------------------------------------------------------------------------------------- the whole command


def test_a_run_that_finds_no_room_for_its_summary_is_done_and_one_for_its_settings_refused(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, there = folder.replace, "summary.json"
    monkeypatch.setattr(folder, "replace", lambda path, text: full() if path.name == there else write(path, text))
    code, path = train(tiny, "name=a", "devices=1", "steps=2")
    assert code == 0
    assert "summary.json could not be written (No space left on device)" in capsys.readouterr().out
    assert records(path, "end")[-1]["step"] == 2
    there = "config.yaml"
    assert train(tiny, "name=b", "devices=1", "steps=2")[0] == 2
    assert "b: cannot be written (No space left on device)" in capsys.readouterr().err


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in events.read(folder / "events.jsonl") if record["kind"] == kind]


def file_limit(pids: list[int], size: int) -> None:
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_ends_no_run(tiny: list[str]) -> None:
    """For a while files of more than 100 kB cannot be written (EFBIG): warnings, and the bits of an untroubled run."""
    running = Running(tiny, "name=a", "devices=2", *ENDLESS, "checkpoint.every=5")
    running.wait_for(lambda found: any(record["kind"] == "checkpoint" for record in found))
    ranks = list(descendants(running.process.pid))
    file_limit(ranks, 100_000)
    running.wait_for(lambda found: sum(record["kind"] == "warning" for record in found) >= 3)
    file_limit(ranks, resource.RLIM_INFINITY)
    running.send(signal.SIGTERM)
    code, out, err = running.end()
    assert code == 75, err
    last = summary(running.folder)["steps"]
    assert "warning (rank " in out
    warnings = records(running.folder, "warning")
    assert all("File too large" in warning["text"] for warning in warnings)
    assert all(warning["step"] % 5 == 0 and warning["rank"] in (0, 1) for warning in warnings)
    assert not list((running.folder / "checkpoints").glob(".*"))
    found, refused = manifest.newest(running.folder / "checkpoints")
    assert found is not None
    assert (found.step, refused) == (last, [])
    saved = {record["step"] for record in records(running.folder, "checkpoint")}
    assert saved.isdisjoint(warning["step"] for warning in warnings)
    assert summary(running.folder)["state_sha256"] == sha256(tiny, *ENDLESS, "name=b", "devices=1", f"steps={last}")


def test_a_stop_that_did_not_save_does_not_say_so(tiny: list[str]) -> None:
    assert train(tiny, "name=a", "devices=1", "steps=3", "schedule=constant")[0] == 0
    running = Running(tiny, "name=a", "devices=2", *ENDLESS, "resume.allow=steps")
    running.wait_for(at_step(4))
    file_limit(list(descendants(running.process.pid)), 100_000)
    running.send(signal.SIGINT)
    code, out, err = running.end()
    assert code == 1
    assert "was not saved" in err
    assert "the last checkpoint is step-" in err
    assert len(err.splitlines()) == 1
    assert "goes on from here" not in out
    assert not list((running.folder / "checkpoints").glob(".*"))


def test_the_spot_story(tiny: list[str], aws: str, s3: str, tmp_path: Path) -> None:
    """Killed in mid-run and gone with its disk; the same command on an empty machine, with another world size, goes
    on from the bucket, past an upload that was torn, to the bits of a run that nothing happened to."""
    url = f"s3://{aws}/spot"
    overrides = [argument for argument in tiny if not argument.startswith("runs=")]
    more = ("name=a", *ENDLESS, "checkpoint.every=4", f"checkpoint.store={url}", f"resume_from={url}")
    first = Running(overrides, f"runs={tmp_path}/one", "devices=2", *more, **environment(s3))
    remote = Remote(url, "")

    def sealed() -> list[int]:
        return [step for step in remote.steps() if remote._fs.exists(remote._at(step, manifest.SEAL))]

    until = time.monotonic() + 120
    while len(sealed()) < 2:
        assert time.monotonic() < until
        assert first.code() is None, first.end()
        time.sleep(0.1)
    pids = first.children()
    first.process.kill()
    first.end()
    assert gone(pids, within=60), "nobody uploads any more"
    torn, whole = sealed()[:2]
    remote._fs.rm_file(remote._at(torn, manifest.SEAL))
    steps = f"steps={whole + 12}"
    second = Running(
        overrides,
        f"runs={tmp_path}/two",
        "devices=3",
        *more,
        steps,
        "resume=required",
        "resume.allow=steps",
        **environment(s3),
    )
    code, said, err = second.end()
    assert code == 0, err
    assert f"fetched {manifest.folder_name(whole)}" in said
    assert any(manifest.folder_name(torn) in warning["text"] for warning in records(second.folder, "warning"))
    (restore,) = records(second.folder, "restore")
    assert restore["step"] == whole
    assert summary(second.folder)["state_sha256"] == sha256(tiny, *ENDLESS, "name=a", "devices=1", steps)
    assert remote.read(whole + 12)["step"] == whole + 12
    there = [step for step in remote.steps() if step <= whole + 12]
    assert there == Remote(f"{second.folder}/checkpoints", "").steps() == [whole + 12, whole + 8], "as many as here"
    text = (second.folder / "events.jsonl").read_text() + said + err + (second.folder / "config.yaml").read_text()
    assert environment(s3)["AWS_SECRET_ACCESS_KEY"] not in text


def test_a_run_goes_on_from_another_folder_only_if_it_is_the_same(
    tiny: list[str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = [*tiny, "schedule=constant", "devices=1"]
    code, first = train(constant, "name=a", "checkpoint.keep_best=true", "checkpoint.keep=1")
    assert code == 0
    scores = {record["step"]: record["loss"] for record in records(first, "eval")}
    for path in manifest.candidates(first / "checkpoints"):
        found = manifest.read(path)
        assert found["val_loss"] == scores[found["step"]]
    origin, store = (f"{key}={first}/checkpoints" for key in ("resume_from", "checkpoint.store"))
    other = shutil.copytree(corpus, tmp_path / "other")
    (other / "one more.py").write_text("pass\n")

    for more, words in (
        (["name=b", "optimizer.lr=0.5"], ["optimizer.lr", "0.01", "0.5", "resume.allow=optimizer.lr"]),
        (["name=c", "data.validation=0.2", "resume.allow=data.validation"], ["data:", "corpus"]),
        (["name=d", "resume=never"], ["resume_from", "resume=never"]),
        (["name=e", store, "seed=3"], ["seed", "checkpoint.store"]),
        (["name=other", store, f"data.path={other}"], ["checkpoint.store: the run at", "another corpus"]),
    ):
        extra = [] if store in more else [origin]
        capsys.readouterr()
        assert train(constant, *more, *extra)[0] == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
        assert not (tmp_path / "runs" / more[0][5:] / "checkpoints").exists()

    empty = f"resume_from={tmp_path}/nothing"
    assert train(constant, "name=f", empty, "resume=required")[0] == 2
    assert "nothing" in capsys.readouterr().err
    assert train(constant, "name=g", empty, "steps=1")[0] == 0
    assert "starting at step 0" in capsys.readouterr().out

    code, done = train(constant, "name=done", origin)
    assert code == 0, "there is nothing left to do"
    ours, theirs = summary(done), summary(first)
    assert (ours["steps"], ours["state_sha256"]) == (theirs["steps"], theirs["state_sha256"])

    path = manifest.candidates(first / "checkpoints")[0]
    found = json.loads((path / manifest.MANIFEST).read_text())
    found["fingerprint"]["torch"] = "0.1"
    raw = json.dumps(found).encode()
    (path / manifest.MANIFEST).write_bytes(raw)
    (path / manifest.SEAL).write_text(hashlib.sha256(raw).hexdigest())
    code, second = train(constant, "name=h", origin, "steps=9", "resume.allow=steps")
    assert code == 0
    said = capsys.readouterr().out
    assert "bitwise equality ends here: torch 0.1 ->" in said
    assert records(second, "warning")[0]["step"] == 6
    assert summary(second)["state_sha256"] == sha256(constant, "name=i", "steps=9")


def test_what_a_run_under_way_removes_meanwhile_is_not_damaged(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = train(tiny, "name=a", "devices=1")
    whole = manifest.verify

    def late(path: Path, progress: Any) -> manifest.Verified:
        if path.name == "step-00000003":
            shutil.rmtree(path)
        return whole(path, progress)

    monkeypatch.setattr(manifest, "verify", late)
    capsys.readouterr()
    assert cli.main(["verify", f"run={path}", "format=json"]) == 0
    assert [one["step"] for one in json.loads(capsys.readouterr().out)] == [6]


def test_what_somebody_has_put_aside_is_no_checkpoint(tmp_path: Path) -> None:
    with folder.RunFolder(tmp_path) as run:
        (tmp_path / "checkpoints" / "step-00000003.bad").mkdir(parents=True)
        assert not run.checkpointed()


def test_verify_says_what_is_damaged(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = train(tiny, "name=a", "devices=2")
    capsys.readouterr()
    assert cli.main(["verify", f"run={folder}"]) == 0
    assert capsys.readouterr().out.count("whole") == 2
    flip(folder / "checkpoints/step-00000003/optimizer-00001.safetensors")
    assert cli.main(["verify", f"run={folder}"]) == 1
    said = capsys.readouterr()
    assert "damaged" in said.out
    assert "step-00000003" in said.err
    assert "optimizer-00001.safetensors" in said.err
    assert cli.main(["verify", f"run={folder}", "step=6"]) == 0
    assert cli.main(["verify", f"run={folder}", "step=3", "format=json"]) == 1
    out = capsys.readouterr().out
    (found,) = json.loads(out[out.index("[") :])
    assert (found["step"], found["whole"], found["files"]) == (3, False, 6)
    assert cli.main(["verify", f"run={folder}", "step=4"]) == 2
    assert cli.main(["verify", "run=nosuchrun"]) == 2
