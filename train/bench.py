"""`colossus bench`: the others are under tests/bench of a checkout, and no part of what is installed elsewhere."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from train.checks import require
from train.commands import Bench

ROOT = Path(__file__).parent.parent


def bench(config: Bench) -> int:
    why = "those that we run beside us are not installed: run `make setup` in a checkout, call it there"
    require((ROOT / "tests/bench/peers.py").exists(), "bench", why)
    sys.path.insert(0, str(ROOT))
    chosen = import_module("tests.bench.contestants").chosen(config)  # what is wrong is refused before torch is there
    return int(import_module("tests.bench.peers").main(config, *chosen))
