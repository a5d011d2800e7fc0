"""The main job from the outside: `colossus train`, on one process and on many."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from tqdm import tqdm

from tests.conftest import without_model
from tests.running import Fresh, Running, at_step, gone
from train import cli, engine, events, hardware, job, manifest, trained
from train.config import Train
from train.folder import RunFolder
from train.models.language import LanguageModel
from train.supervisor import Supervisor


def train(overrides: list[str], *more: str) -> tuple[int, Path]:
    """Run in this process (its forkserver is warm); returns the exit code and the run folder."""
    arguments = [*overrides, *more]
    settings = dict(argument.split("=", 1) for argument in arguments)
    return cli.main(["train", *arguments]), Path(settings["runs"]) / settings["name"]


def summary(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / "summary.json").read_text())
    assert isinstance(value, dict)
    return value


def steps(folder: Path) -> list[dict[str, Any]]:
    return [record for record in events.read(folder / "events.jsonl") if record["kind"] == "step"]


def sha256(overrides: list[str], *more: str) -> str:
    code, folder = train(overrides, *more)
    assert code == 0
    return str(summary(folder)["state_sha256"])


def process_of(rank: int, pids: set[int]) -> int:
    """By the name of its log: not always is a later process's number the larger one."""
    return next(pid for pid in pids if os.readlink(f"/proc/{pid}/fd/1").endswith(f"/rank-{rank}.log"))


@pytest.mark.parametrize(
    ("more", "cells"),
    [
        (
            ["model.width=42", "model.ffn=57", "batch.micro_batch=1"],  # k = 2
            [(1, "none"), (2, "optimizer"), (3, "full"), (5, "none")],
        ),
        (
            [
                *("precision=bf16", "model.dropout=0.2", "model.tied=false"),
                *("batch.virtual_ranks=6", "batch.sequences=12", "batch.micro_batch=2"),
            ],
            [(1, "none"), (2, "full"), (4, "optimizer")],
        ),
    ],
    ids=["fp32-odd", "bf16-dropout-V6"],
)
def test_the_result_does_not_depend_on_ranks_or_sharding(
    more: list[str], cells: list[tuple[int, str]], tiny: list[str]
) -> None:
    """Losses, gradient norms, evaluation and state over 8 steps, to the bit. `make bench-exact`: the whole table."""
    runs = {}
    for world, sharding in cells:
        settings = [f"name=w{world}", f"devices={world}", f"sharding={sharding}", "steps=8", "eval.every=4"]
        code, folder = train(tiny, *more, *settings, "eval.sample=20")
        assert code == 0
        numbers = [(step["loss_hex"], step["grad_norm"], step["lr"], step["tokens"]) for step in steps(folder)]
        scores = [(r["loss"], r["sample"]) for r in events.read(folder / "events.jsonl") if r["kind"] == "eval"]
        assert all(text for _, text in scores[:-1])  # the last words are said at the end
        evidence = [
            (r["tokens"], r["leaves"], r["parameters"], r["gradient"])
            for r in events.read(folder / "events.jsonl")
            if r["kind"] == "digests"
        ]
        runs[world] = (summary(folder)["state_sha256"], numbers, scores, evidence)
        assert (len(numbers), len(scores), len(evidence)) == (8, 2, 8)
    assert all(run == runs[1] for run in runs.values())


FAMILIES = {
    "grok": ["model=grok_micro", "model.width=24", "model.heads=2", "model.kv_heads=1", "model.experts=5"],
    "gpt2": ["model=gpt2_micro", "model.layers=2", "model.width=42", "model.heads=3", "model.ffn=57"],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("precision", "cells"),
    [("fp32", [(1, "none"), (3, "full")]), ("bf16", [(1, "none"), (2, "optimizer"), (3, "none")])],
)
def test_every_family_keeps_the_law(family: str, precision: str, cells: list[tuple[int, str]], tiny: list[str]) -> None:
    """With dropout, on odd shapes, in every way of sharding; `tiny` without what it says of llama's."""
    small = [*without_model(tiny), "steps=3"]
    more = [*FAMILIES[family], "model.context=32", "model.dropout=0.1", f"precision={precision}"]
    runs = []
    for world, sharding in cells:
        code, folder = train(small, *more, f"name=w{world}", f"devices={world}", f"sharding={sharding}", "logger=[csv]")
        assert code == 0
        evaluated = [r for r in events.read(folder / "events.jsonl") if r["kind"] == "eval"]
        scores = [(r["loss"], r["experts"], r["balance"], r["router_z"]) for r in evaluated]
        routed = [r for r in events.read(folder / "events.jsonl") if r["kind"] == "routing"]
        routes = [(r["step"], r["experts"], r["balance"], r["router_z"]) for r in routed]
        runs.append((summary(folder)["state_sha256"], [step["loss_hex"] for step in steps(folder)], scores, routes))
    assert len(runs[0][1]) == 3
    assert all(run == runs[0] for run in runs)
    for evaluation in evaluated:  # each of two layers has sent each token to two of five
        assert [len(layer) for layer in evaluation["experts"]] == ([5, 5] if family == "grok" else [])
        assert all(sum(layer) == 2 * evaluation["tokens"] for layer in evaluation["experts"])
    assert [r["step"] for r in routed] == ([2, 3] if family == "grok" else [])  # log.every=2
    assert all(sum(layer) == 2 * 10 * 32 for r in routed for layer in r["experts"])  # of the whole batch
    logged = (folder / "csv/start-1/metrics.csv").read_text().splitlines()[0].split(",")
    assert "val/loss" in logged
    assert ({"val/balance", "val/router_z", "experts/busiest_of_layer_1"} <= set(logged)) == (family == "grok")
    assert ({"train/balance", "train/router_z"} <= set(logged)) == (family == "grok")


def test_shares_may_be_uneven_and_are_recorded(tiny: list[str]) -> None:
    expected = sha256(tiny, "name=even", "devices=1")
    assert sha256(tiny, "name=by-hand", "devices=2", "batch.weights=[3,1]") == expected
    code, folder = train(tiny, "name=auto", "devices=3", "batch.weights=auto")
    assert code == 0
    assert summary(folder)["state_sha256"] == expected
    recorded = [r for r in events.read(folder.parent / "by-hand/events.jsonl") if r["kind"] == "ownership"]
    assert [(r["shares"], r["why"]) for r in recorded] == [([4, 1], "batch.weights")]


def test_ranks_that_compute_other_bits_are_told_apart(tiny: list[str], tmp_path: Path, port: int) -> None:
    """Two nodes, one of which uses other vector instructions: the handshake says so, and ownership stays as it is."""
    overrides = [argument for argument in tiny if not argument.startswith("runs=")]
    started = [
        Running(
            [*overrides, f"runs={tmp_path}/node{index}", "name=a", "nodes=2", "devices=1", "batch.weights=auto"],
            PET_NODE_RANK=str(index),
            PET_MASTER_ADDR="127.0.0.1",
            PET_MASTER_PORT=str(port),
            ATEN_CPU_CAPABILITY=capability,  # which torch heeds when it first computes
        )
        for index, capability in enumerate(("default", "avx2"))
    ]
    for running in started:
        code, _, err = running.end()
        assert code == 0, err
    records = list(events.read(started[0].folder / "events.jsonl"))
    (handshake,) = [r for r in records if r["kind"] == "handshake"]
    assert not handshake["equal"]
    assert len(set(handshake["digests"])) == 2
    (warning,) = [r for r in records if r["kind"] == "warning"]
    assert "ranks 1 compute other bits than rank 0" in warning["text"]
    assert not any(r["kind"] == "ownership" for r in records)


def test_ranks_are_handed_their_configuration(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They read no file for it."""
    write = RunFolder.write

    def spoiled(run: RunFolder, config: Train, data: dict[str, Any]) -> None:
        write(run, config, data)
        (run.path / "config.yaml").write_text("no configuration")

    monkeypatch.setattr(RunFolder, "write", spoiled)
    assert train(tiny, "name=a", "devices=2", "steps=2")[0] == 0


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("steps=1", []),
        ("compile=true", ["torch._inductor"]),
        ("model.loss_chunk=8", ["torch._inductor"]),
        ("model.checkpoint_activations=selective", ["torch._inductor"]),
    ],
)
def test_the_compiler_is_imported_once_for_all_ranks_where_they_need_it(
    more: str, expected: list[str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def forkserver(*preloaded: str) -> None:
        raise Seen(*preloaded)

    monkeypatch.setattr(job, "forkserver", forkserver)
    monkeypatch.setattr(hardware, "compiler", lambda: "sh")  # which is there
    with pytest.raises(Seen) as seen:
        train(tiny, "name=a", "devices=2", more)
    assert list(seen.value.args) == expected


def test_another_seed_or_the_fast_reduction_is_another_result(tiny: list[str]) -> None:
    """Were everything equal to everything, the test above could not fail."""
    short = [*tiny, "steps=3"]
    digests = {
        sha256(short, "name=a", "devices=3"),
        sha256(short, "name=b", "devices=3", "seed=1"),
        sha256(short, "name=c", "devices=3", "reduce=fast"),
        sha256(short, "name=d", "devices=1", "reduce=fast"),
    }
    assert len(digests) == 4


def test_without_a_compiler_nothing_is_compiled(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert train(tiny, "name=a", "compile=true")[0] == 2
    assert "compile: true needs no-such-compiler" in capsys.readouterr().err


def test_a_kept_graph_is_not_taken_for_one_with_another_backward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which it is safe to keep graphs with functions of our own: another version's may differ in that alone."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.set_deterministic_debug_mode("error")  # as a run does; torch tells the compiler in the middle of the first

    def slope(products: int) -> tuple[float, dict[str, int]]:
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                ctx.save_for_backward(x)
                return x.mm(x)  # a call of the library: nothing else is compiled, which would take ten seconds

            @staticmethod
            def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
                gradient = gradients[0]
                for _ in range(products):
                    gradient = gradient.mm(*ctx.saved_tensors)
                return gradient

        torch._dynamo.reset()
        counters.clear()
        x = (2 * torch.eye(4)).requires_grad_()
        engine.compiled(cast(LanguageModel, Function.apply), tmp_path)(x).backward(torch.eye(4))  # type: ignore[no-untyped-call]
        assert x.grad is not None
        kept = {key: n for key, n in counters["aot_autograd"].items() if key.startswith("autograd_cache")}
        return float(x.grad[0, 0]), kept

    first, again, other = slope(1), slope(1), slope(2)
    assert first == (2.0, {"autograd_cache_miss": 1, "autograd_cache_saved": 1})
    assert again == (2.0, {"autograd_cache_hit": 1})
    assert other == (4.0, {"autograd_cache_miss": 1, "autograd_cache_saved": 1})


@pytest.mark.parametrize(("how", "mode"), [(True, None), ("graphs", "reduce-overhead")])
def test_graphs_are_torchs_own(how: bool | str, mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    monkeypatch.setattr(torch, "compile", lambda model, **how: asked.append(how))
    engine.compiled(cast(LanguageModel, torch.nn.Identity()), Path(), how)
    assert asked == [{"fullgraph": True, "dynamic": False, "mode": mode}]


def test_a_users_own_place_for_compiled_code_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the data's cache folder; torch's own default, which it may have put into the environment, does not."""
    for given, expected in (("/elsewhere", "/elsewhere"), (default_cache_dir(), str(tmp_path / "compiled"))):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
        engine.compiled(cast(LanguageModel, torch.nn.Identity()), tmp_path)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == expected
    assert isinstance(tqdm.get_lock(), type(threading.RLock()))  # a rank that is killed leaves no semaphore behind


def test_the_run_folder_holds_what_is_promised(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = train(tiny, "name=all", "devices=2", "logger=[tensorboard,csv]")
    assert code == 0
    step = steps(folder)[-1]
    assert {"time", "kind", "step", "loss", "loss_hex", "lr", "grad_norm", "tokens", "seconds", "world"} <= set(step)
    assert (step["step"], step["tokens"], step["world"]) == (6, 6 * 10 * 32, 2)
    assert float.fromhex(step["loss_hex"]) == step["loss"]
    found = summary(folder)
    promised = "steps final_loss val_bpb tokens tokens_per_s mfu world_sizes state_sha256 goodput"
    assert set(promised.split()) <= set(found)
    assert found["world_sizes"] == [2]
    assert sum(found["goodput"]["seconds"].values()) == pytest.approx(found["goodput"]["wall_s"])
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "data.json", "events.jsonl", "summary.json", "checkpoints", "logs", "tensorboard"} <= names
    assert (folder / "csv/start-1/metrics.csv").read_text().count("\n") > 2
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    said = capsys.readouterr().out
    for words in ("2 ranks", "5 virtual ranks x 1 x 2", "bits per byte", "gzip -9", "colossus sample run="):
        assert words in said

    assert cli.main(["runs", f"runs={folder.parent}", "format=json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["state"], listed["steps"]) == ("all", "done", 6)

    assert cli.main(["eval", f"run={folder}", "accelerator=cpu", "format=json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["bpb"] == found["val_bpb"]
    assert score["perplexity"] == math.exp(score["loss"])
    scored_elsewhere(tiny, folder, capsys)

    sample = ["sample", f"run={folder}", "prompt=def f(x): ", "tokens=20", "accelerator=cpu"]
    texts = []
    for seed in ("seed=1", "seed=1", "seed=2"):
        assert cli.main([*sample, seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def f(x): ")
    assert texts[0] == texts[1] != texts[2]


def scored_elsewhere(tiny: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All documents of another corpus, by hand: nats of every token after an end of document, in the run's tokens."""
    path = folder.parent / "other"
    path.mkdir()
    texts = ["def f(x):\n    return x\n" * n for n in range(1, 6)]
    for n, text in enumerate(texts):
        (path / f"{n}.py").write_text(text)
    data = ["data=text", f"data.path={path}", *(one for one in tiny if one.startswith("data.cache"))]
    asked = ["eval", f"run={folder}", "accelerator=cpu", "format=json", *data]
    assert cli.main(asked) == 0
    score = json.loads(capsys.readouterr().out)
    run = trained.load(folder, -1, torch.device("cpu"))
    ids = [run.tokenizer.eot]
    for text in texts:
        ids += [*run.tokenizer.encode(text), run.tokenizer.eot]
    nats = 0.0
    for start in range(0, len(ids) - 1, 32):
        window = torch.tensor([ids[start : start + 33]])
        nats += float(run.model(window[:, :-1], window[:, 1:]).detach())
    assert (score["tokens"], score["bytes"]) == (len(ids) - 1, sum(map(len, texts)))
    assert score["bpb"] == pytest.approx(nats / math.log(2) / score["bytes"], rel=1e-5)
    assert score["gzip_documents"] is not None
    assert cli.main([*asked, "data.tokenizer.kind=bytes"]) == 2
    assert "data.tokenizer: is the run's own" in capsys.readouterr().err


def test_a_run_writes_samples_or_none(tiny: list[str]) -> None:
    """At each evaluation but the last, and at the end."""
    for tokens, texts in ((0, [False] * 4), (5, [True, True, False, True])):
        code, folder = train(tiny, f"name=n{tokens}", "devices=1", "steps=3", "eval.every=1", f"eval.sample={tokens}")
        assert code == 0
        said = [r["sample"] for r in events.read(folder / "events.jsonl") if r["kind"] in ("eval", "end")]
        assert [bool(text) for text in said] == texts


def test_a_finished_run_says_so_and_more_steps_continue_it(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    constant = [*tiny, "schedule=constant", "name=a", "devices=2"]
    assert train(constant)[0] == 0
    assert train(constant)[0] == 0
    assert "is finished (6 steps)" in capsys.readouterr().out
    assert train([*constant, "steps=9"])[0] == 2
    assert "resume.allow=steps" in capsys.readouterr().err
    code, folder = train([*constant, "steps=9", "resume.allow=steps", "devices=3"])
    assert code == 0
    assert summary(folder)["state_sha256"] == sha256(tiny, "schedule=constant", "name=b", "devices=1", "steps=9")
    assert summary(folder)["world_sizes"] == [2, 3]


def test_what_may_not_be_continued_is_refused(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tiny, "name=a", "devices=1", "resume=required")[0] == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert train(tiny, "name=a", "devices=1")[0] == 0
    for more, word in (
        (["resume=never"], "resume=never"),
        (["optimizer.lr=0.5", "steps=8", "resume.allow=steps"], "optimizer.lr"),
    ):
        assert train([*tiny, "name=a", "devices=1", *more])[0] == 2
        assert word in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over(tiny: list[str]) -> None:
    """The last one is cut short: the run goes on from the one before it, to the same bits."""
    code, folder = train(tiny, "name=a", "devices=2")
    assert code == 0
    expected = summary(folder)["state_sha256"]
    (folder / "summary.json").unlink()
    os.truncate(folder / "checkpoints/step-00000006/model-00000.safetensors", 100)
    assert train(tiny, "name=a", "devices=1")[0] == 0
    assert summary(folder)["state_sha256"] == expected
    (restored,) = [r for r in events.read(folder / "events.jsonl") if r["kind"] == "restore"]
    assert restored["step"] == 3
    assert "step-00000006" in restored["refused"][0]


def test_if_no_checkpoint_is_whole_nothing_is_trained(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = train(tiny, "name=a", "devices=1")
    (folder / "summary.json").unlink()
    for path in manifest.candidates(folder / "checkpoints"):
        os.truncate(path / "manifest.json", 10)
    capsys.readouterr()
    assert train(tiny, "name=a", "devices=1")[0] == 2
    assert "no checkpoint is whole" in capsys.readouterr().err


def test_a_changed_corpus_is_refused(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"document {number} says {number * number} " * 30)
    overrides = [*tiny, f"data.path={text}", "name=a", "devices=1", "data.tokenizer.kind=bytes", "data.validation=0.2"]
    assert train(overrides)[0] == 0
    (text / "1.txt").write_text("something else " * 50)
    assert train([*overrides, "steps=8", "resume.allow=steps"])[0] == 2
    assert "the corpus is not the one" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = train(
        tiny, "name=a", "devices=2", "optimizer.lr=1e30", "optimizer.clip_norm=0", "checkpoint.every=1"
    )
    assert code == 1
    assert "optimizer.lr" in capsys.readouterr().err
    saved = {r["step"] for r in events.read(folder / "events.jsonl") if r["kind"] == "checkpoint"}
    finite = {step["step"] for step in steps(folder) if step["loss"] is not None}
    assert saved <= finite, "nothing that is not finite was saved"


def test_a_sweep_trains_each_combination_on_several_ranks(tiny: list[str], tmp_path: Path) -> None:
    code = cli.main(["train", "--multirun", *tiny, "name=s", "devices=2", "steps=2", "seed=0,1"])
    assert code == 0
    folders = sorted(path for path in (tmp_path / "runs").iterdir() if (path / "summary.json").exists())
    assert len(folders) == 2
    assert len({summary(folder)["state_sha256"] for folder in folders}) == 2


def test_a_dataset_of_several_files_is_trained_on(tiny: list[str], corpus: Path, tmp_path: Path) -> None:
    """data=hf, on a folder laid out like a dataset: shards arrive while the ranks train; equal bits all the same."""
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    files = sorted(corpus.iterdir())
    for shard in range(3):
        lines = [json.dumps({"text": file.read_text()}) for file in files[20 * shard : 20 * shard + 20]]
        (dataset / f"train-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    overrides = [*tiny, "data=hf", f"data.name={dataset}", "data.validation=0.3", "data.shard_tokens=12000", "steps=24"]
    overrides = [override for override in overrides if not override.startswith("data.path=")]
    assert sha256(overrides, "name=a", "devices=1") == sha256(overrides, "name=b", "devices=3")


# ----------------------------------------------------------------------------------- processes and signals


def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_bits(tiny: list[str]) -> None:
    """SIGINT to the whole foreground group, as a terminal sends it: exit 75, nothing left, equal state in the end."""
    more = ("name=a", "devices=2", "schedule=constant", "eval.every=0", "checkpoint.every=0")
    running = Fresh(tiny, *more, "steps=100000")
    running.wait_for(at_step(5))
    pids = running.children()
    assert len(pids) >= 3  # the forkserver and two ranks
    running.send(signal.SIGINT)
    code, out, err = running.end()
    assert code == 75, err
    assert "asked to stop" in out
    assert gone(pids, within=60)
    stopped = summary(running.folder)
    assert stopped["stopped"]
    assert stopped["steps"] >= 5
    (saved,) = manifest.candidates(running.folder / "checkpoints")
    assert saved.name == manifest.folder_name(stopped["steps"])

    total = f"steps={stopped['steps'] + 4}"
    assert train([*tiny, *more], total, "devices=3", "resume.allow=steps")[0] == 0
    assert summary(running.folder)["state_sha256"] == sha256(tiny, *more, total, "name=b", "devices=1")


def test_stop_after_saves_and_exits_75(tiny: list[str]) -> None:
    code, folder = train(tiny, "name=a", "devices=2", "steps=100000", "stop_after=1s", "eval.every=0")
    assert code == 75
    assert summary(folder)["stopped"]


def test_a_killed_parent_takes_its_ranks_along(tiny: list[str]) -> None:
    """Also a rank that is stopped, and the one that waits for it inside a collective."""
    running = Running(tiny, "name=a", "devices=2", "steps=100000")
    running.wait_for(at_step(2))
    pids = running.children()
    os.kill(process_of(1, pids), signal.SIGSTOP)
    time.sleep(0.5)  # the other one gets stuck
    running.process.kill()
    running.end()
    assert gone(pids, within=60)


def test_a_killed_rank_ends_the_run_and_is_named(tiny: list[str]) -> None:
    """Where nobody is to go on without it."""
    settings = ("recovery.in_place=false", "recovery.restarts=0")
    running = Running(tiny, "name=a", "devices=3", "steps=100000", *settings)
    running.wait_for(at_step(2))
    pids = running.children()
    os.kill(process_of(2, pids), signal.SIGKILL)
    code, _, err = running.end()
    assert code == 1
    assert "rank 2" in err
    assert "SIGKILL" in err
    assert "out of memory" in err
    assert len(err.splitlines()) == 1
    assert gone(pids, within=60)
    assert any(r["kind"] == "fault" and r["rank"] == 2 for r in events.read(running.folder / "events.jsonl"))


def test_who_was_killed_is_named_though_the_others_spoke_of_it_before_it_had_ended() -> None:
    """The kernel closes a process's sockets first, and lets its parent know later, on a busy machine much later."""

    class Dying:
        fault, until = None, time.monotonic() + 0.2

        @property
        def killed(self) -> bool:
            return time.monotonic() > self.until

        @property
        def alive(self) -> bool:
            return not self.killed

    spoke, dying = SimpleNamespace(killed=False, alive=True, fault={"time": 0.0}), Dying()
    supervisor: Any = Supervisor.__new__(Supervisor)
    supervisor._ranks, supervisor._hear = [spoke, dying], lambda: None
    assert supervisor._culprit([spoke]) is dying
    supervisor._ranks = [spoke]
    assert supervisor._culprit([spoke]) is spoke


def test_a_second_writer_is_refused(tiny: list[str]) -> None:
    running = Running(tiny, "name=a", "devices=1", "steps=100000")
    running.wait_for(at_step(1))
    second = Running(tiny, "name=a", "devices=1", "steps=100000")
    code, _, err = second.end()
    assert code == 2
    assert "another process" in err
    running.send(signal.SIGTERM)
    assert running.end()[0] == 75


def test_two_nodes_train_together(tiny: list[str], tmp_path: Path, port: int) -> None:
    """The same command once per node, each with its own runs folder, begun and resumed: the bits of one node."""
    overrides = [argument for argument in tiny if not argument.startswith("runs=")]
    for steps in (3, 6):
        started = [
            Running(
                [*overrides, f"runs={tmp_path}/node{index}", "name=a", "nodes=2", "devices=2"],
                *("schedule=constant", f"steps={steps}", "resume.allow=steps"),
                PET_NODE_RANK=str(index),
                PET_MASTER_ADDR="127.0.0.1",
                PET_MASTER_PORT=str(port),
            )
            for index in range(2)
        ]
        for running in started:
            code, _, err = running.end()
            assert code == 0, err
    found = summary(started[0].folder)
    assert found["world_sizes"] == [4, 4]
    assert found["state_sha256"] == sha256(tiny, "name=one", "devices=1", "schedule=constant")
    assert (started[1].folder / "events-1.jsonl").exists()
    assert not (started[1].folder / "summary.json").exists()
    assert not (started[1].folder / "checkpoints").exists()
