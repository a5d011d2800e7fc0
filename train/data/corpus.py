"""Where text comes from.

A corpus is pinned before it is read: a list of files, in an order, each with the digest of its content. The pin is
what the rest of the room keys its work by, so a corpus that has changed is another corpus, and a dataset whose
`main` moves on the Hub is read at the commit that it had. Then documents are read from the files one by one, in that
order; nothing holds more than a document and a read buffer, so the corpus may be larger than memory.

Which documents are held out depends on their content alone: a renamed, moved or duplicated document stays on its
side of the split.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gzip
import hashlib
import importlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from train.checks import Refused
from train.config import Source, SourceKind

Progress = Callable[[str, int, int], None]

BOOK = 1 << 20  # bytes: a text file above this is a book rather than a document …
PAGE = 1 << 14  # … and is cut at line ends into documents of about so many bytes
LEFT_OUT = {"site-packages", "test", "tests", "idle_test"}  # of the standard library
DATA = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")  # of a dataset, unless data.files says otherwise


@dataclass(slots=True, frozen=True)
class File:
    """A pinned file: on this machine, or (with `repo`) in a dataset on the Hub at one commit."""

    path: str
    sha256: str  # of the content, or the Hub's id of it
    size: int  # bytes
    repo: str = ""
    commit: str = ""
    whole: bool = False  # one document whatever its size
    time: int = 0  # when it was last changed, in ns, before its digest was taken

    @property
    def form(self) -> str:
        """What the name says about how to read it: this is part of a corpus's identity, the rest of it is not."""
        return "".join(suffix for suffix in Path(self.path).suffixes[-2:] if suffix in FORMS)

    def fetch(self) -> Path:
        """Where the file lies on this machine, after downloading it if it must be."""
        if not self.repo:
            return Path(self.path)
        hub = _needs("huggingface_hub", "hf")
        return Path(hub.hf_hub_download(self.repo, self.path, repo_type="dataset", revision=self.commit))

    def unchanged(self) -> None:
        """Refuse what was read since the digest if it may be another content than that: nothing is kept under it."""
        with contextlib.suppress(OSError):
            if self.repo or ((now := Path(self.path).stat()).st_size, now.st_mtime_ns) == (self.size, self.time):
                return
        raise Refused(self.path, "was changed while it was read: start again")


FORMS = (".jsonl", ".parquet", ".gz", ".zst")


def pin(source: Source, cache: Path, progress: Progress) -> list[File]:
    """The files of a stdlib, text or hf source, in the order of reading. Raises Refused if there are none."""
    whole = source.kind is SourceKind.stdlib
    if whole:
        below = _below(Path(sysconfig.get_paths()["stdlib"]), LEFT_OUT)
        paths = [path for path in below if path.suffix == ".py"]
    elif source.kind is SourceKind.text:
        paths = [path for given in source.paths() for path in _below(Path(given).expanduser().resolve())]
    elif (root := Path(source.name).expanduser().resolve()).is_dir():
        paths = [root / name for name in _chosen(source, [str(path.relative_to(root)) for path in _below(root)])]
    else:
        return _pin_on_hub(source, cache)
    files, done, total = [], 0, sum(path.stat().st_size for path in paths)
    for path in paths:
        with path.open("rb") as stream:
            before = os.fstat(stream.fileno())
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        files.append(File(str(path), sha256, before.st_size, whole=whole, time=before.st_mtime_ns))
        done += files[-1].size
        progress("digest", done, total)
    if not files:
        raise Refused("data", f"no files to read in {', '.join(source.paths()) or 'the standard library'}")
    return files


def _below(path: Path, leave_out: Collection[str] = ()) -> list[Path]:
    """A file itself, or all files below a folder, sorted, without hidden ones and without folders to leave out."""
    if path.is_file():
        return [path]
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name not in leave_out and not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.is_file()]  # no broken link, no pipe
    return sorted(found, key=str)


def _chosen(source: Source, names: list[str]) -> list[str]:
    """The data files of a dataset: what data.files matches, otherwise its training files, otherwise all."""
    if source.files:
        chosen = [name for name in names if fnmatch.fnmatch(name, source.files)]
    else:
        data = [name for name in names if name.endswith(DATA)]
        chosen = [name for name in data if "train" in name] or data
    if not chosen:
        raise Refused("data.files", f"no {source.files or 'data file'} among the {len(names)} files of {source.name}")
    return sorted(chosen)[: source.limit or None]


def _pin_on_hub(source: Source, cache: Path) -> list[File]:
    """Ask the Hub once; what it said is kept, so that a machine without a network can go on with the same pin."""
    asked = json.dumps([source.name, source.revision, source.files, source.limit])
    kept = cache / "pins" / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
    hub = _needs("huggingface_hub", "hf")
    try:
        info = hub.HfApi().dataset_info(source.name, revision=source.revision, files_metadata=True)
    except Exception as error:  # the Hub's client has dozens, for network, rights and names
        with contextlib.suppress(OSError, ValueError, TypeError):  # one that cannot be read is none
            return [File(**entry) for entry in json.loads(kept.read_text())]
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refused("data.name", f"cannot look up {source.name} at {source.revision} on the Hub: {line}") from None
    entries = {entry.rfilename: entry for entry in info.siblings}
    files = []
    for name in _chosen(source, sorted(entries)):
        entry = entries[name]
        digest = entry.lfs["sha256"] if entry.lfs else entry.blob_id
        files.append(File(name, digest, entry.size or 0, repo=source.name, commit=info.sha))
    kept.parent.mkdir(parents=True, exist_ok=True)
    draft = kept.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps([asdict(file) for file in files]))
    draft.replace(kept)
    return files


def _needs(module: str, extra: str) -> Any:
    """A module that not everybody has."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise Refused("data", f"{module} is missing: pip install -e '.[{extra}]' in a checkout") from None


class Document(bytes):
    """UTF-8, of which the first `prompt` bytes are there to be read and not to be learned."""

    prompt = 0


def documents(file: File, field: str, prompt_field: str = "") -> Iterator[Document | None]:
    """The documents of a file in order, as UTF-8; None stands for one that is not, empty ones come as they are."""
    path, fields = file.fetch(), [prompt_field, field] if prompt_field else [field]
    packed = ".jsonl" in file.form or ".parquet" in file.form
    if prompt_field and not packed:
        raise Refused("data.prompt_field", f"{path} has no fields: only .jsonl and .parquet files have")
    try:
        if ".parquet" in file.form:
            yield from map(_utf8, _columns(path, fields))
        else:
            with _open(path) as stream:
                yield from map(_utf8, _lines(stream, path, fields) if packed else _pages(stream, file))
        file.unchanged()
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(str(path), f"cannot be read ({error}): replace it or leave it out") from None


def _utf8(parts: list[str] | bytes | None) -> Document | None:
    """A document's bytes, where they are UTF-8 or can be: JSON can spell lone surrogates, UTF-8 cannot."""
    try:
        if isinstance(parts, list):
            encoded = [part.encode() for part in parts]
            document = Document(b"".join(encoded))
            document.prompt = len(document) - len(encoded[-1])
            return document
        if parts is not None:
            parts.decode()
        return None if parts is None else Document(parts)
    except UnicodeError:
        return None


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return io.BufferedReader(_Frames(path)) if path.suffix == ".zst" else path.open("rb")


class _Frames(io.FileIO):
    """A .zst file, by frames, for a BufferedReader. The library's own reader takes one that is cut off for whole."""

    frame: Any = None
    out = memoryview(b"")

    def readinto(self, buffer: Any) -> int:
        zstd = _needs("zstandard", "zst")
        while not self.out and (raw := (self.frame and self.frame.unused_data) or self.read(PAGE)):
            if self.frame is None or self.frame.eof:
                self.frame = zstd.ZstdDecompressor().decompressobj()
            try:
                self.out = memoryview(self.frame.decompress(raw))
            except zstd.ZstdError as error:
                raise OSError(error) from None
        if not (self.out or self.frame is None or self.frame.eof):
            raise EOFError("it ends in the middle of a frame")
        size = min(len(buffer), len(self.out))
        buffer[:size], self.out = self.out[:size], self.out[size:]
        return size


def _pages(stream: BinaryIO, file: File) -> Iterator[bytes]:
    """A text file as one document, or a book as pages that end where a line does (or, failing that, a character)."""
    head = stream.read() if file.whole else stream.read(BOOK + 1)
    if file.whole or len(head) <= BOOK:
        yield head
        return
    while head:
        line_end = head.find(b"\n", PAGE, BOOK)
        cut = line_end + 1 if line_end >= 0 else min(len(head), PAGE)
        while cut < len(head) and head[cut] & 0xC0 == 0x80:  # inside a character
            cut += 1
        yield head[:cut]
        head = head[cut:]
        if len(head) <= BOOK // 2:
            head += stream.read(BOOK)


def _lines(stream: BinaryIO, path: Path, fields: list[str]) -> Iterator[list[str] | None]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            yield None
            continue
        except (ValueError, RecursionError):
            record = None
        texts: list[str] = []
        for field, key in zip(reversed(fields), ("data.field", "data.prompt_field"), strict=False):
            if not isinstance(record, dict) or field not in record:
                raise Refused(f"{path}:{number}", f"is no JSON object with a '{field}' ({key})")
            if not isinstance(record[field], str):
                raise Refused(f"{path}:{number}", f"'{field}' ({key}) is not a text")
            texts.insert(0, record[field])
        yield texts


def _columns(path: Path, fields: list[str]) -> Iterator[list[str] | None]:
    pyarrow, parquet = _needs("pyarrow", "hf"), _needs("pyarrow.parquet", "hf")
    try:
        with parquet.ParquetFile(path) as table:
            for field, key in zip(reversed(fields), ("data.field", "data.prompt_field"), strict=False):
                if field not in table.schema_arrow.names:
                    columns = ", ".join(table.schema_arrow.names)
                    raise Refused(key, f"{path} has no column '{field}': choose from {columns}")
            for batch in table.iter_batches(batch_size=256, columns=fields):
                for row in zip(*(batch[field].to_pylist() for field in fields), strict=True):
                    texts = ["" if text is None else text for text in row]
                    yield texts if all(isinstance(text, str) for text in texts) else None
    except pyarrow.ArrowException as error:
        raise Refused(str(path), f"is no readable parquet file: {str(error).splitlines()[0]}") from None


def held_out(raw: bytes, validation: float) -> bool:
    """Whether a document belongs to validation: one in round(1 / share), by its sha256 modulo that number."""
    return int.from_bytes(hashlib.sha256(raw).digest(), "big") % round(1 / validation) == 0


def drawn(raw: bytes, share: float) -> bool:
    """Whether a document is in a sample of this share: its sha256, read as a fraction, lies below it."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") < share * 2**64
