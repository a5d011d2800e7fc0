"""Checkpoints beside the machine that makes them: in a bucket, or in any place that fsspec has a URL for.

A machine that can be taken away keeps nothing. After each commit rank 0 copies the checkpoint to `checkpoint.store`,
its seal last, so that one that was torn on the way has none; `resume_from` brings the newest whole one into an empty
run folder, every byte verified. Access comes from where the service's own tools find it (environment, instance role),
never from the URL.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from train import manifest
from train.config import Checkpoint, Refused
from train.data.store import sync
from train.manifest import MANIFEST, SEAL, Damaged

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # URL scheme -> the extra that brings its file system
SECRET = re.compile("KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL")


class Remote:
    """Checkpoint folders under a URL, or under a local folder. Any call may raise what the file system raises."""

    def __init__(self, url: str, key: str) -> None:
        """`key` is the configuration's, for a refusal: of a URL of no known kind, or whose package is missing."""
        self.url = url
        try:
            import fsspec  # only where it is asked for

            local = "://" not in url
            options = {} if local else {"use_listings_cache": False}
            where = str(Path(url).expanduser().absolute()) if local else url
            self._fs, root = fsspec.core.url_to_fs(where, **options)
        except ImportError as error:
            extra = EXTRAS.get(url.partition("://")[0])
            how = f"pip install 'pocket-colossus[{extra}]'" if extra else str(error).splitlines()[0]
            raise Refused(key, f"{url} needs a package that is not installed: {how}") from error
        except ValueError as error:
            raise Refused(key, f"{url} is of no kind that is known ({str(error).splitlines()[0]})") from error
        self._root = root.rstrip("/")
        if hasattr(self._fs, "auto_mkdir"):  # of local files: elsewhere folders are but parts of names
            self._fs.auto_mkdir = True

    def _at(self, step: int, name: str = "") -> str:
        return f"{self._root}/{manifest.folder_name(step)}" + (f"/{name}" if name else "")

    def steps(self) -> list[int]:
        """The steps of the folders there, sealed or not, the newest first."""
        try:
            listed = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        found = (manifest.step_of(str(path).rstrip("/").rsplit("/", 1)[-1]) for path in listed)
        return sorted({step for step in found if step is not None}, reverse=True)

    def seal(self, step: int) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(self._at(step, SEAL)))
        except FileNotFoundError:
            return None

    def read(self, step: int) -> dict[str, Any]:
        """A manifest that its seal vouches for; raises `Damaged`."""
        where, seal = f"{self.url}/{manifest.folder_name(step)}", self.seal(step)
        if seal is None:
            raise Damaged(f"{where}: is torn, it has no {SEAL}")
        try:
            found = manifest.decode(bytes(self._fs.cat_file(self._at(step, MANIFEST))), seal, where)
        except FileNotFoundError as error:
            raise Damaged(f"{where}: {MANIFEST} is missing") from error
        if found["step"] != step:
            raise Damaged(f"{where}: {MANIFEST} is of step {found['step']}")
        return found

    def upload(self, path: Path) -> None:
        """Copy a checkpoint there: files, manifest, seal. One of the same step loses its seal first."""
        step = manifest.step_of(path.name)
        assert step is not None
        self._unseal(step)
        for name in (*manifest.read(path)["files"], MANIFEST, SEAL):
            self._fs.put_file(str(path / name), self._at(step, name))

    def remove(self, step: int) -> None:
        self._unseal(step)
        self._fs.rm(self._at(step), recursive=True)

    def _unseal(self, step: int) -> None:
        if self.seal(step) is not None:
            self._fs.rm_file(self._at(step, SEAL))

    def download(self, step: int, root: Path) -> Path:
        """Bring a checkpoint into `root`, verified; raises `Damaged`, which leaves nothing there."""
        draft = root / f".draft-fetched-{os.getpid()}"
        path = draft / manifest.folder_name(step)
        shutil.rmtree(draft, ignore_errors=True)
        path.mkdir(parents=True)
        try:
            for name in (*self.read(step)["files"], MANIFEST, SEAL):
                try:
                    self._fs.get_file(self._at(step, name), str(path / name))
                except FileNotFoundError as error:
                    raise Damaged(f"{self.url}/{path.name}: {name} is missing") from error
                sync(path / name)
            manifest.verify(path)
            manifest.publish(path, root / path.name)
        except Damaged as damage:
            raise Damaged(str(damage).replace(str(path), f"{self.url}/{path.name}")) from damage
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return root / path.name


class Origin:
    """Where a run may be resumed from, as the key `key` says. What was passed over there, and why, is in `refused`."""

    def __init__(self, url: str, key: str) -> None:
        self._remote, self._key = Remote(url, key), key
        self.refused: list[str] = []

    def manifests(self, above: int = -1) -> Iterator[dict[str, Any]]:
        """The sealed manifests there of steps above `above`, the newest first; raises Refused if it cannot be read."""
        self.refused = []
        try:
            for step in self._remote.steps():
                if step > above:
                    try:
                        yield self._remote.read(step)
                    except Damaged as damage:
                        self.refused.append(str(damage))
        except Exception as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> Refused:
        return Refused(self._key, f"{self._remote.url} cannot be read ({reason(error)})")

    def fetch(self, root: Path, admit: Callable[[dict[str, Any]], object]) -> Path | None:
        """Bring the newest whole checkpoint into `root` if it is newer than what is whole there.

        `admit` may refuse a manifest. None where there is none.
        """
        here = manifest.newest(root)[0]
        for found in self.manifests(-1 if here is None else here.step):
            admit(found)
            try:
                return self._remote.download(found["step"], root)
            except Damaged as damage:
                self.refused.append(str(damage))
            except Exception as error:
                raise self._unreadable(error) from error
        return None


class Mirror:
    """Keeps `checkpoint.store` as the local folder is, from a thread of its own. Its errors end no run."""

    def __init__(
        self, root: Path, policy: Checkpoint, trusted: Callable[[int], bool], warn: Callable[[str, int], None]
    ) -> None:
        self._remote = Remote(policy.store, "checkpoint.store")
        self._root, self._policy, self._trusted, self._warn = root, policy, trusted, warn
        self._step = 0  # committed last
        self._due, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def update(self, step: int) -> None:
        """The checkpoint of `step` has been committed: copy it, and what is missing of those before."""
        self._step = step
        self._due.set()

    def close(self) -> None:
        """Wait until all is copied, or has failed to be."""
        self._closing.set()
        self._due.set()
        self._thread.join()

    def _work(self) -> None:
        last = False
        while not last:
            self._due.wait()
            self._due.clear()
            last = self._closing.is_set()
            step = self._step
            if step:
                try:
                    self._copy(step)
                except Exception as error:
                    self._warn(f"checkpoint.store: {self._remote.url} is behind: {reason(error)}", step)

    def _copy(self, newest: int) -> None:
        local = [path for path in manifest.candidates(self._root) if self._trusted(manifest.step_of(path.name) or 0)]
        for path in local:
            step = manifest.step_of(path.name) or 0
            try:
                if self._remote.seal(step) != (path / SEAL).read_bytes():
                    self._remote.upload(path)
            except (FileNotFoundError, Damaged):
                if path.exists():
                    raise  # else: removed here meanwhile, as retention does
        here = {manifest.step_of(path.name) for path in local}
        found: dict[int, float | None] = {}
        there = [step for step in self._remote.steps() if step <= newest]  # what is newer is not this run's to judge
        for step in there:
            try:
                found[step] = self._remote.read(step).get("val_loss")
            except Damaged:
                continue
        kept = manifest.retained({step: loss for step, loss in found.items() if self._trusted(step)}, self._policy)
        for step in set(there) - kept - here:
            self._remote.remove(step)


def reason(error: Exception) -> str:
    """The first line of an error, without anything that looks like a secret of this process."""
    text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 6:
            text = text.replace(value, "…")
    return text
