"""The law in somebody else's loop: one of ours in a foreign style, the README's as printed, and nanoGPT's train.py.

nanoGPT is taken from $NANOGPT (a checkout), or fetched at a fixed commit, or its tests say why they skip.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests import dist, nanogpt
from train.fast import FastReducer
from train.group import Group
from train.processes import forkserver, log_to
from train.reduce import ExactReducer

ROOT = Path(__file__).parent.parent
URL, COMMIT = "https://github.com/karpathy/nanoGPT", "3adf61e154c3fe3fca428ad6bc3818b27a3b8291"
PATIENCE = 4.0  # seconds for fetching it


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and bits."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(name.encode() + tensor.detach().numpy().tobytes())
    return sha256.hexdigest()


# ------------------------------------------------------------------------------------------ a loop that is not ours


class Foreign(nn.Module):
    """A recurrent character model with tied weights, dropout, and a parameter that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 24)
        self.rnn = nn.GRU(24, 24, num_layers=2, dropout=0.2, batch_first=True)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 31)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(3, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.rnn(self.embedding(tokens))[0]))
        return logits


def foreign(group: Group, mode: str, optimizer_first: bool, micro_batches: int) -> list[str]:
    """8 steps of a loop such as anybody writes; afterwards the weights, the moments and the losses, as digests."""
    kind = {"exact": ExactReducer, "fast": FastReducer}[mode]
    torch.manual_seed(group.rank)  # like DDP, the library makes rank 0's weights everybody's
    model = Foreign()
    if optimizer_first:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reducer = kind.of(model, virtual_ranks=8, micro_batches=micro_batches)
    if not optimizer_first:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.randint(31, (4000,), generator=torch.Generator().manual_seed(5))
    losses, clipped = [], 0
    drawn = set()
    for step in range(8):
        if group.rank == 0:
            torch.rand(step + 1)  # what a main process does beside (evaluation, samples) draws numbers, too
        for _, _, buffer in reducer.micro_batches(seed=7, step=step):
            starts = torch.randint(len(text) - 13, (3,))
            drawn.add(str(starts))
            x = torch.stack([text[s : s + 12] for s in starts])
            y = torch.stack([text[s + 1 : s + 13] for s in starts])
            loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten()) / (8 * micro_batches)
            loss.backward()  # type: ignore[no-untyped-call]
            buffer.loss += loss.detach()
        total = reducer.finish()
        clipped += int(nn.utils.clip_grad_norm_(model.parameters(), 0.3) > 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total.loss))
    assert losses[-1] < losses[0]
    assert clipped > 0
    assert len(drawn) == 8 * micro_batches * len(reducer.hosted[group.rank]), "each draws its own"
    moments = {f"{i}.{key}": value for i, of in optimizer.state_dict()["state"].items() for key, value in of.items()}
    assert len(moments) == 3 * len(list(model.parameters()))
    return [digest(model.state_dict()), digest(moments), str(losses)]


@pytest.mark.parametrize(("optimizer_first", "micro_batches", "worlds"), [(True, 1, (1, 2, 3, 4)), (False, 2, (1, 3))])
def test_a_foreign_loop_gives_the_same_bits_on_any_number_of_ranks(
    optimizer_first: bool, micro_batches: int, worlds: tuple[int, ...]
) -> None:
    """Weights, moments and losses; and the optimizer may be built before the reducer or after."""
    seen = set()
    for world in worlds:
        options = {"optimizer_first": optimizer_first, "micro_batches": micro_batches}
        seen |= {str(result) for result in dist.run("tests.test_library:foreign", world, mode="exact", **options)}
    assert len(seen) == 1


def test_the_same_loop_does_not_without_the_tree() -> None:
    """Same batches, same seeds, same loop: what differs is the order of addition."""
    seen = set()
    for world in (1, 2, 4):
        results = dist.run("tests.test_library:foreign", world, mode="fast", optimizer_first=False, micro_batches=1)
        assert len({str(result) for result in results}) == 1
        seen.add(results[0][0])
    assert len(seen) == 3


def held(group: Group) -> list[int]:
    """Threads of this process while it has a default group and a reducer that has used it, and once that is gone."""

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    reducer = ExactReducer.of(nn.Linear(3, 3), virtual_ranks=2)
    for _, buffer in reducer.leaves():
        buffer.tensor.fill_(1.0)
    reducer.finish()
    during = threads()
    torch.distributed.destroy_process_group()  # type: ignore[no-untyped-call]
    until = time.monotonic() + 60
    while threads() >= during and time.monotonic() < until:
        time.sleep(0.01)  # a thread that has been joined is listed for a moment more
    return [during, threads(), reducer.virtual_ranks]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_reducer_does_not_hold_the_group() -> None:
    """A group that is held outlives its destruction, and its threads may then abort the process at its end."""
    for during, after, _ in dist.run("tests.test_library:held", 2):
        assert after < during


def test_what_the_sum_cannot_serve_is_refused() -> None:
    """A frozen parameter would be given zeros for a gradient, and weight decay would move it."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5).bfloat16(), nn.Linear(5, 6))
    model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"not so 0\.bias, 1\.weight, 1\.bias"):
        ExactReducer.of(model)


def shared(group: Group, how: str, first: bool) -> str:
    """A step of a model that uses one layer twice, in segments that are computed again in the backward pass."""
    torch.manual_seed(0)
    layer, head = nn.Linear(5, 5), nn.Linear(5, 1)
    below = nn.Linear(5, 5) if first else nn.Identity()  # its gradient comes last; without it, the shared layer's own
    model = nn.ModuleList([below, layer, head])
    reducer = ExactReducer.of(model, virtual_ranks=4, micro_batches=2)
    for v, i, _ in reducer.micro_batches(seed=0, step=0):
        x = below(torch.full((3, 5), 0.1 * v + i, requires_grad=True))
        for _ in range(2):
            x = checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=how == "reentrant")
        losses = head(x).square().sum(), x.sum()
        for loss in losses if how == "two passes" else [losses[0] + losses[1]]:
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    return hashlib.sha256(reducer.finish().gradient[: reducer.flat.size].numpy().data).hexdigest()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("how", ["reentrant", "two passes"])
def test_a_gradient_that_comes_after_its_bucket_is_refused(how: str, first: bool) -> None:
    """Whatever is complete is sent. Without the refusal the sum lacked what came later: another one for each W."""
    with pytest.raises(AssertionError, match=r"got a gradient twice .* use_reentrant=False"):
        dist.run("tests.test_library:shared", 2, how=how, first=first)


@pytest.mark.parametrize("first", [True, False])
def test_a_shared_layer_is_summed_once_complete(first: bool) -> None:
    """Autograd itself adds up what several places of one backward pass say of a parameter."""
    seen = {s for w in (1, 2, 3) for s in dist.run("tests.test_library:shared", w, how="one pass", first=first)}
    assert len(seen) == 1


# --------------------------------------------------------------------------------------------------- whole programs


def torchrun(script: Path, world: int, *arguments: str) -> str:
    """What `torchrun script` prints, one thread a rank. The package is found where this test stands."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    return program([*command, script.name, *arguments], script.parent)


def program(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {} if sys.platform == "darwin" else {"GLOO_SOCKET_IFNAME": "lo"}
    for inherited in ("PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE"):  # the one hides model.py, the other is slow
        environment.pop(inherited, None)
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def forked(script: Path, world: int, *arguments: str) -> str:
    """The same from ranks that are forked where torch is imported already, which takes longer than these programs.

    They meet as those of torchrun do: at a store that is not theirs.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = [script.with_name(f"rank-{rank}.log") for rank in range(world)]
    ranks = []
    for rank, log in enumerate(logs):
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        facts |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        where = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        order = (script, arguments, where | {key: str(value) for key, value in facts.items()}, log)
        ranks.append(forkserver().Process(target=as_rank, args=order, daemon=True))  # type: ignore[attr-defined]
        ranks[-1].start()
    for process in ranks:
        process.join(120)
        process.kill()
        process.join()
    said = "".join(log.read_text() for log in logs)
    assert [process.exitcode for process in ranks] == [0] * world, said[-3000:]
    return said


def as_rank(script: Path, arguments: tuple[str, ...], facts: dict[str, str], log: Path) -> None:
    log_to(log)
    log.write_text("")
    os.environ.update(facts)
    os.chdir(script.parent)
    sys.argv, sys.path = [script.name, *arguments], [str(script.parent), *sys.path]
    torch.set_num_threads(1)
    runpy.run_path(str(script), run_name="__main__")
    sys.stdout.flush()


def test_the_readme_loop_runs_as_printed(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split("## The law as a library", 1)[1].split("\n## ", 1)[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    end = "dist.destroy_process_group()\n"
    assert code.endswith(end)
    watch = "import weakref\ngroup = weakref.ref(dist.group.WORLD)\n"  # nor does torch hold it then: see train.ranks
    code = code.replace(end, f"{watch}{end}assert group() is None\n")
    (tmp_path / "loop.py").write_text(code)
    printed = {torchrun(tmp_path / "loop.py", 2), *(forked(tmp_path / "loop.py", world) for world in (1, 3))}
    assert len(printed) == 1
    (line,) = printed
    assert 0 < float(line) < 1, "it has learned something"


# ---------------------------------------------------------------------------------------------------------- nanoGPT

STEPS = 30
SETTINGS = {
    **{"dataset": "'tiny'", "device": "'cpu'", "backend": "'gloo'", "dtype": "'float32'", "compile": False},
    **{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4, "gradient_accumulation_steps": 8},
    **{"dropout": 0.1, "grad_clip": 0.5, "learning_rate": 1e-2, "warmup_iters": 5, "lr_decay_iters": STEPS},
    **{"max_iters": STEPS, "eval_interval": STEPS // 2, "eval_iters": 2},  # a checkpoint at half-time and after STEPS
}


@pytest.fixture(scope="module")
def checkout() -> Path:
    """A checkout of nanoGPT."""
    if "NANOGPT" in os.environ:
        folder = Path(os.environ["NANOGPT"]).expanduser()
        assert (folder / "train.py").is_file(), f"NANOGPT={folder} holds no train.py"
        return folder
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "pocket-colossus" / f"nanoGPT-{COMMIT[:8]}"
    if not (folder / "train.py").is_file():
        fetching = folder.with_name(f"{folder.name}.{os.getpid()}")
        git = ["git", "-C", str(fetching)]
        try:
            fetching.mkdir(parents=True)
            subprocess.run([*git, "init", "-q"], check=True, capture_output=True)
            subprocess.run(
                [*git, "fetch", "-q", "--depth", "1", URL, COMMIT],
                env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
                **{"check": True, "capture_output": True, "timeout": PATIENCE},  # type: ignore[call-overload]
            )
            subprocess.run([*git, "checkout", "-q", "FETCH_HEAD"], check=True, capture_output=True)
            fetching.rename(folder)
        except (OSError, subprocess.SubprocessError):
            pytest.skip(f"skipped, because {URL} cannot be fetched in {PATIENCE:g} s and NANOGPT names no checkout")
        finally:
            shutil.rmtree(fetching, ignore_errors=True)
    return folder


@pytest.fixture(scope="module")
def run(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, list[str]]]:
    """Runs nanoGPT with some edits on W ranks (0: by itself): a digest of its checkpoint, its printed losses."""
    original = (checkout / "train.py").read_text()
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(200)]
    text = " ".join(rng.choices(words, k=6000))
    letters = sorted(set(text))
    ids = np.array([letters.index(letter) for letter in text], dtype=np.uint16)
    folders: dict[str, Path] = {}

    def prepared(name: str) -> Path:
        if name not in folders:
            folder = folders[name] = tmp_path_factory.mktemp(name)
            for file in ("model.py", "configurator.py"):
                shutil.copy(checkout / file, folder)
            edits = {"unpatched": nanogpt.UNPATCHED, "patched": nanogpt.EXACT}[name]
            (folder / "train.py").write_text(nanogpt.edited(original, edits))
            (data := folder / "data" / "tiny").mkdir(parents=True)
            ids[:-4000].tofile(data / "train.bin")
            ids[-4000:].tofile(data / "val.bin")
            # {'vocab_size': n} as nanoGPT's own prepare.py pickles it, by hand
            (data / "meta.pkl").write_bytes(b"(dVvocab_size\nI%d\ns." % len(letters))
        return folders[name]

    @functools.cache
    def run(name: str, world: int, out: str = "", **settings: Any) -> tuple[str, list[str]]:
        folder = prepared(name)
        out = out or f"out-{world}"
        given = {**SETTINGS, "out_dir": f"'{out}'", **settings}
        arguments = [f"--{key}={value}".replace("'", "") for key, value in given.items()]
        script = folder / "train.py"
        alone = [sys.executable, script.name, *arguments]
        printed = forked(script, world, *arguments) if world else program(alone, folder)
        saved = torch.load(folder / out / "ckpt.pt", weights_only=True)
        assert saved["iter_num"] == given["max_iters"] // given["eval_interval"] * given["eval_interval"]
        moments = {f"{i}.{key}": value for i, of in saved["optimizer"]["state"].items() for key, value in of.items()}
        return digest(saved["model"] | moments), re.findall(r"^iter \d+: loss [\d.]+", printed, flags=re.MULTILINE)

    return run


Run = Callable[..., tuple[str, list[str]]]


def test_nanogpt_changes_in_few_lines(checkout: Path) -> None:
    original = (checkout / "train.py").read_text()
    new, gone = nanogpt.changed_lines(original, nanogpt.edited(original, nanogpt.EXACT))
    assert (new, gone) == (13, 2)
    promised = re.search(r"(\d+) of its lines are new or changed and (\d+) go", (ROOT / "README.md").read_text())
    assert promised
    assert (new, gone) == tuple(map(int, promised.groups()))


def test_nanogpt_gives_one_hash_on_any_number_of_ranks(run: Run) -> None:
    """Weights and moments after 30 steps, and every printed loss: on 1, 2, 4 ranks as of torchrun, and without it."""
    results = {world: run("patched", world) for world in (0, 1, 2, 4)}
    print("patched", {world: digest[:12] for world, (digest, _) in results.items()})
    assert len({digest for digest, _ in results.values()}) == 1
    losses = results[1][1]
    assert len(losses) == STEPS + 1
    assert float(losses[-1].split()[-1]) < float(losses[0].split()[-1]) - 0.1
    assert all(result[1] == losses for result in results.values())


def test_nanogpt_resumes_exactly_on_another_number_of_ranks(run: Run) -> None:
    """Not promised by nanoGPT itself: there is no state of a generator left that would have to be saved."""
    whole, losses = run("patched", 1)
    run("patched", 4, "parts", max_iters=STEPS // 2)
    resumed, rest = run("patched", 2, "parts", init_from="resume")
    assert resumed == whole
    assert rest == losses[STEPS // 2 :]


def test_nanogpt_alone_gives_another_hash_for_each_number_of_ranks(run: Run) -> None:
    """The same global batch; all that is edited is what keeps it from running on a CPU."""
    results = {world: run("unpatched", world) for world in (1, 2, 4)}
    print("unpatched", {world: digest[:12] for world, (digest, _) in results.items()})
    assert run("unpatched", 2, "again") == results[2], "not for want of determinism"
    assert len({digest for digest, _ in results.values()}) == 3
