"""A run goes on from anything: requests by signal to whomever, kills at any moment, another number of ranks."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.running import Running, at_step, descendants, gone
from tests.test_train import sha256, steps, summary, train
from train import channel, cli, compose, events, job, manifest, plan, pulse
from train.channel import MARK, RECORDED, STOP, Channel
from train.checks import Refused
from train.folder import FREE, LOCAL, RunFolder, identity
from train.pulse import Pulse

Records = list[dict[str, Any]]
FRAGILE = ("recovery.in_place=false", "recovery.restarts=0")  # a lost rank ends the run
ENDLESS = ("steps=100000", "schedule=constant", "eval.every=0", "checkpoint.every=0")  # a constant rate: no end to know


def ranks() -> list[int]:
    """The ranks of a run in this process, in the order of their logs' names."""
    pids = descendants(forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]
    return sorted(pids, key=lambda pid: os.readlink(f"/proc/{pid}/fd/1"))


def wait_until(condition: Callable[[], bool]) -> None:
    """In a thread beside a run: goes on after a minute all the same, for the run to end and the test to fail."""
    until = time.monotonic() + 60
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)


def train_and(
    action: Callable[[list[int]], None], when: Callable[[Records], bool], overrides: list[str], *more: str
) -> tuple[int, Path]:
    """Train in this process; once `when` holds of the run's events, do `action` to its ranks, who must then be gone."""
    settings = dict(argument.split("=", 1) for argument in [*overrides, *more])
    record = Path(settings["runs"]) / settings["name"] / "events.jsonl"
    seen: list[int] = []

    def watch() -> None:
        wait_until(lambda: when(list(events.read(record))))
        seen.extend(ranks())
        action(seen)

    thread = threading.Thread(target=watch)
    thread.start()
    result = train(overrides, *more)
    thread.join()
    assert len(seen) == int(settings["devices"])
    assert gone(set(seen), within=60)
    return result


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # its parent's end was its own
            os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------- signals

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
ME = -1  # the supervisor, which is the process of the test


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[int | None]]:
    """Who has been asked to stop, as far as the run `a` has recorded it. No rank that is held up is killed for it."""
    monkeypatch.setattr(pulse, "silent", lambda *_: None)
    record = tmp_path / "runs" / "a" / "events.jsonl"
    return lambda: {one["rank"] for one in events.read(record) if one["kind"] == "asked"}


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ([(1, TERM)], "rank 1 was asked to stop (SIGTERM)"),
        ([(0, INT), (1, TERM), (2, USR1)], "was asked to stop ("),
        ([(ME, USR1)], "asked to stop (SIGUSR1)"),
        ([(0, TERM), (ME, TERM), (1, TERM), (2, TERM)], "asked to stop (SIGTERM)"),
        ([(ME, TERM), (ME, INT), (1, INT), (1, TERM)], "asked to stop"),  # each twice at once: an echo
    ],
    ids=["one-rank", "all-ranks", "parent", "everybody", "echo"],
)
def test_a_request_to_anybody_stops_all_after_the_same_step(
    sent: list[tuple[int, signal.Signals]],
    said: str,
    tiny: list[str],
    asked: Callable[[], set[int | None]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 75, the state of the very step saved, nothing lost: to the bit what so many steps give undisturbed."""
    monkeypatch.setattr(channel, "time", SimpleNamespace(monotonic=lambda: 1000.0))  # for the parent all is at once
    whom = {None if who == ME else who for who, _ in sent}

    def ask(pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # for a rank, what comes before it goes on
        for who, number in sent:
            os.kill(os.getpid() if who == ME else pids[who], number)
        for pid in pids[1:]:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: asked() >= whom - {0})
        time.sleep(0.3)  # they get into a collective, and stay there for longer than an echo
        os.kill(pids[1], signal.SIGSTOP)  # nor does the run end before rank 0 has been heard
        os.kill(pids[0], signal.SIGCONT)
        wait_until(lambda: asked() >= whom)
        os.kill(pids[1], signal.SIGCONT)

    code, folder = train_and(ask, at_step(4), tiny, *ENDLESS, "name=a", "devices=3")
    assert code == 75
    stopped = summary(folder)
    assert stopped["stopped"]
    assert said in capsys.readouterr().out
    assert asked() == whom
    (saved,) = manifest.candidates(folder / "checkpoints")
    assert saved.name == manifest.folder_name(stopped["steps"])
    same = (*ENDLESS, "name=b", "devices=1", f"steps={stopped['steps']}")
    assert stopped["state_sha256"] == sha256(tiny, *same)


def test_a_request_during_evaluation_or_a_save_is_heeded_afterwards(tiny: list[str]) -> None:
    more = (*ENDLESS, "eval.every=1", "eval.tokens=4000", "checkpoint.every=1", "name=a", "devices=2")
    code, folder = train_and(lambda pids: os.kill(pids[1], USR1), at_step(3), tiny, *more)
    assert code == 75
    found, refused = manifest.newest(folder / "checkpoints")
    assert found is not None
    assert (found.step, refused) == (summary(folder)["steps"], [])


def takes(pid: int, number: signal.Signals) -> bool:
    """Whether a signal to this process would find a thread that does not block it."""
    masks = [re.search(r"SigBlk:\s*(\w+)", path.read_text()) for path in Path(f"/proc/{pid}/task").glob("*/status")]
    return any(mask is not None and not int(mask[1], 16) >> (number - 1) & 1 for mask in masks)


def test_a_second_signal_ends_a_rank_at_once(
    tiny: list[str], asked: Callable[[], set[int | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it is stuck in: here a collective, because another rank is stopped."""

    def ask_twice(pids: list[int]) -> None:
        os.kill(pids[0], signal.SIGSTOP)
        time.sleep(0.3)
        os.kill(pids[1], TERM)
        wait_until(lambda: asked() == {1})
        wait_until(lambda: takes(pids[1], TERM))
        os.kill(pids[1], TERM)

    assert train_and(ask_twice, at_step(4), tiny, *ENDLESS, *FRAGILE, "name=a", "devices=2")[0] == 1
    err = capsys.readouterr().err
    assert "rank 1 failed" in err
    assert "killed by SIGTERM" in err
    assert len(err.splitlines()) == 1


def test_a_second_signal_to_the_parent_stops_at_once_and_the_last_checkpoint_stands(
    tiny: list[str], asked: Callable[[], set[int | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    def ask_twice(pids: list[int]) -> None:
        os.kill(pids[0], signal.SIGSTOP)
        os.kill(os.getpid(), TERM)
        wait_until(lambda: asked() == {None})
        time.sleep(2 * channel.ECHO)
        os.kill(os.getpid(), INT)

    more = (*ENDLESS, "checkpoint.every=2", "name=a", "devices=2")
    code, folder = train_and(ask_twice, at_step(5), tiny, *more)
    assert code == 1
    assert "stopped at once (SIGINT)" in capsys.readouterr().out
    found, refused = manifest.newest(folder / "checkpoints")
    assert found is not None
    assert refused == []
    total = f"steps={found.step + 3}"
    again = sha256(tiny, *more, total, "resume.allow=steps", "devices=3")
    assert again == sha256(tiny, *more, total, "name=b", "devices=1")


@pytest.mark.parametrize("number", [TERM, INT, USR1], ids=["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_before_there_are_ranks_is_no_failure(
    number: signal.Signals, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the data is prepared: 75, since the same command starts again. While keys are still being read: 130."""
    handlers = [signal.getsignal(n) for n in (TERM, INT, USR1)]
    with monkeypatch.context() as patch:
        patch.setattr(job, "prepare", lambda *_, **__: os.kill(os.getpid(), number))
        code, folder = train(tiny, "name=a", "devices=1")
    assert code == 75
    assert f"asked to stop ({number.name}) before the first step" in capsys.readouterr().out
    assert not (folder / "checkpoints").exists()
    with monkeypatch.context() as patch:
        patch.setattr(compose, "config", lambda *_: os.kill(os.getpid(), number))
        assert train(tiny, "name=a", "devices=1")[0] == cli.INTERRUPTED
    assert [signal.getsignal(n) for n in (TERM, INT, USR1)] == handlers


def test_a_signal_to_every_process_of_the_job_while_it_starts(tiny: list[str]) -> None:
    """As Slurm sends it: to the parent, to the server that ranks are forked from, to ranks that build their model."""
    running = Running(tiny, *ENDLESS, "name=a", "devices=2")
    wait_until(lambda: len(running.children()) >= 3)  # forkserver, two ranks
    pids = running.children()
    for number in (signal.SIGSTOP, TERM, signal.SIGCONT):  # nobody has ended before all are asked
        for pid in [*sorted(pids), running.process.pid]:
            os.kill(pid, number)
    code, _, err = running.end()
    assert code == 75, err
    assert gone(pids, within=60)
    (saved,) = manifest.candidates(running.folder / "checkpoints")
    assert saved.name == manifest.folder_name(summary(running.folder)["steps"])


def test_nothing_is_saved_ahead_of_the_record_and_no_request_is_lost_on_the_way(tmp_path: Path) -> None:
    """`settle` returns when the supervisor has answered, keeps a request that came before, and fails without one."""
    ours, theirs = multiprocessing.Pipe()
    memory = pulse.create(tmp_path / "pulse")
    rank = Channel(theirs, Pulse(tmp_path / "pulse"))
    thread = threading.Thread(target=rank.settle)
    thread.start()
    assert ours.recv_bytes() == MARK
    signs = {bytes(memory)}
    while len(signs) < 3:  # of life, however long the answer takes; pytest's time-out ends this otherwise
        signs.add(bytes(memory))
        time.sleep(0.01)
    ours.send_bytes(STOP)
    ours.send_bytes(b"a word that this version does not know")
    thread.join(0.1)
    assert thread.is_alive()
    ours.send_bytes(RECORDED)
    thread.join(60)
    assert not thread.is_alive()
    assert rank.stop_requested()
    ours.close()
    with pytest.raises((OSError, EOFError)):
        rank.settle()


# ------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def begun(tiny: list[str]) -> RunFolder:
    """A run that has begun and saved something, as far as its folder shows."""
    config = plan.resolve(compose.config("train", [*tiny, "name=a", "devices=1"]))
    with RunFolder(config.folder) as run:
        run.write(config, {"digest": "of the corpus"})
    (run.path / "checkpoints" / "step-00000003").mkdir(parents=True)
    return run


def admitted(run: RunFolder, tiny: list[str], *more: str) -> bool:
    return run.admit(plan.resolve(run.pinned(compose.config("train", [*tiny, "name=a", "devices=1", *more]))))


def test_all_keys_that_differ_are_named_with_what_allows_them(begun: RunFolder, tiny: list[str]) -> None:
    other = ("optimizer.lr=0.5", "seed=1", "steps=9", "devices=2")
    with pytest.raises(Refused) as refusal:
        admitted(begun, tiny, *other, "resume.allow=steps")
    assert str(refusal.value) == (
        "optimizer.lr: 0.01 -> 0.5, seed: 0 -> 1: choose another name=… "
        "or allow it with resume.allow=[steps,optimizer.lr,seed]"
    )
    assert admitted(begun, tiny, *other, "resume.allow=[steps,optimizer.lr,seed]")
    assert admitted(begun, tiny, *other, "resume.allow=[steps,optimizer,seed]"), "a group stands for its keys"
    with pytest.raises(Refused, match=r"^seed: 0 -> 1: .* resume\.allow=seed$"):
        admitted(begun, tiny, "seed=1")


def test_what_has_no_say_in_the_bits_may_change(begun: RunFolder, tiny: list[str], tmp_path: Path) -> None:
    """Also where the corpus lies: its contents are compared by their digest."""
    free = ["devices=3", "eval.every=1", "checkpoint.every=7", "checkpoint.keep=9", "log.every=1", "logger=[csv]"]
    free += ["reduce.bucket_mib=1", "stop_after=1h", "sample=def", f"data.cache={tmp_path}", f"data.path={tmp_path}"]
    assert admitted(begun, tiny, *free)
    for bits in (
        "reduce=fast",
        "batch.micro_batch=1",
        "model.dropout=0.1",
        "data.tokenizer.vocab=290",
        "precision=bf16",
    ):
        with pytest.raises(Refused):
            admitted(begun, tiny, bits)


def test_free_keys_cover_what_moves_work_but_not_how_sums_round() -> None:
    free = {
        "batch.weights",
        "sharding",
        "evidence",
        "resume_from",
        "checkpoint",
        "reduce.bucket_mib",
        "reduce.hosts_first",
    }
    assert free <= set(FREE)
    assert not {"reduce", "reduce.dtype", "batch", "schedule", "compile", "accelerator"} & set(FREE)


def test_nodes_must_agree_on_all_that_the_ranks_do_together(tiny: list[str]) -> None:
    config = compose.config("train", [*tiny, "name=a"])
    assert {"eval.every", "checkpoint.every", "reduce.bucket_mib", "reduce.hosts_first"} <= set(identity(config, LOCAL))
    assert not {"runs", "data.cache", "data.path", "name"} & set(identity(config, LOCAL))


def test_a_key_to_allow_that_does_not_exist_is_refused_with_the_nearest(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny, "name=a", "resume.allow=[steps,optimizer.rl]")[0] == 2
    err = capsys.readouterr().err
    assert "resume.allow: there is no key optimizer.rl" in err
    assert "did you mean optimizer.lr?" in err


# --------------------------------------------------------------------------------------------------- kills


def numbers(folder: Path) -> dict[int, str]:
    """The loss of each step, every bit; a step that was repeated repeats its bits."""
    found: dict[int, str] = {}
    for step in steps(folder):
        assert found.setdefault(step["step"], step["loss_hex"]) == step["loss_hex"], step
    return found


def same_as_undisturbed(folder: Path, tiny: list[str], *more: str) -> None:
    code, whole = train(tiny, *more, "name=whole", "devices=1")
    assert code == 0
    ours, theirs = summary(folder), summary(whole)
    for key in ("state_sha256", "steps", "tokens", "final_loss", "val_bpb", "stopped"):
        assert ours[key] == theirs[key], key
    assert numbers(folder) == numbers(whole)
    assert list(numbers(whole)) == list(range(1, theirs["steps"] + 1))


def test_four_two_three_one_four_ranks_with_a_kill_at_each_change(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The parent killed; a rank killed; a parent that had stood still while its ranks went on; the parent again."""
    more, recorded = ("schedule=constant", "eval.every=10"), 0
    name = [*tiny, *more, "steps=100000", "name=a"]
    for world, still in ((4, 0.0), (2, 0.0), (3, 0.7), (1, 0.0)):
        on = at_step(recorded + 7)  # past the second save, which waits for the first
        if world == 2:
            code, folder = train_and(lambda pids: kill(pids[1:]), on, name, *FRAGILE, "devices=2")
            assert code == 1
        else:
            running = Running(name, f"devices={world}")
            running.wait_for(on)
            pids = running.children()
            if still:
                running.send(signal.SIGSTOP)
                time.sleep(still)
            running.process.kill()
            running.end()
            assert gone(pids, within=60)
        recorded = max(numbers(running.folder))
        newest = manifest.candidates(running.folder / "checkpoints")[0]
        assert newest.name <= manifest.folder_name(recorded), "no checkpoint is ahead of the record"
    total = f"steps={recorded + 4}"
    code, folder = train(name, "devices=4", total, "resume.allow=steps")
    assert code == 0
    assert summary(folder)["world_sizes"] == [4, 2, 3, 1, 4]
    same_as_undisturbed(folder, tiny, *more, total)
    capsys.readouterr()
    assert cli.main(["runs", f"runs={folder.parent}", "format=json"]) == 0
    listed = {run["name"]: run for run in json.loads(capsys.readouterr().out)}
    assert {run["state"] for run in listed.values()} == {"done"}
    assert listed["a"]["steps"] == listed["whole"]["steps"] == recorded + 4
    assert listed["a"]["tokens"] == listed["whole"]["tokens"]


def test_killed_at_many_moments(tiny: list[str]) -> None:
    """All ranks at once, when the record has grown by so many lines; each time another number of ranks goes on."""
    more = ("schedule=constant", "eval.every=4", "checkpoint.every=2")
    name = [*tiny, *more, "steps=100000", "name=a"]
    base = 0
    for world, lines in ((2, 2), (3, 3), (1, 6), (4, 9), (2, 12)):
        limit = base + lines
        settings = [*name, *FRAGILE, f"devices={world}"]
        code, folder = train_and(kill, lambda records: len(records) >= limit, settings)  # noqa: B023
        assert code == 1
        base = len(list(events.read(folder / "events.jsonl")))
    total = f"steps={max(numbers(folder)) + 4}"
    assert train(name, "devices=3", total, "resume.allow=steps")[0] == 0
    same_as_undisturbed(folder, tiny, *more, total)


def test_the_whole_tree_killed_in_a_save(tiny: list[str]) -> None:
    """Old or new, never a mix: while a draft lies there, every process is killed, the supervisor first."""
    more = ("schedule=constant", "eval.every=0", "checkpoint.every=1")
    running = Running(tiny, *more, "steps=100000", "name=a", "devices=2")
    drafts = running.folder / "checkpoints"
    running.wait_for(at_step(3))
    until = time.monotonic() + 60
    while not any(drafts.glob(".draft-*")) and time.monotonic() < until:
        pass
    pids = running.children()
    kill([running.process.pid, *pids])
    running.end()
    assert gone(pids, within=60)
    found, refused = manifest.newest(drafts)
    assert found is not None
    assert refused == []
    total = f"steps={max(numbers(running.folder)) + 4}"
    assert train(tiny, *more, total, "name=a", "devices=3", "resume.allow=steps")[0] == 0
    assert not any(drafts.glob(".draft-*"))
    same_as_undisturbed(running.folder, tiny, *more, total)
