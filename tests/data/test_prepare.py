from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from tests.data.corpora import config, folder, jsonl, prepared, stream, texts
from train.checks import Refused
from train.config import Data, Source, SourceKind, Tokenizer, TokenizerKind
from train.data.corpus import Document, documents, held_out, pin
from train.data.prepare import Prepared, _sample, prepare
from train.data.store import Store
from train.data.stream import Validation
from train.data.tokenizer import Tokenizer as Coder


def contents(corpus: Prepared, split: str) -> list[str]:
    """The documents of a split, by way of its tokens and its index of documents."""
    coder, found = Coder.load(corpus.tokenizer), []
    for folder_name in corpus.stores:
        for shard in Store(folder_name, split).shards:
            index = shard.index()
            assert index is not None
            start = 0
            for end, size in zip(*(part.tolist() for part in index), strict=True):
                ids = shard.read(start, end).tolist()
                assert ids[-1] == corpus.eot
                assert corpus.eot not in ids[:-1]
                found.append(coder.decode(ids[:-1]))
                assert len(found[-1].encode()) == size
                start = end
    return found


def test_documents_are_separated_and_split_by_their_content(tmp_path: Path) -> None:
    written = texts(60)
    corpus = prepared(config(tmp_path, "text", path=str(folder(tmp_path / "a", written))))
    train, validation = contents(corpus, "train"), contents(corpus, "validation")
    assert sorted(train + validation) == sorted(written)
    assert set(validation) == {text for text in written if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 5 == 0}
    assert 0 < corpus.validation.documents == len(validation) < len(train)
    assert corpus.train.bytes == sum(len(text.encode()) for text in train)
    (path := tmp_path / "data.json").write_text(json.dumps(asdict(corpus)))
    assert Prepared.read(path) == corpus
    path.write_text("{}")
    with pytest.raises(Refused, match=r"data\.json: does not say what the run was trained on"):
        Prepared.read(path)


def test_the_split_and_the_store_do_not_depend_on_names(tmp_path: Path) -> None:
    written = texts(40)
    first = prepared(config(tmp_path, "text", path=str(folder(tmp_path / "a", written))))
    reversed_order = prepared(config(tmp_path, "text", path=str(folder(tmp_path / "b", written[::-1]))))
    assert set(contents(first, "validation")) == set(contents(reversed_order, "validation"))
    assert first.digest != reversed_order.digest
    assert prepared(config(tmp_path, "text", path=str(folder(tmp_path / "c", written)))).stores == first.stores


def test_every_form_of_text_is_read(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    written = texts(40)
    plain = jsonl(tmp_path / "a.jsonl", written[:10])
    gz, zst, raw = tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl.zst", tmp_path / "d.txt.gz"
    gz.write_bytes(gzip.compress(jsonl(tmp_path / "x", written[10:20]).read_bytes()))
    zst.write_bytes(zstandard.compress(jsonl(tmp_path / "x", written[20:39]).read_bytes()))
    raw.write_bytes(gzip.compress(written[39].encode()))
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe broken")
    corpus = prepared(config(tmp_path, "text", path=[str(path) for path in (plain, gz, zst, raw, bad)]))
    assert sorted(contents(corpus, "train") + contents(corpus, "validation")) == sorted(written)
    assert corpus.skipped == 1


def test_a_book_is_cut_at_line_ends_without_losing_a_byte(tmp_path: Path) -> None:
    lines = "".join(f"line {i} größe\n" for i in range(80_000)) + "é" * 1_500_000
    (tmp_path / "book.txt").write_text(lines)
    source = Source(kind=SourceKind.text, path=str(tmp_path / "book.txt"))
    (file,) = pin(source, tmp_path, lambda *_: None)
    pages = [page for page in documents(file, "text") if page is not None]
    assert b"".join(pages) == lines.encode()
    assert max(map(len, pages)) <= 1 << 20
    assert all(page.decode() for page in pages)
    assert pages[0].endswith(b"\n")


def test_bad_text_is_refused_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"body": "no text"}\n')
    with pytest.raises(Refused, match=r"a\.jsonl:2.*data\.field"):
        prepared(config(tmp_path, "text", path=str(path)))
    path.write_text('{"text": "fine"}\n{"text": ' + "[" * 100_000 + "}\n")
    with pytest.raises(Refused, match=r"a\.jsonl:2: is no JSON object"):
        prepared(config(tmp_path, "text", path=str(path)))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"hello world" * 100)[:-20])
    with pytest.raises(Refused, match=r"b\.txt\.gz"):
        prepared(config(tmp_path, "text", path=str(tmp_path / "b.txt.gz")))


def test_zstd_is_read_to_the_end_of_its_last_frame_or_refused(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    written = [text * 40 for text in texts(60)]  # of more than one read of a file, and more than one block
    lines = [jsonl(tmp_path / "x", part).read_bytes() for part in (written[:20], written[20:])]
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    raw = zstandard.compress(lines[0]) + skippable + zstandard.ZstdCompressor(write_checksum=True).compress(lines[1])
    path = tmp_path / "a.jsonl.zst"

    def read(content: bytes) -> list[Document | None]:
        path.write_bytes(content)
        (file,) = pin(Source(kind=SourceKind.text, path=str(path)), tmp_path, lambda *_: None)
        return list(documents(file, "text"))

    assert read(raw) == [text.encode() for text in written]
    assert read(b"") == []
    for damaged in (raw[:-2], raw[:-3000], raw + b"no frame", b"plain text", b"\0" * len(raw)):
        with pytest.raises(Refused, match=r"a\.jsonl\.zst: cannot be read \(.+\): replace it") as refusal:
            read(damaged)
        assert "\n" not in str(refusal.value)


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    written = texts(40)
    root = folder(tmp_path / "a", written)
    (root / "gone.txt").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe.txt")
    (root / "link.txt").symlink_to(folder(tmp_path / "b", ["linked " * 30]) / "0000.txt")
    corpus = prepared(config(tmp_path, "text", path=str(root)))
    assert sorted(contents(corpus, "train") + contents(corpus, "validation")) == sorted([*written, "linked " * 30])


def test_an_empty_corpus_and_an_empty_validation_split_are_refused(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(Refused, match="no files"):
        prepared(config(tmp_path, "text", path=str(tmp_path / "nothing")))
    empty = folder(tmp_path / "empty", ["", ""])
    for kind in ("bytes", "bpe"):
        with pytest.raises(Refused, match="no training documents"):
            prepared(config(tmp_path, "text", path=str(empty), tokenizer=Tokenizer(kind=TokenizerKind[kind])))
    path = str(folder(tmp_path / "a", texts(5)))
    with pytest.raises(Refused, match=r"data\.validation.*no document.*or add documents"):
        prepared(config(tmp_path, "text", path=path, validation=1e-6))
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set" / "train.jsonl", texts(30))
    with pytest.raises(Refused, match=r"data\.validation.*no document.*or data\.shard_tokens"):  # the first has too few
        prepared(config(tmp_path, "hf", name=str(tmp_path / "set"), shard_tokens=1024, validation=1e-6))
    with pytest.raises(Refused, match=r"model\.context"):
        prepared(config(tmp_path, "text", path=str(folder(tmp_path / "b", texts(30)))), context=1_000_000)


def test_bpe_learns_from_training_documents_only(tmp_path: Path) -> None:
    held = next(w for w in (f"{i} zqzq" + "qzq" * 400 for i in range(100)) if held_out(w.encode(), 0.2))
    path = folder(tmp_path / "a", [*texts(40), held])
    bpe = Tokenizer(kind=TokenizerKind.bpe, vocab=300)
    corpus = prepared(config(tmp_path, "text", path=str(path), tokenizer=bpe))
    coder = Coder.load(corpus.tokenizer)
    assert corpus.vocab == coder.vocab == 300
    assert len(coder.encode("qzqqzqqzq")) > 6  # "qzq" was by far the commonest trigram, had it been seen


def test_a_second_prepare_writes_nothing(tmp_path: Path) -> None:
    data = config(tmp_path, "text", path=str(folder(tmp_path / "a", texts(40))), tokenizer=Tokenizer(vocab=300))

    def stamps() -> dict[Path, int]:
        files = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
        return {path: path.stat().st_mtime_ns for path in files}

    first = prepared(data)
    before = stamps()
    assert prepared(data) == first
    assert stamps() == before
    (tmp_path / "a" / "0000.txt").write_text("changed")
    assert prepared(data).digest != first.digest


def _prepare_in_a_process(data: Data, results: multiprocessing.Queue[str]) -> None:
    results.put(json.dumps(asdict(prepared(data))))


def test_two_processes_prepare_one_store(tmp_path: Path) -> None:
    data = config(tmp_path, "text", path=str(folder(tmp_path / "a", texts(200))), shard_tokens=4096)
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_prepare_in_a_process, args=(data, results)) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = results.get(timeout=60), results.get(timeout=60)
    for process in processes:
        process.join()
    assert first == second
    assert len([p for p in (tmp_path / "cache" / "stores").iterdir() if p.is_dir()]) == 1
    assert not list((tmp_path / "cache").rglob(".*"))
    (path := tmp_path / "data.json").write_text(first)
    assert len(contents(Prepared.read(path), "train")) == Prepared.read(path).train.documents


def test_work_that_was_interrupted_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "a.jsonl", texts(150)))
    whole = prepared(config(tmp_path, "text", path=path, shard_tokens=4096, cache=str(tmp_path / "c1")))
    data = config(tmp_path, "text", path=path, shard_tokens=4096, cache=str(tmp_path / "c2"))

    def stop_in_the_middle(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(data, seed=5, context=16, progress=stop_in_the_middle)
    store = Path(prepared(data).stores[0])
    for name in ("complete.json", "complete.sha256"):  # as it is after three of the shards
        (store / name).unlink()
    for shard in sorted(store.glob("shard-*"))[3:]:
        for file in shard.iterdir():
            file.unlink()
        shard.rmdir()
    (store / ".shard-00003").mkdir()
    (store / ".shard-00003" / "train.bin").write_bytes(b"torn")
    again = prepared(data)
    assert contents(again, "train") == contents(whole, "train")
    for mine, other in zip(Store(again.stores[0], "train").shards, Store(whole.stores[0], "train").shards, strict=True):
        assert mine.part == other.part


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("stage", ["digest", "tokenizer", "tokenize"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, stage: str, kind: str) -> None:
    """What is kept under a digest has that content: with the file as it was, all is as if it had never changed."""
    written = texts(100 if stage == "digest" else 1500)  # a batch, or several
    path = jsonl(tmp_path / "a.jsonl", written)
    before, after = path.read_bytes(), jsonl(tmp_path / "x", written[::-1]).read_bytes()
    keys = {"path": str(path), "shard_tokens": 4096, "tokenizer": Tokenizer(kind=TokenizerKind[kind], vocab=300)}
    whole = prepared(config(tmp_path, "text", cache=str(tmp_path / "clean"), **keys))
    data = config(tmp_path, "text", cache=str(tmp_path / "cache"), **keys)

    def change(at: str, done: int, total: int) -> None:
        if at == stage and path.read_bytes() == before:
            path.write_bytes(after)  # as long as it was

    if (stage, kind) != ("tokenizer", "bytes"):
        with pytest.raises(Refused, match=r"a\.jsonl: was changed while it was read: start again"):
            prepare(data, seed=5, context=16, progress=change)
    path.write_bytes(before)
    again = prepared(data)
    assert again.digest == whole.digest
    for mine, other in zip(Store(again.stores[0], "train").shards, Store(whole.stores[0], "train").shards, strict=True):
        assert mine.part == other.part


def test_a_tokenizer_of_a_file_that_changes_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the sample was large enough before the file's end."""
    monkeypatch.setattr("train.data.prepare.SAMPLE", 1 << 14)
    (tmp_path / "a").mkdir()
    path = jsonl(tmp_path / "a" / "a.jsonl", texts(400))
    data = config(tmp_path, "hf", name=str(path.parent), tokenizer=Tokenizer(kind=TokenizerKind.bpe, vocab=300))

    def change(at: str, done: int, total: int) -> None:
        if at == "tokenizer":
            jsonl(path, texts(400)[::-1])

    with pytest.raises(Refused, match="was changed"):
        prepare(data, seed=5, context=16, progress=change)
    assert not list((tmp_path / "cache" / "tokenizers").rglob("tokenizer.json"))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, remove])
@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "validation.docs", "manifest.json", "manifest.sha256"])
def test_a_damaged_store_is_refused_by_the_name_of_the_file(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    corpus = prepared(config(tmp_path, "text", path=str(folder(tmp_path / "a", texts(60))), shard_tokens=4096))
    damage(Path(corpus.stores[0]) / "shard-00001" / name)
    with pytest.raises(Refused, match=f"shard-00001/{name.split('.')[0]}.*(is|has) .*: delete .* run again"):
        _ = stream(corpus), Validation(corpus, context=16, tokens=0, micro_batch=2)


def test_a_missing_or_exchanged_shard_and_a_damaged_tokenizer_are_refused(tmp_path: Path) -> None:
    data = config(tmp_path, "text", path=str(folder(tmp_path / "a", texts(60))), shard_tokens=4096)
    corpus = prepared(data)
    store = Path(corpus.stores[0])
    (store / "shard-00001").rename(store / "aside")
    with pytest.raises(Refused, match=r"shard-00001.*missing"):
        stream(corpus)
    other = prepared(config(tmp_path, "text", path=str(folder(tmp_path / "b", texts(60, seed=2))), shard_tokens=4096))
    (Path(other.stores[0]) / "shard-00001").rename(store / "shard-00001")
    with pytest.raises(Refused, match=r"shard-00001.*changed"):
        stream(corpus)
    flip(Path(corpus.tokenizer))
    with pytest.raises(Refused, match=r"tokenizer\.json.*damaged"):
        Validation(corpus, context=16, tokens=0, micro_batch=2)


def test_a_block_is_verified_when_it_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = config(tmp_path, "synthetic", synthetic_tokens=2_000_000)
    corpus = prepared(data)
    monkeypatch.setattr("train.data.store.WHOLE", 0)  # as for a store too large to verify at the start
    path = Path(corpus.stores[0]) / "shard-00000" / "train.bin"
    flip(path)  # of 4,000,000 bytes: in MiB 1
    (shard,) = Store(corpus.stores[0], "train").shards
    assert shard.read(0, 1000).size == 1000
    assert shard.checked.tolist() == [True, False, False, False]
    with pytest.raises(Refused, match=r"train\.bin.*MiB 1"):
        shard.read((1 << 19) - 5, (1 << 19) + 5)  # its last tokens lie behind the border


def test_nanogpt_bins_are_read_in_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = {name: rng.integers(0, 100, size).astype("<u2") for name, size in (("train", 5000), ("val", 700))}
    for name, array in tokens.items():
        array.tofile(tmp_path / f"{name}.bin")
    corpus = prepared(config(tmp_path, "bin", path=str(tmp_path)))
    (shard,) = Store(corpus.stores[0], "train").shards
    np.testing.assert_array_equal(shard.read(0, 5000), np.fromfile(tmp_path / "train.bin", "<u2"))
    assert shard.path == tmp_path / "train.bin"
    assert (corpus.train.tokens, corpus.validation.tokens, corpus.validation.bytes) == (5000, 700, None)
    validation = Validation(corpus, context=16, tokens=0, micro_batch=2)
    targets = np.concatenate([validation.micro_batch(i)[1].ravel() for i in range(validation.micro_batches)])
    np.testing.assert_array_equal(targets[targets >= 0], tokens["val"])
    assert Validation(corpus, context=16, tokens=100, micro_batch=2).tokens == 100
    flip(tmp_path / "train.bin")
    with pytest.raises(Refused, match=r"train\.bin"):
        stream(corpus)


def test_a_token_out_of_range_is_refused(tmp_path: Path) -> None:
    np.array([1, 2, 100] * 50, "<u2").tofile(tmp_path / "train.bin")
    np.array([1, 2, 3] * 50, "<u2").tofile(tmp_path / "val.bin")
    with pytest.raises(Refused, match=r"train\.bin.*token 100"):
        prepared(config(tmp_path, "bin", path=str(tmp_path)))
    larger = Tokenizer(kind=TokenizerKind.none, vocab=101)
    assert prepared(config(tmp_path, "bin", path=str(tmp_path), tokenizer=larger)).vocab == 101
    (tmp_path / "val.bin").unlink()
    with pytest.raises(Refused, match=r"val\*\.bin"):
        prepared(config(tmp_path, "bin", path=str(tmp_path), tokenizer=larger))


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    none = Tokenizer(kind=TokenizerKind.none, vocab=100)
    with pytest.raises(Refused, match=r"data\.tokenizer\.kind"):
        prepared(config(tmp_path, "text", path=str(folder(tmp_path / "a", texts(5))), tokenizer=none))


def test_memory_stays_flat(tmp_path: Path) -> None:
    rng = random.Random(0)
    with (tmp_path / "a.jsonl").open("w") as out:
        out.writelines(f'{{"text": "{i} {rng.randbytes(5000).hex()}"}}\n' for i in range(3000))  # 30 MB
    data = config(tmp_path, "text", path=str(tmp_path / "a.jsonl"), shard_tokens=1_000_000)
    tracemalloc.start()
    try:
        corpus = prepared(data)
        loaded = stream(corpus, context=256)
        for step in range(50):
            loaded.micro_batch(step, 0, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert corpus.train.tokens > 20_000_000
    assert peak < 15e6, f"{peak / 1e6:.0f} MB"


def test_the_standard_library_is_found() -> None:
    files = pin(Source(kind=SourceKind.stdlib), Path(), lambda *_: None)
    names = {Path(file.path).name for file in files}
    assert len(files) > 300
    assert {"argparse.py", "heapq.py"} <= names
    assert not any({"test", "tests", "site-packages"} & set(Path(file.path).parts[-3:]) for file in files)


def test_a_tokenizer_is_trained_on_a_sample_of_a_large_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are drawn by their own sha256 from all over the corpus, up to the budget; training ones only."""
    written = texts(200)
    path = folder(tmp_path / "a", written)
    size = sum(len(text.encode()) for text in written)
    monkeypatch.setattr("train.data.prepare.SAMPLE", size // 4)
    data = config(tmp_path, "text", path=str(path), tokenizer=Tokenizer(kind=TokenizerKind.bpe, vocab=280))
    pins = [pin(data, tmp_path, lambda *_: None)]
    sample = list(_sample(data, [data], pins, lambda *_: None))
    assert size // 8 < sum(len(text.encode()) for text in sample) < size // 2
    assert any(text in sample for text in written[100:])
    assert not any(held_out(text.encode(), data.validation) for text in sample)
    assert prepared(data).vocab == 280
