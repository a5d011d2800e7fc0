"""Upper rooms may import lower ones, never the reverse; and what must not need torch does not import it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from train import cli

PACKAGE = Path(__file__).parent.parent / "train"
LEFT_OUT = "[m for m in ('torchmetrics', 'transformers', 'lightning.pytorch', 'torch._dynamo') if m in sys.modules]"

LAYERS = [
    ("light", "checks", "config", "shapes", "events", "batch", "flops", "hardware"),
    ("commands", "ledger", "economy", "pulse", "locks", "slots", "flat", "ranks", "muon"),
    ("scale", "data", "models", "optim", "nodes", "backends", "summary", "fingerprint", "channel", "manifest"),
    ("folder", "mirror", "group", "clock", "evidence", "generate", "plan", "console", "faults", "processes"),
    ("buckets", "compose"),
    (
        "reduce",
        "fast",
        "hierarchy",
        "shard",
        "telemetry",
        "checkpoint",
        "saver",
        "trained",
        "sample",
        "evaluate",
        "verify",
        "export",
    ),
    ("loop", "outlook"),
    ("keeper", "balance", "engine", "audit", "profile"),
    ("recovery", "run", "rerun"),
    ("remote", "fleet", "agent", "supervisor", "report"),
    ("job", "runs", "replay", "diff", "resize", "probe", "watch", "projector", "links", "bench"),
    ("drill",),
    ("launch",),
    ("cli", "__main__"),
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
WITHOUT_TORCH = ["config", "commands", "events", "batch", "flops", "hardware", "plan", "folder", "summary", "ledger"]
WITHOUT_TORCH += [
    "compose",
    "cli",
    "console",
    "pulse",
    "processes",
    "supervisor",
    "job",
    "runs",
    "nodes",
    "fleet",
    "agent",
    "manifest",
    "mirror",
]
WITHOUT_TORCH += ["shapes", "verify", "resize", "probe", "drill", "faults.plan", "data.prepare", "data.stream"]
WITHOUT_TORCH += ["scale.command", "scale.calibrate", "report.command", "watch"]
WITHOUT_TORCH += ["bench", "launch.submit", "launch.slurm", "launch.kubernetes"]
LAUNCHERS = sorted((PACKAGE / "launch").glob("*.py"))


def imports(path: Path) -> set[str]:
    """The rooms of this package that a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "train":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("train.")}
    return found


def rooms() -> list[tuple[str, Path]]:
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize(("room", "path"), rooms(), ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_nothing_imports_upwards(room: str, path: Path) -> None:
    if room == "__init__":
        assert imports(path) == set()
        return
    assert room in LEVEL, f"{path.name} is in no layer: say where it belongs"
    upwards = {other for other in imports(path) if LEVEL[other] > LEVEL[room]}
    assert not upwards, f"{path.name} (layer {LEVEL[room]}) imports {upwards}"


def test_tests_are_no_part_of_the_package() -> None:
    """Only `colossus bench` goes there, in a checkout, once it is called: by name, from within its function."""
    for _, path in rooms():
        tree = ast.parse(path.read_text())
        imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported += [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
        assert not [name for name in imported if name.split(".")[0] == "tests"], path
        assert "tests." not in path.read_text() or path.name == "bench.py", path
    code = "import sys, train.bench; print([m for m in sys.modules if m.split('.')[0] == 'tests'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= (400 if path.name != "config.py" else 520), f"{path.name} has {lines} lines"


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_a_launcher_is_a_page(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 120


def test_the_core_keeps_its_budget() -> None:
    """The core is what one must read to know a step, and what a loss does to it; ARCHITECTURE says why so long."""
    core = ("batch", "buckets", "reduce", "ranks", "group", "recovery", "loop", "checkpoint", "run", "events", "config")
    assert sum(len((PACKAGE / f"{name}.py").read_text().splitlines()) for name in core) <= 2500
    assert sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")) <= 18_550


def test_the_projector_keeps_its_budget() -> None:
    assert sum(len(path.read_text().splitlines()) for path in (PACKAGE / "scale").glob("*.py")) <= 1900


def test_the_report_keeps_its_budget() -> None:
    """With the live view; nothing imports it but who starts a run, to leave a report behind."""
    rooms = [*(PACKAGE / "report").glob("*.py"), PACKAGE / "watch.py"]
    assert sum(len(path.read_text().splitlines()) for path in rooms) <= 1270


def test_the_sum_needs_no_lightning() -> None:
    """Somebody else's training loop pays for torch only: lightning would add 4 s to every start of it."""
    code = "import sys, train.reduce; print([m for m in ('lightning', 'lightning_fabric') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_ranks_start_without_what_lightning_brings_along() -> None:
    """And what was left out can be imported later; the collector is at work, but not on what was imported."""
    collector = "gc.isenabled(), gc.get_freeze_count() > 100_000"
    code = f"import train.light, gc; print({collector}); import train.run, sys; print({LEFT_OUT}); import torchmetrics"
    code += (
        "; import torch; torch.compile(lambda x: x, backend='eager')(torch.ones(1)); print(len(torch._dynamo.__path__))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["True True", "[]", "1"]


@pytest.mark.parametrize("command", cli.COMPUTE)
def test_commands_that_compute_start_without_it_too(command: str, tmp_path: Path) -> None:
    run = "run=[a,b]" if command == "diff" else "run=a"
    code = f"import sys; from train import cli; print(cli.main(['{command}', '{run}']), {LEFT_OUT})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n", done.stderr


def test_a_command_ends_without_looking_through_what_is_left() -> None:
    code = "import atexit, gc, train.cli; atexit._run_exitfuncs(); print(gc.get_freeze_count() > 10_000)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"


def test_the_parent_needs_no_torch() -> None:
    """What runs before a bad key is refused, and what supervises, imports neither torch nor lightning."""
    modules = ", ".join(f"train.{name}" for name in WITHOUT_TORCH)
    code = f"import sys, {modules}; print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
