from __future__ import annotations

import gzip
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.data.corpora import config, folder, jsonl, prepared, stream, texts
from tests.running import runs
from train.checks import Refused
from train.config import Data, Source, SourceKind, Tokenizer, TokenizerKind
from train.data.corpus import File, pin
from train.data.prepare import Prepared, prepare
from train.data.store import Store, lock
from train.data.stream import IGNORED, Stream, Validation
from train.data.writing import TRIES, Job, Preparer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Synthetic tokens in several shards, the last of them short."""
    data = config(tmp_path_factory.mktemp("synthetic"), "synthetic", synthetic_tokens=20_000, shard_tokens=6000)
    return prepared(data)


def everything(loaded: Stream, steps: int) -> list[tuple[tuple[int, int, int], tuple[int, ...]]]:
    """(id, tokens) of every sample of so many steps, in the order of the global index.

    An id is (source, epoch, window counted through the shards of the source).
    """
    found: list[tuple[tuple[int, int, int], tuple[int, ...]]] = []
    for step in range(steps):
        for v in range(loaded.virtual_ranks):
            for i in range(loaded.micro_batches):
                tokens = loaded.micro_batch(step, v, i)
                assert tokens.dtype == np.int64
                assert tokens.shape == (loaded.rows, loaded.context + 1)
                places = loaded.places(step, v, i)
                ids = [(source, epoch, loaded.ends[source][shard] + window) for source, epoch, shard, window in places]
                found += zip(ids, map(tuple, tokens.tolist()), strict=True)
    return found


def test_samples_are_a_function_of_the_global_index_alone(corpus: Prepared) -> None:
    expected = everything(stream(corpus, 8, 8, 1), 40)
    for ranks, rows in ((1, 8), (2, 1), (4, 2), (1, 1)):
        assert everything(stream(corpus, 8, ranks, rows), 40) == expected
    assert everything(stream(corpus, 16, 2, 4), 20) == expected
    loaded = stream(corpus, 8, 4, 2)
    later = loaded.micro_batch(39, 3, 0).tolist()
    assert later == [list(tokens) for _, tokens in expected[39 * 8 + 6 : 39 * 8 + 8]]
    assert loaded.micro_batch(0, 0, 0).tolist() == [list(tokens) for _, tokens in expected[:2]]
    other = Stream(corpus, seed=6, context=16, sequences=8, virtual_ranks=8, micro_batch=1)
    assert everything(other, 3) != expected[:24]


@pytest.mark.parametrize(("sequences", "ranks", "rows"), [(8, 4, 1), (12, 3, 2), (7, 7, 1)])
def test_each_sample_comes_once_an_epoch(corpus: Prepared, sequences: int, ranks: int, rows: int) -> None:
    shards = Store(corpus.stores[0], "train").shards
    assert len(shards) > 3
    total = sum((shard.size - 1) // 16 for shard in shards)
    found = everything(stream(corpus, sequences, ranks, rows), -(-2 * total // sequences))
    for epoch in (0, 1):
        ids = [i for i, _ in found if i[1] == epoch]
        assert sorted(ids) == [(0, epoch, window) for window in range(total)]
        assert ids != sorted(ids)
    assert [i[2] for i, _ in found[:total]] != [i[2] for i, _ in found[total : 2 * total]]
    windows = {window: tokens for (_, _, window), tokens in found}
    first = shards[0].read(0, shards[0].size).tolist()
    assert [t for w in range((len(first) - 1) // 16) for t in windows[w][:-1]] == first[: (len(first) - 1) // 16 * 16]


def test_a_mix_keeps_its_shares_and_each_part_its_epochs(tmp_path: Path) -> None:
    small = str(folder(tmp_path / "a", texts(40)))
    parts = {
        "small": Source(kind=SourceKind.text, path=small, weight=3),
        "random": Source(kind=SourceKind.synthetic, weight=1),
    }
    corpus = prepared(config(tmp_path, "mix", parts=parts, synthetic_tokens=9000))
    found = everything(stream(corpus, 64, 8, 8), 32)
    for block in range(2):
        sources = [i[0] for i, _ in found[1024 * block : 1024 * (block + 1)]]
        assert (sources.count(0), sources.count(1)) == (768, 256)
    total = sum((shard.size - 1) // 16 for shard in Store(corpus.stores[0], "train").shards)
    assert 2 * total < 2 * 768
    mine = [i for i, _ in found if i[0] == 0 and i[1] < 2]
    assert sorted(mine) == [(0, epoch, w) for epoch in (0, 1) for w in range(total)]
    validation = Validation(corpus, context=16, tokens=400, micro_batch=2)
    assert len(validation.ends) == 2
    assert validation.bytes is None or validation.lossless


def test_a_mix_trains_one_bpe_on_all_its_parts(tmp_path: Path) -> None:
    parts = {
        name: Source(kind=SourceKind.text, path=str(folder(tmp_path / name, [f"{name * 9} {i}" for i in range(50)])))
        for name in ("ab", "xy")
    }
    corpus = prepared(config(tmp_path, "mix", parts=parts, tokenizer=Tokenizer(vocab=300)))
    coder = Validation(corpus, context=16, tokens=0, micro_batch=1).tokenizer
    assert len(coder.encode("abab")) < 4 > len(coder.encode("xyxy"))


@pytest.mark.parametrize("tokens", [0, 700])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_validation_predicts_each_token_of_whole_documents_once(tmp_path: Path, tokens: int, kind: str) -> None:
    written = texts(60)
    path = str(folder(tmp_path / "a", written))
    data = config(tmp_path, "text", path=path, tokenizer=Tokenizer(kind=TokenizerKind[kind], vocab=300))
    data.shard_tokens = 9000
    corpus = prepared(data)
    validation = Validation(corpus, context=16, tokens=tokens, micro_batch=3)
    batches = [validation.micro_batch(i) for i in range(validation.micro_batches)]
    inputs, targets = (np.concatenate([batch[side].ravel() for batch in batches]) for side in (0, 1))
    used = targets[targets != IGNORED]
    assert used.size == validation.tokens
    assert (targets[used.size :] == IGNORED).all()
    np.testing.assert_array_equal(inputs[: used.size], np.concatenate([[corpus.eot], used[:-1]]))
    assert used[-1] == corpus.eot
    found = list(validation.text_bytes())
    assert len(found) == np.count_nonzero(used == corpus.eot)
    assert {raw.decode() for raw in found} <= set(written)
    assert validation.bytes == sum(map(len, found)) == sum(map(len, validation.window_bytes()))
    if tokens:
        assert tokens <= validation.tokens < tokens + np.diff(np.flatnonzero(used == corpus.eot)).max()
        assert validation.tokens < corpus.validation.tokens
    else:
        assert (validation.tokens, validation.bytes) == (corpus.validation.tokens, corpus.validation.bytes)


def test_gzip_is_measured_on_exactly_these_bytes(tmp_path: Path) -> None:
    corpus = prepared(config(tmp_path, "text", path=str(folder(tmp_path / "a", texts(60)))))
    validation = Validation(corpus, context=16, tokens=0, micro_batch=3)
    sizes = validation.yardsticks()
    assert validation.bytes is not None
    whole = sum(len(gzip.compress(raw, 9)) for raw in validation.text_bytes())
    assert sizes["gzip_documents"] == 8 * whole / validation.bytes
    assert sizes["gzip_windows"] is not None
    assert sizes["gzip_windows"] > 8  # 16 bytes cannot pay for gzip's 18 bytes of frame
    ids = prepared(config(tmp_path, "synthetic", synthetic_tokens=5000))
    unknown = Validation(ids, context=16, tokens=0, micro_batch=3)
    assert unknown.bytes is None
    assert unknown.yardsticks() == {"gzip_windows": None, "gzip_documents": None}


# ----------------------------------------------------------------------------------- a dataset that is arriving


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Laid out like a dataset on the Hub: parquet and JSON lines, read in the order of their names."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root = tmp_path / "dataset"
    (root / "data").mkdir(parents=True)
    written = texts(120)
    table = pyarrow.table({"id": list(range(60)), "text": written[:60]})
    parquet.write_table(table, root / "data" / "train-00000.parquet")
    jsonl(root / "data" / "train-00001.jsonl", written[60:])
    jsonl(root / "data" / "test-00000.jsonl", texts(30, seed=3))
    (root / "README.md").write_text("no data")
    return root


def never(record: dict[str, Any]) -> None:
    pytest.fail(record["text"])


def until(condition: Callable[[], Any]) -> Any:
    """What it gives, once that is something."""
    deadline = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def local(tmp_path: Path, dataset: Path, cache: str, **keys: Any) -> Data:
    return config(tmp_path, "hf", name=str(dataset), shard_tokens=6000, cache=str(tmp_path / cache), **keys)


def finished(data: Data) -> Prepared:
    result, preparer = prepare(data, seed=5, context=16)
    deadline = time.monotonic() + 60
    while preparer is not None and not (Path(result.stores[0]) / "complete.json").exists():
        assert preparer.poll(never) is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if preparer is not None:
        preparer.stop()
    return result


def first_shard_only(data: Data, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """What `prepare` leaves when the background process has not begun."""
    with monkeypatch.context() as patch:
        patch.setattr("train.data.writing._background", lambda job, held: None)
        result, preparer = prepare(data, seed=5, context=16)
    assert preparer is not None
    assert preparer.works[0].process is None
    assert not result.complete
    return result


def test_a_dataset_is_read_in_its_pinned_order(tmp_path: Path, dataset: Path) -> None:
    corpus = finished(local(tmp_path, dataset, "cache"))
    text = b"".join(
        bytes(token if token < 256 else 0x0A for token in shard.read(0, shard.size).tolist())
        for shard in Store(corpus.stores[0], "train").shards
    ).decode()
    written = [t for t in texts(120) if t in text]
    assert len(written) > 80
    positions = [text.index(t) for t in written]
    assert positions == sorted(positions)
    assert not any(t in text for t in texts(30, seed=3))
    validation = Validation(corpus, context=16, tokens=0, micro_batch=1)
    assert all(raw.decode() not in text for raw in validation.text_bytes())
    assert [shard.size > 0 for shard in Store(corpus.stores[0], "validation").shards][:3] == [True, False, False]
    limited = finished(local(tmp_path, dataset, "cache", files="data/*.jsonl", limit=1))
    assert limited.digest != corpus.digest


def test_a_dataset_without_the_column_is_refused(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(Refused, match=r"data\.field.*'body'.*id, text"):
        prepare(local(tmp_path, dataset, "cache", field="body"), seed=5, context=16)
    with pytest.raises(Refused, match=r"data\.files"):
        prepare(local(tmp_path, dataset, "cache", files="*.csv"), seed=5, context=16)


def test_a_pin_is_written_whole_and_one_that_is_not_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    source = Source(kind=SourceKind.hf, name="some/set")
    file = SimpleNamespace(rfilename="train.jsonl", lfs=None, blob_id="b" * 40, size=7)
    info = SimpleNamespace(sha="c" * 40, siblings=[file])

    def ask() -> list[File]:
        return pin(source, tmp_path, lambda *_: None)

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(hub.HfApi, "dataset_info", lambda *_, **__: info)
        pinned = ask()
        (kept,) = (tmp_path / "pins").iterdir()
        before = os.stat(kept).st_ino
        assert ask() == pinned
        assert [path.name for path in (tmp_path / "pins").iterdir()] == [kept.name]
        assert os.stat(kept).st_ino != before  # another file took its place, all at once
    monkeypatch.setattr(hub.HfApi, "dataset_info", no_network)
    assert ask() == pinned
    for torn in (kept.read_text()[:-9], "", '[{"path": 1, "of_old": 2}]'):
        kept.write_text(torn)
        with pytest.raises(Refused, match=r"data\.name: cannot look up some/set at main on the Hub: no network"):
            ask()


def test_a_reader_waits_for_a_shard_and_sees_what_it_would_have_seen(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finished(local(tmp_path, dataset, "c1"))
    assert len(Store(whole.stores[0], "train").shards) >= 4
    early = first_shard_only(local(tmp_path, dataset, "c2"), monkeypatch)
    assert early.digest == whole.digest
    expected = everything(stream(whole), 300)  # several epochs
    waiting = stream(early)
    known = (Store(whole.stores[0], "train").shards[0].size - 1) // 16 // 8
    assert everything(waiting, known) == expected[: 8 * known]
    held = lock(Path(early.stores[0]))  # somebody prepares
    assert held is not None
    results: list[Any] = []
    reader = threading.Thread(target=lambda: results.append(everything(waiting, 300)), daemon=True)
    reader.start()
    time.sleep(0.4)
    assert not results
    os.close(held)
    finished(local(tmp_path, dataset, "c2"))
    reader.join(timeout=60)
    assert results
    assert results[0] == expected


def test_readers_learn_that_the_preparer_is_dead(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = first_shard_only(local(tmp_path, dataset, "cache"), monkeypatch)
    with pytest.raises(Refused, match=r"shard-00001.*stopped.*start the run again"):
        everything(stream(early), 300)


def test_the_preparer_says_why_it_failed(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.writing.BATCH_BYTES", 4096)  # so that the first shard is there before the bad line
    with (dataset / "data" / "train-00001.jsonl").open("a") as out:
        out.write("{broken\n")
    monkeypatch.setattr("train.data.writing.PAUSE", 0.0)
    result, preparer = prepare(local(tmp_path, dataset, "cache"), seed=5, context=16)
    assert isinstance(preparer, Preparer)
    with pytest.raises(Refused, match=r"train-00001\.jsonl:61"):
        everything(stream(result), 300)
    warned: list[str] = []
    lines = until(lambda: preparer.poll(lambda record: warned.append(record["text"])))
    assert len(warned) == TRIES - 1  # there was no new shard
    for line in (lines, *warned):
        assert "train-00001.jsonl:61" in line
        assert "\n" not in line


def test_a_preparer_that_fails_begins_again(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pause that grows, and as often as there is a new shard between two failures."""
    now, warned = [1000.0], list[str]()
    monkeypatch.setattr("train.data.writing.time", SimpleNamespace(monotonic=lambda: now[0]))
    with monkeypatch.context() as patch:

        def idle(job: Job, held: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen(["sleep", "600"], stdin=subprocess.PIPE)

        def full(job: Job, held: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("train.data.writing._background", idle)
        _, preparer = prepare(local(tmp_path, dataset, "cache"), seed=5, context=16)
        assert preparer is not None
        (work,) = preparer.works
        folder = Path(work.job.folder)

        def fail() -> None:
            assert work.process is not None
            work.process.kill()
            work.process.wait()
            assert preparer.poll(lambda record: warned.append(record["text"])) is None

        for pause in (5, 20, 80):
            fail()
            assert warned[-1].endswith(f"has failed: it ended without a word; begun again in {pause} s")
            now[0] += pause - 1
            assert preparer.poll(never) is None
            assert work.process is None
            now[0] += 2
            assert preparer.poll(never) is None
        (folder / "shard-00001").mkdir()
        fail()
        assert warned[-1].endswith("begun again in 5 s")
        (folder / "shard-00001").rmdir()
        now[0] += 6
        patch.setattr("train.data.writing._background", full)
        assert preparer.poll(lambda record: warned.append(record["text"])) is None
        assert "No space left on device; begun again in 5 s" in warned[-1]
    now[0] += 6
    assert until(lambda: preparer.poll(never) or (folder / "complete.json").exists()) is True
    preparer.stop()
    assert len(warned) == 5


def test_what_another_run_leaves_is_taken_up(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs share a store. The one that prepares it ends; the other one's ranks wait all the while."""
    data = local(tmp_path, dataset, "c2")
    expected = everything(stream(finished(local(tmp_path, dataset, "c1"))), 300)
    early = first_shard_only(data, monkeypatch)
    held = lock(Path(early.stores[0]))  # the other run's
    assert held is not None
    result, preparer = prepare(data, seed=5, context=16)
    assert preparer is not None
    signs, results, waiting = [], list[Any](), stream(result)
    waiting.stores[0].waits = lambda: signs.append(time.monotonic())
    reader = threading.Thread(target=lambda: results.append(everything(waiting, 300)), daemon=True)
    reader.start()
    until(lambda: len(signs) > 2)
    assert preparer.poll(never) is None
    assert preparer.works[0].process is None
    os.close(held)
    seen = len(signs)
    until(lambda: len(signs) > seen + 2)  # nobody prepares it just now
    assert until(lambda: preparer.poll(never) or (Path(result.stores[0]) / "complete.json").exists()) is True
    reader.join(timeout=60)
    preparer.stop()
    assert results == [expected]


def test_the_preparer_does_not_outlive_its_parent(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its work is here such as never ends: else it might be done before the parent is killed."""
    begun, reader, writer = tmp_path / "begun", *os.pipe()
    endless = f"writing.write_shards = lambda *_: (open({str(begun)!r}, 'w').close(), time.sleep(600))"

    def popen(command: list[str], **how: Any) -> subprocess.Popen[bytes]:
        code = f"import time; from train.data import writing; {endless}; writing.background()"
        return subprocess.Popen([command[0], "-c", code], **how)

    child = os.fork()
    if child == 0:  # a parent that is killed once its preparer works
        monkeypatch.setattr("train.data.writing.subprocess", SimpleNamespace(PIPE=-1, DEVNULL=-3, Popen=popen))
        _, preparer = prepare(local(tmp_path, dataset, "cache"), seed=5, context=16)
        assert preparer is not None
        assert preparer.works[0].process is not None
        os.write(writer, str(preparer.works[0].process.pid).encode())
        time.sleep(60)
        os._exit(0)
    background = int(os.read(reader, 20))
    until(begun.exists)
    (store,) = (path for path in (tmp_path / "cache" / "stores").iterdir() if path.is_dir())
    assert lock(store) is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until(lambda: not runs(background))
    held = lock(store)
    assert held is not None
    os.close(held)
