"""Tests compose the real configuration, shrunk: a corpus of a few files, a model of a few thousand parameters."""

from __future__ import annotations

import gc
import os
import random
import socket
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

WORDS = "def return for in if else while class import self value index total items result None True".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 files of Python-like lines from a fixed seed: about 100 kB, the same bytes on every machine."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(1)
    for number in range(60):
        lines = (" " * rng.choice((0, 4, 8)) + " ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(40))
        (folder / f"file{number:02d}.py").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(corpus: Path, cache: Path, tmp_path: Path) -> list[str]:
    """Overrides that make `colossus train` small, a second's work; five virtual ranks are uneven over any ranks."""
    return [
        "model=llama_micro",
        *("model.layers=2", "model.width=48", "model.heads=3", "model.kv_heads=1", "model.ffn=80", "model.context=32"),
        *("data=text", f"data.path={corpus}", f"data.cache={cache}", "data.tokenizer.vocab=300", "data.validation=0.1"),
        *("batch.sequences=10", "batch.virtual_ranks=5", "batch.micro_batch=2"),
        *("steps=6", "precision=fp32", "accelerator=cpu", "schedule.warmup_steps=2", "optimizer.lr=0.01"),
        *(
            "eval.every=3",
            "eval.tokens=500",
            "eval.sample=0",
            "checkpoint.every=3",
            "log.every=2",
            "logger=[]",
            "report=false",
        ),
        f"runs={tmp_path}/runs",
    ]


def without_model(tiny: list[str]) -> list[str]:
    """What it says of no model, for another one to be chosen."""
    return [setting for setting in tiny if not setting.startswith("model")]


@pytest.fixture
def eight(tiny: list[str]) -> list[str]:
    """The same with eight virtual ranks."""
    return [*tiny, "batch.sequences=16", "batch.virtual_ranks=8"]


@pytest.fixture
def port() -> Iterator[int]:
    """It is held, not listened at: who asks for any port is not given it, and node 0, which asks for it, is."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


def pytest_configure() -> None:
    """One thread a test process, before torch is imported: two would spin for each other on cores that others use.

    Ranks are forked with pytest imported: their test's module imports it, which takes longer than many of them live. So
    does torch's compiler, which tests need for torch's own optimizers and seeds, and a run for neither.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    preload = BaseContext.set_forkserver_preload
    BaseContext.set_forkserver_preload = lambda self, names: preload(self, [*names, "pytest", "torch._dynamo"])  # type: ignore


def pytest_addoption(parser: pytest.Parser) -> None:
    """`python -m tests.golden` uses it."""
    parser.addoption("--write-golden", action="store_true", help="write the golden numbers instead of comparing")


def pytest_collection_finish() -> None:
    """What has been imported stays: Python's collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
