"""`compile=true`, which takes a C++ compiler and a minute."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.packages import need
from tests.test_train import sha256

pytestmark = pytest.mark.system


def test_compiled_runs_agree_and_the_second_finds_the_code_of_the_first(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need("g++", "g++")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    small = ("compile=true", "steps=3", "model.layers=1", "eval.every=0", f"data.cache={tmp_path}/cache")
    one = sha256(tiny, *small, "name=c1", "devices=1")
    kept = tmp_path / "cache/compiled"
    code, graphs = set(kept.rglob("*.so")), set((kept / "aotautograd").rglob("*"))
    assert code
    assert graphs
    assert "compiled first: minutes" in " ".join(capsys.readouterr().out.split())
    assert one == sha256(tiny, *small, "name=c2", "devices=2")
    assert (set(kept.rglob("*.so")), set((kept / "aotautograd").rglob("*"))) == (code, graphs)
