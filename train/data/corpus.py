"""Where text comes from.

A corpus is pinned before it is read: a list of files, in an order, each with the digest of its content. The pin is
what the rest of the room keys its work by, so a corpus that has changed is another corpus, and a dataset whose
`main` moves on the Hub is read at the commit that it had. Then documents are read from the files one by one, in that
order; nothing holds more than a document and a read buffer, so the corpus may be larger than memory.

Which documents are held out depends on their content alone: a renamed, moved or duplicated document stays on its
side of the split.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from train.config import Refused, Source, SourceKind

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

    @property
    def form(self) -> str:
        """What the name says about how to read it: this is part of a corpus's identity, the rest of it is not."""
        return "".join(suffix for suffix in Path(self.path).suffixes[-2:] if suffix in FORMS)

    def fetch(self) -> Path:
        """Where the file lies on this machine, after downloading it if it must be."""
        if not self.repo:
            return Path(self.path)
        from_hub = _hub().hf_hub_download(self.repo, self.path, repo_type="dataset", revision=self.commit)
        return Path(from_hub)


FORMS = (".jsonl", ".parquet", ".gz", ".zst")


def pin(source: Source, cache: Path, progress: Progress) -> list[File]:
    """The files of a stdlib, text or hf source, in the order of reading. Raises Refused if there are none."""
    whole = source.kind is SourceKind.stdlib
    if whole:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [path for path in _below(root, LEFT_OUT) if path.suffix == ".py"]
    elif source.kind is SourceKind.text:
        paths = [path for given in source.paths() for path in _below(Path(given).expanduser().resolve())]
    elif Path(source.name).expanduser().is_dir():
        root = Path(source.name).expanduser().resolve()
        chosen = _chosen(source, [path.relative_to(root).as_posix() for path in _below(root)])
        paths = [root / name for name in chosen]
    else:
        return _pin_on_hub(source, cache)
    files, done, total = [], 0, sum(path.stat().st_size for path in paths)
    for path in paths:
        with path.open("rb") as stream:
            files.append(
                File(str(path), hashlib.file_digest(stream, "sha256").hexdigest(), path.stat().st_size, whole=whole)
            )
        done += files[-1].size
        progress("digest", done, total)
    if not files:
        raise Refused(
            "data", f"no files to read in {', '.join(source.paths()) or source.name or 'the standard library'}"
        )
    return files


def _below(path: Path, leave_out: Collection[str] = ()) -> list[Path]:
    """A file itself, or all files below a folder, sorted, without hidden ones and without folders to leave out."""
    if path.is_file():
        return [path]
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name not in leave_out and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
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
    try:
        info = _hub().HfApi().dataset_info(source.name, revision=source.revision, files_metadata=True)
    except Refused:
        raise
    except Exception as error:  # the Hub's client has dozens, for network, rights and names
        if kept.exists():
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
    kept.write_text(json.dumps([asdict(file) for file in files]))
    return files


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise Refused("data", "huggingface_hub is missing: pip install 'pocket-colossus[hf]'") from None
    return huggingface_hub


def documents(file: File, field: str) -> Iterator[str | None]:
    """The documents of a file in order; None stands for one that is not UTF-8, empty ones come as they are."""
    path = file.fetch()
    try:
        if ".parquet" in file.form:
            yield from _columns(path, field)
        else:
            with _open(path) as stream:
                if ".jsonl" in file.form:
                    yield from _lines(stream, path, field)
                else:
                    yield from map(_text, _pages(stream, file.whole))
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(str(path), f"cannot be read ({error}): replace it or leave it out") from None


def _text(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise Refused(str(path), "zstandard is missing: pip install 'pocket-colossus[zst]'") from None
        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(reader)
    return path.open("rb")


def _pages(stream: BinaryIO, whole: bool) -> Iterator[bytes]:
    """A text file as one document, or a book as pages that end where a line does (or, failing that, a character)."""
    head = stream.read() if whole else stream.read(BOOK + 1)
    if whole or len(head) <= BOOK:
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


def _lines(stream: BinaryIO, path: Path, field: str) -> Iterator[str | None]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
        except UnicodeDecodeError:
            yield None
            continue
        except (ValueError, KeyError, TypeError, IndexError):
            raise Refused(f"{path}:{number}", f"is no JSON object with a '{field}' (data.field)") from None
        if not isinstance(text, str):
            raise Refused(f"{path}:{number}", f"'{field}' (data.field) is not a text")
        yield text


def _columns(path: Path, field: str) -> Iterator[str | None]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise Refused(str(path), "pyarrow is missing: pip install 'pocket-colossus[hf]'") from None
    try:
        with parquet.ParquetFile(path) as table:
            if field not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise Refused("data.field", f"{path} has no column '{field}': choose from {columns}")
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                yield from (
                    (text or "") if text is None or isinstance(text, str) else None for text in batch[field].to_pylist()
                )
    except pyarrow.ArrowException as error:
        raise Refused(str(path), f"is no readable parquet file: {str(error).splitlines()[0]}") from None


def utf8(text: str | None) -> bytes | None:
    """The bytes of a document; None where it has none (JSON can spell lone surrogates, UTF-8 cannot)."""
    try:
        return None if text is None else text.encode("utf-8")
    except UnicodeEncodeError:
        return None


def held_out(raw: bytes, validation: float) -> bool:
    """Whether a document belongs to validation: one in round(1 / share), by its sha256 modulo that number."""
    return int.from_bytes(hashlib.sha256(raw).digest(), "big") % round(1 / validation) == 0


def drawn(raw: bytes, share: float) -> bool:
    """Whether a document is in a sample of this share: its sha256, read as a fraction, lies below it."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") < share * 2**64
