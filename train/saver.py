"""Saving in the background: a step waits for a copy of its state, and a thread of each rank does the rest.

The threads agree through the store at which the ranks met, since a collective may be issued by one thread of a rank
only: each writer says there how its files came out, rank 0 commits once all have, or drops the draft and warns. Rank 0
asks whether an answer is there and never waits inside the store, whose client the whole process shares.

What goes wrong here (a full disk, an error of the disk, a rank that does not answer) ends no run.
"""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from train import checkpoint, events, manifest
from train.checks import Refused
from train.config import Checkpoint
from train.flat import Piece
from train.group import Group
from train.mirror import Mirror, reason

POLL = 0.02  # seconds between two looks into the store
FULL = (errno.ENOSPC, errno.EDQUOT)  # where a disk is full, rank 0 tries to save, says so, and the run goes on
LIMIT = 600.0  # seconds after which a writer that has not answered is not waited for


class NotSaved(Exception):
    """The state at the end of a run could not be saved. The other ranks may have left by then, or not."""

    fault = "not saved"


def find_writers(root: Path, pieces: Sequence[Piece], group: Group) -> list[int]:
    """The ranks that see rank 0's checkpoint folder. Raises Refused on one that does not, but has what only it has."""
    probe = root / f".probe-{group.broadcast(torch.tensor(secrets.randbits(62))).item():x}"
    if group.rank == 0:
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            if error.errno not in FULL:
                raise Refused(str(root), f"cannot be written ({error.strerror})") from error
    group.barrier()
    sees = probe.exists()
    seen = group.all_gather(torch.tensor(int(sees))).tolist()
    if group.rank == 0:
        probe.unlink(missing_ok=True)
    if not sees and not all(piece.replicated for piece in pieces):
        raise Refused("runs", f"{root} is not seen by rank {group.rank}, which holds a part of the state: share it")
    return [rank for rank, flag in enumerate(seen) if flag] or [0]


class Saver:
    """One rank's part in saving. `about` is what every manifest says."""

    def __init__(
        self,
        root: Path,
        group: Group,
        about: Mapping[str, Any],
        policy: Checkpoint,
        send: Callable[[events.Event], None],
        beat: Callable[[], object] = lambda: None,
    ) -> None:
        """`beat` is called again and again while a step waits for the save before."""
        self._root, self._group = root, group
        self._about, self._policy, self._send, self._beat = about, policy, send, beat
        self._thread: threading.Thread | None = None
        self._restored: int | None = None
        self._begun: int | None = None  # the step of the last save
        self._committed: set[int] = set()
        self._failed: str | None = None  # what is to be said of the last save, if it failed
        self._given_up = threading.Event()
        self._snapshot: checkpoint.Snapshot | None = None
        self._mirror: Mirror | None = None
        self._leads = False  # this rank has become rank 0, which it stays

    def regrouped(self, pieces: Sequence[Piece], step: int) -> None:
        """The ranks are new, and with them who writes what; `step` is where the run, or this rank, begins."""
        self._restored = step if self._restored is None else self._restored
        group = self._group
        # Rank 0's, or nodes that share the folder would each write a draft: only its record has every start of the run.
        epoch = int(group.broadcast(torch.tensor(self._about["writer_epoch"])).item())
        self._about = {**self._about, "writer_epoch": epoch}
        self._writers = find_writers(self._root, pieces, group)
        if self._snapshot is None:  # later ones, if larger, are made by the save that needs them: nobody waits here
            self._snapshot = checkpoint.Snapshot(checkpoint.deal(pieces, group.rank, self._writers))
        if group.rank != 0:
            return
        for draft in self._root.glob(f".draft-step-*-{epoch}.*"):  # of the ranks that there were
            shutil.rmtree(draft, ignore_errors=True)
        if not self._leads:
            self._leads = True
            for path in manifest.candidates(self._root):  # what another rank 0 has committed before
                with contextlib.suppress(manifest.Damaged):
                    found = manifest.read(path)
                    self._committed |= {found["step"]} if found.get("writer_epoch") == epoch else set()
            if self._begun is not None and self._begun < step and self._begun not in self._committed:
                self._warn(f"the checkpoint of step {self._begun} was not saved: rank 0 was lost before", self._begun)
        if self._policy.store and self._mirror is None:
            self._mirror = Mirror(self._root, self._policy, self._trusted, self._warn)

    def part(self, lost: Callable[[], bool]) -> bool:
        """The ranks change: wait for the save under way, unless one is `lost`. Returns whether that cost the save."""
        under_way = self._thread is not None and self._thread.is_alive()
        self._join(lost)
        self._given_up.clear()
        return under_way and self._failed is not None

    def _trusted(self, step: int) -> bool:
        """What is newer than the checkpoint that the run began at, and is not this run's, was damaged then."""
        return step <= (self._restored or 0) or step in self._committed

    def save(self, step: int, pieces: Sequence[Piece], more: Mapping[str, Any]) -> None:
        """Copy this rank's share and let the thread write it. Waits for the save before, if that is not done yet."""
        started, self._begun = time.perf_counter(), step
        self._join()
        mine = checkpoint.deal(pieces, self._group.rank, self._writers)
        if self._snapshot is None or not self._snapshot.holds(mine):
            self._snapshot = checkpoint.Snapshot(mine)
        share = self._snapshot.take(mine)
        waited = time.perf_counter() - started
        where = self._group.store, self._group.membership.epoch
        self._thread = threading.Thread(target=self._work, args=(*where, step, share, more, waited), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait, on all ranks, until the last save is whole and mirrored. Raises NotSaved on rank 0 if it failed."""
        self._join()
        self._group.barrier()  # rank 0 comes here when it has committed, or given up
        if self._mirror is not None:
            self._mirror.close(self._beat)
        if self._failed is not None:
            found = [path.name for path in manifest.candidates(self._root)]
            raise NotSaved(f"{self._failed}; the last checkpoint is {found[0] if found else 'none'}")

    def _join(self, lost: Callable[[], bool] = lambda: False) -> None:
        while self._thread is not None and self._thread.is_alive():
            if lost():
                self._given_up.set()
            self._beat()
            self._thread.join(1.0)

    # ------------------------------------------------------------------------------------- in the thread

    def _work(
        self, store: Store, epoch: int, step: int, share: Sequence[Piece], more: Mapping[str, Any], waited: float
    ) -> None:
        rank, started = self._group.rank, time.perf_counter()
        about = {**self._about, **more}
        draft = self._root / f".draft-{manifest.folder_name(step)}-{about['writer_epoch']}.{epoch}"
        key = f"save/{about['writer_epoch']}/{step}"
        if rank in self._writers:
            try:
                report = checkpoint.write(draft, rank, share)
            except Exception as error:
                report = {"error": reason(error)}
            with contextlib.suppress(RuntimeError):  # the first rank, and the store with it, is gone
                store.set(f"{key}/{rank}", json.dumps(report))
        if rank != 0:
            return
        try:
            reports = self._collect(store, key)
            errors = {writer: report["error"] for writer, report in reports.items() if "error" in report}
            if not errors:
                path, size = checkpoint.commit(self._root, draft, step, reports.values(), about)
        except Exception as error:
            errors = {0: reason(error)}
        self._failed = None
        if errors:
            shutil.rmtree(draft, ignore_errors=True)
            for writer, why in errors.items():
                self._failed = f"the state of step {step} was not saved (rank {writer}: {why})"
                self._warn(f"the checkpoint of step {step} was not saved: {why}", step, writer)
            return
        self._committed.add(step)
        wall = waited + time.perf_counter() - started
        self._send(events.Saved(step=step, path=str(path), bytes=size, seconds=waited, wall=wall))
        try:
            uploading = self._mirror.uploading if self._mirror else None
            manifest.prune(self._root, self._policy, self._trusted, spared=uploading)
        except OSError as error:
            self._warn(f"old checkpoints were not removed: {reason(error)}", step)
        if self._mirror is not None:
            self._mirror.update(step)

    def _collect(self, store: Store, key: str) -> dict[int, dict[str, Any]]:
        """What each writer says of its files; an error for one that says nothing in time."""
        reports = {writer: {"error": f"no answer within {LIMIT:.0f} s"} for writer in self._writers}
        until = time.monotonic() + LIMIT
        for writer in self._writers:
            while not (there := store.check([f"{key}/{writer}"])) and time.monotonic() < until:
                if self._given_up.wait(POLL):
                    reports[writer] = {"error": "a rank was lost meanwhile"}
                    break
            if there:
                reports[writer] = json.loads(store.get(f"{key}/{writer}"))
                store.delete_key(f"{key}/{writer}")
        return reports

    def _warn(self, text: str, step: int, rank: int = 0) -> None:
        self._send(events.Warned(rank=rank, step=step, text=text))
