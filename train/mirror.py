"""Checkpoints beside the machine that makes them: in a bucket, or in any place that fsspec has a URL for.

A machine that can be taken away keeps nothing. After each commit rank 0 copies the checkpoint to `checkpoint.store`,
its seal last: what is torn has none. `resume_from` brings the newest whole one into a run folder. Access comes from
where the service's own tools find it (environment, instance role), never from the URL.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from train import manifest
from train.checks import Refused
from train.config import Checkpoint
from train.data.store import sync
from train.manifest import MANIFEST, SEAL, Damaged, folder_name

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # URL scheme -> the extra that brings its file system
SECRET = re.compile("KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL")


class Remote:
    """Checkpoint folders under a URL, or under a local folder. Any call may raise what the file system raises."""

    def __init__(self, url: str, key: str) -> None:
        """`key` is the configuration's, for a refusal: of a URL of no known kind, or whose package is missing."""
        self.url, self._key = url, key
        try:
            import fsspec  # only where it is asked for

            self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            extra = EXTRAS.get(url.partition("://")[0])
            how = f"pip install -e '.[{extra}]' in a checkout" if extra else str(error).splitlines()[0]
            raise Refused(key, f"{url} needs a package that is not installed: {how}") from error
        except ValueError as error:
            raise Refused(key, f"{url} is of no kind that is known ({str(error).splitlines()[0]})") from error
        self._root = root.rstrip("/")
        if hasattr(self._fs, "auto_mkdir"):  # of local files: elsewhere folders are but parts of names
            self._fs.auto_mkdir = True

    def _at(self, step: int, name: str = "") -> str:
        return f"{self._root}/{folder_name(step)}" + (f"/{name}" if name else "")

    def steps(self) -> list[int]:
        """The steps of the folders there, sealed or not, the newest first."""
        try:
            return manifest.steps(Path(path).name for path in self._fs.ls(self._root, detail=False))
        except FileNotFoundError:
            return []

    def read(self, step: int) -> dict[str, Any]:
        """A manifest that its seal vouches for; raises `Damaged`."""
        where = f"{self.url}/{folder_name(step)}"
        try:
            seal, raw = (bytes(self._fs.cat_file(self._at(step, name))) for name in (SEAL, MANIFEST))
        except FileNotFoundError as error:
            raise Damaged(f"{where}: is torn, it has no {MANIFEST} or no {SEAL}") from error
        return manifest.decode(raw, seal, where, step)

    def upload(self, path: Path) -> None:
        """Copy a checkpoint there if it is not: files, manifest, seal. One of the same step loses its seal first.

        A seal may have outlived what it vouches for, where a disk lost its power: files are there if their sizes are.
        """
        found, seal = manifest.read(path), (path / SEAL).read_bytes()
        with contextlib.suppress(FileNotFoundError):
            there = {Path(one["name"]).name: one["size"] for one in self._fs.ls(self._at(found["step"]), detail=True)}
            whole = all(there.get(name) == about["size"] for name, about in found["files"].items())
            if self._fs.cat_file(self._at(found["step"], SEAL)) == seal and whole:
                return
            self._fs.rm_file(self._at(found["step"], SEAL))
        for name in (*found["files"], MANIFEST, SEAL):
            self._fs.put_file(str(path / name), self._at(found["step"], name))

    def remove(self, step: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(step, SEAL))
        self._fs.rm(self._at(step), recursive=True)

    def download(self, step: int, root: Path) -> Path:
        """Bring a checkpoint into `root`, verified; raises `Damaged`, which leaves nothing there."""
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".draft-", dir=root) as draft:
            path = Path(draft) / folder_name(step)
            path.mkdir()
            try:
                for name in (*self.read(step)["files"], MANIFEST, SEAL):
                    with contextlib.suppress(FileNotFoundError):  # which `verify` says
                        self._fs.get_file(self._at(step, name), str(path / name))
                        sync(path / name)
                manifest.verify(path)
            except Damaged as damage:
                raise Damaged(str(damage).replace(draft, self.url)) from damage
            manifest.publish(path, root / path.name)
        return root / path.name


class Origin(Remote):
    """Where a run may be resumed from. What was passed over there, and why, is in `refused`."""

    refused: list[str]

    def manifests(self, above: int = -1) -> Iterator[dict[str, Any]]:
        """The sealed manifests there of steps above `above`, the newest first; raises Refused if it cannot be read."""
        self.refused, steps = [], list[int]()
        with self._passing_over():
            steps = self.steps()
        for step in steps:
            if step > above:
                with self._passing_over():
                    yield self.read(step)

    def fetch(self, root: Path, admit: Callable[[dict[str, Any]], object]) -> Path | None:
        """Bring the newest whole checkpoint into `root` if it is newer than what is whole there.

        `admit` may refuse a manifest. None where there is none.
        """
        here = manifest.newest(root)[0]
        for found in self.manifests(-1 if here is None else here.step):
            admit(found)
            with self._passing_over():
                return self.download(found["step"], root)
        return None

    @contextlib.contextmanager
    def _passing_over(self) -> Iterator[None]:
        try:
            yield
        except Damaged as damage:
            self.refused.append(str(damage))
        except Exception as error:
            raise Refused(self._key, f"{self.url} cannot be read ({reason(error)})") from error


class Mirror:
    """Keeps `checkpoint.store` as the local folder is, from a thread of its own. Its errors end no run."""

    def __init__(
        self, root: Path, policy: Checkpoint, trusted: Callable[[int], bool], warn: Callable[[str, int], None]
    ) -> None:
        self._remote = Remote(policy.store, "checkpoint.store")
        self._root, self._policy, self._trusted, self._warn = root, policy, trusted, warn
        self._step = 0  # committed last
        self.uploading: int | None = None  # which must not be removed meanwhile, or a slow store never has a whole one
        self._due, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def update(self, step: int) -> None:
        """The checkpoint of `step` has been committed: copy it, and what is missing of those before."""
        self._step = step
        self._due.set()

    def close(self, beat: Callable[[], object] = lambda: None) -> None:
        """Wait until all is copied, or has failed to be; `beat` is called again and again meanwhile."""
        self._closing.set()
        self._due.set()
        while self._thread.is_alive():
            beat()
            self._thread.join(1.0)

    def _work(self) -> None:
        last = False
        while not last:
            self._due.wait()
            self._due.clear()
            last, step = self._closing.is_set(), self._step
            try:
                if step:
                    if last:  # nobody saves any more: what was spared while it was uploaded may go
                        manifest.prune(self._root, self._policy, self._trusted)
                    self._copy(step)
            except Exception as error:
                self._warn(f"checkpoint.store: {self._remote.url} is behind: {reason(error)}", step)

    def _copy(self, newest: int) -> None:
        here = [step for step in manifest.steps(os.listdir(self._root)) if self._trusted(step)]
        for step in here:
            path, self.uploading = self._root / folder_name(step), step
            try:
                self._remote.upload(path)
            except (FileNotFoundError, Damaged):
                if path.exists():
                    raise  # else: removed here meanwhile, as retention does
            finally:
                self.uploading = None
        there = [step for step in self._remote.steps() if step <= newest]  # what is newer is not this run's to judge
        for step in manifest.outlived(there, self._remote.read, self._policy, self._trusted) - set(here):
            self._remote.remove(step)


def reason(error: Exception) -> str:
    """The first line of an error, without anything that looks like a secret of this process."""
    text = str(getattr(error, "strerror", None) or f"{type(error).__name__}: {error}").splitlines()[0]
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 6:
            text = text.replace(value, "…")
    return text
