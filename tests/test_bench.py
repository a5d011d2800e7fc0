"""`colossus bench`: what it refuses, what it takes for the same work, what it leaves behind; and its picture."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from tqdm import tqdm

from tests.bench import bars, contestants, peer_nanogpt, peers
from tests.bench.contestants import CONTESTANTS, SETTINGS, chosen
from tests.bench.work import Job, Turns, by_decay, renamed
from train import bench, cli
from train.checks import Refused
from train.commands import Bench
from train.console import Console

LITGPT = importlib.util.find_spec("litgpt") is not None
NEEDS_LITGPT = pytest.mark.skipif(not LITGPT, reason=contestants.LITGPT_WHEELS)
TITAN = importlib.util.find_spec("torchtitan") is not None
NEEDS_TITAN = pytest.mark.skipif(not TITAN, reason=contestants.TITAN_WHEELS)
PEERS = [*["litgpt-eager"] * LITGPT, *["torchtitan-eager"] * TITAN]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Of a benchmark from a folder that is not the checkout, as a user calls it: that folder, and what was said."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["rounds=1", "turn=3", "small=true", "steps=7", "settings=llama-fp32-1x1", "out=figures.json"]
    arguments += [f"contestants=[{','.join(['ours', *PEERS, 'ceiling'])}]"]
    command = [str(Path(sys.executable).with_name("colossus")), "bench", *arguments]
    return folder, subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)


Small = tuple[Path, subprocess.CompletedProcess[str]]


def test_help_says_what_each_key_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    named = ("contestants", "settings", "rounds", "turn", "micro_batch", "steps", "small", "nanogpt", "out")
    assert all(f"  {key}=" in text for key in named)
    keys = text.partition("Keys ")[2].splitlines()[1:]
    assert all(len(line.split(maxsplit=1)) == 2 for line in keys), "a key without a meaning"


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("contestants=[ours,lightnin]", "contestants: none is called 'lightnin': did you mean lightning?"),
        ("contestants=zzz", "there are ours, ours-compiled, "),
        ("settings=bf61", "settings: 'bf61' is none: did you mean bf16?"),
        ("settings=gpt2-llama", "settings: there is none with all of 'gpt2-llama'"),
        ("round=3", "round: no such key: did you mean rounds?"),
        ("rounds=0", "rounds: 0 is too small: use 1 or more"),
        ("rounds=many", "rounds: "),
        ("steps=-1", "steps: -1 is too small: use 0 or more"),
        ("micro_batch=3", "micro_batch: is 3: use 1, 2, 4 or 8"),
        ("nanogpt=/not here", "nanogpt: '/not here' holds no train.py"),
        ("out=figures.csv", "out: 'figures.csv' is no .json"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", argument]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_who_has_no_place_in_the_settings_is_refused() -> None:
    with pytest.raises(Refused, match="litgpt takes part in none of these settings, but in llama-bf16-1x1"):
        chosen(Bench(contestants=["litgpt"], settings="gpt2"))
    assert chosen(Bench(contestants=["litgpt", "bare"]))[0] == ["ours", "bare", "litgpt"]


@pytest.mark.parametrize(("sequences", "passes"), [(2, 4), (8, 1)])
def test_a_forward_pass_is_as_large_for_all(sequences: int, passes: int, tmp_path: Path) -> None:
    asked = Bench(micro_batch=sequences, rounds=1, small=True)
    for name in ("ours", "hf"):
        job, tokens = peers.job_of(name, contestants.Setting("gpt2", "bf16", 2, 1), asked, tmp_path)
        assert (job.piece, job.pieces, tokens) == (sequences, passes, 16 * 32)
        assert job.config.batch.virtual_ranks == 16 // sequences
    inputs = [x.shape for x, _ in next(peer_nanogpt.batches(job))]  # of the loops that are written here
    assert inputs == [(sequences, 32)] * passes


def test_without_a_checkout_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert cli.main(["bench", "contestants=zzz"]) == 2
    error = capsys.readouterr().err
    assert "make setup" in error
    assert error.count("\n") == 1


def test_a_mistake_is_found_before_torch_is_imported() -> None:
    code = "import sys, train.bench, tests.bench.contestants; print('torch' in sys.modules)"
    root = Path(bench.__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_settings_are_chosen_by_their_words() -> None:
    def names(asked: Any) -> list[str]:
        return [setting.name for setting in chosen(Bench(settings=asked))[1]]

    assert names("") == [setting.name for setting in SETTINGS]
    assert len(names("bf16")) == 6
    assert names("llama-1x2") == ["llama-bf16-1x2", "llama-fp32-1x2"]
    assert names(["gpt2-bf16-2x1", "fp32-llama-1x1"]) == ["gpt2-bf16-2x1", "llama-fp32-1x1"]


def test_two_ranks_are_measured_beside_one_process_of_two_threads(tmp_path: Path) -> None:
    setting = next(s for s in SETTINGS if s.name == "gpt2-bf16-2x1")
    config = Bench(rounds=1, small=True)
    ranks, tokens = peers.job_of("ours", setting, config, tmp_path)
    threads, as_many = peers.job_of("ours-threads", setting, config, tmp_path)
    assert (ranks.world, ranks.threads) == (2, 1)
    assert (threads.world, threads.threads) == (1, 2)
    assert tokens == as_many
    assert [s.ranks for s in SETTINGS if CONTESTANTS["ours-threads"].takes_part(s)] == [2] * 4
    for name in ("bare-threads", "nanogpt-threads", "bare-threads-compiled", "nanogpt-threads-compiled"):
        theirs, _ = peers.job_of(name, setting, config, tmp_path)
        assert (theirs.world, theirs.threads, theirs.compiled) == (1, 2, "compiled" in name)
        assert [str(s) for s in SETTINGS if CONTESTANTS[name].takes_part(s)] == [
            f"gpt2, {precision}, 2 ranks x 1 thread" for precision in ("bf16", "fp32")
        ]


def test_decay_is_on_matrices_alone() -> None:
    groups = by_decay(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).parameters(), 0.1)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.1), (3, 0.0)]


def figures(rates: dict[str, list[float]], losses: dict[str, float], parameters: dict[str, int]) -> dict[str, Any]:
    """Of rounds at these tokens/s, 4,096 tokens a step."""
    rounds = [{name: 4096 / of[i] for name, of in rates.items()} for i in range(len(rates["ours"]))]
    told = {name: [loss] for name, loss in losses.items()}
    result = peers.table(SETTINGS[1], 4096, rounds, told, parameters, {"hf": "needs accelerate"}, {})
    return {"cpu": "a CPU", "results": [result | {"command": "colossus bench", "date": "2026-11-29"}]}


RATES = {"ours": [100.0, 120.0, 110.0], "lightning": [50.0, 60.0, 55.0], "bare": [80.0, 80.0, 80.0]}


def test_other_work_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    same, counted = {"ours": 8.0, "lightning": 8.0004, "bare": 8.0}, {"ours": 7, "lightning": 7, "bare": 7}

    def verdicts(losses: dict[str, float], parameters: dict[str, int]) -> list[bool]:
        result = figures(RATES, losses, parameters)["results"][0]
        peers.show(SETTINGS[1], result)
        return [row["same_work"] for row in result["rows"]]

    assert verdicts(same, counted) == [True, True, True]
    assert "NOT THE SAME WORK" not in capsys.readouterr().out
    assert verdicts(same | {"lightning": 8.01}, counted) == [True, False, True]
    assert "NOT THE SAME WORK" in capsys.readouterr().out
    assert verdicts(same, counted | {"bare": 8}) == [True, True, False]


def test_the_picture_has_a_bar_a_whisker_and_a_number_for_each() -> None:
    told = figures(RATES, {"ours": 8.0, "lightning": 9.0, "bare": 8.0}, dict.fromkeys(RATES, 7))
    drawing = ElementTree.fromstring(bars.draw(told))
    boxes = {box.get("class"): float(box.get("width") or 0) for box in drawing.iter(f"{SVG}rect")}
    assert boxes["ours"] / boxes["bar"] == pytest.approx(110 / 80, rel=0.01)
    assert boxes["ours"] / boxes["other"] == pytest.approx(2, rel=0.01)
    whiskers = [path.get("d") or "" for path in drawing.iter(f"{SVG}path") if "H" in (path.get("d") or "")]
    assert len(whiskers) == 2, "the one that did not vary has none"
    left, right = (float(whiskers[0].replace("H", " ").split("M")[1].split()[i]) for i in (0, 2))
    assert (right - left) / boxes["ours"] == pytest.approx(20 / 110, rel=0.02)  # quartiles 100 and 120
    texts = [text.text or "" for text in drawing.iter(f"{SVG}text")]
    assert {"110", "55, other work", "80", "gpt2, fp32", "1 rank x 1 thread"} <= set(texts)
    assert "tokens/s, medians and quartiles of 3 rounds (a CPU, 2026-11-29)" in texts
    longer = told["results"][0] | {"rounds": 5}
    assert "of 3 to 5 rounds" in bars.draw(told | {"results": [*told["results"], longer]})


def test_the_command_as_it_is_said_has_no_paths() -> None:
    config = Bench(contestants=["ours", "bare"], rounds=5, nanogpt="/home/me/nanoGPT", out="/home/me/x.json")
    assert peers.said(config) == "colossus bench contestants=[ours,bare] rounds=5"


def test_what_was_not_measured_anew_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting with the command and the day that its figures are of."""

    def raced(setting: contestants.Setting, names: list[str], config: Bench, *_: object) -> dict[str, Any]:
        rate = {"ours": [float(config.rounds)]}
        return peers.table(setting, 4096, [{"ours": 4096.0}], rate, {"ours": 7}, {}, {})

    monkeypatch.setattr(peers, "race", raced)
    out = str(tmp_path / "figures.json")
    for rounds, settings in ((7, SETTINGS), (5, SETTINGS[1:2]), (3, SETTINGS[1:3])):
        assert peers.main(Bench(rounds=rounds, out=out), ["ours"], settings) == 0
    figures = json.loads(Path(out).read_text())
    assert [one["first_loss"] for one in figures["results"]] == [7, 3, 3, *[7] * (len(SETTINGS) - 3)]
    assert figures["command"] == "colossus bench; colossus bench rounds=3"
    assert {one["command"] for one in figures["results"][1:3]} == {"colossus bench rounds=3"}
    (tmp_path / "mine.json").write_text('{"results": [{"family": 1}]}')
    with pytest.raises(Refused, match="holds no figures of this command"):
        peers.main(Bench(out=str(tmp_path / "mine.json")), ["ours"], SETTINGS)


def test_a_small_run_leaves_figures_and_a_picture(small_run: Small) -> None:
    folder, done = small_run
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "figures.json").read_text())["results"][0]
    assert [row["contestant"] for row in result["rows"]] == ["ours", *PEERS, "ceiling"]
    assert (result["steps"], result["micro_batch"]) == (7, 4)
    assert all(row["tokens_per_s"] > 0 and row["same_work"] for row in result["rows"])
    boxes = ElementTree.fromstring((folder / "figures.svg").read_text()).iter(f"{SVG}rect")
    assert len(list(boxes)) == len(result["rows"])
    setting = "llama, fp32, 1 rank x 1 thread"
    under_way = [f"{setting}: {what} …" for what in ("models are built", "rounds", "to step 7")]
    assert done.stdout.splitlines()[:3] == under_way
    assert f"{setting}: 1 rounds, 7 steps" in done.stdout


def test_who_fails_under_way_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Player:
        def __init__(self, name: str, *_: object) -> None:
            self.name, self.losses = name, list[float]()

        def answer(self) -> list[dict[str, Any]]:
            return [{"parameters": 7}]

        def turn(self, steps: int) -> float:
            if self.name in broken and len(self.losses) >= broken[self.name]:
                raise RuntimeError(f"{self.name}: Traceback\nValueError: no more")
            self.losses += [8.0] * steps
            return 1.0

    broken = {"hf": 2, "lightning": 6}  # in a round, and on the way to the last step
    monkeypatch.setattr(peers, "Player", Player)
    setting, config = SETTINGS[1], Bench(rounds=2, turn=2, steps=7, small=True)
    names = ["ours", "hf", "lightning", "ceiling"]
    result = peers.race(setting, names, config, tmp_path, Console())
    assert [(row["contestant"], row["tokens_per_s"]) for row in result["rows"]] == [("ours", 512), ("ceiling", 512)]
    assert result["failed"] == dict.fromkeys(["hf", "lightning"], "failed: ValueError: no more")
    assert "hf: Traceback" in capsys.readouterr().err
    broken["ours"] = 0
    with pytest.raises(RuntimeError, match="ours"):
        peers.race(setting, names, config, tmp_path, Console())


def test_a_contestant_that_ends_in_mid_loop_leaves_no_semaphore(tmp_path: Path) -> None:
    """A progress bar's lock, or Python would tell the user of it: compilers and trainers have bars."""
    code = f"""
import multiprocessing
from pathlib import Path
from tests.bench.contestants import CONTESTANTS, SETTINGS, Contestant
from tests.bench import peers
from train.commands import Bench
multiprocessing.set_start_method("spawn")  # as those have who are started so
CONTESTANTS["ours"] = Contestant("", "tests.test_bench:watches_a_bar_and_goes")
job, _ = peers.job_of("ours", SETTINGS[0], Bench(small=True), Path({str(tmp_path)!r}))
peers.rank_main("ours", job, None, None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("gone\n", "")


def watches_a_bar_and_goes(job: Job, turns: Turns) -> None:
    list(tqdm(range(1), disable=True))
    with tqdm.get_lock():
        print("gone", flush=True)
    os._exit(0)


@NEEDS_LITGPT
def test_litgpt_has_our_llama_under_other_names(tmp_path: Path) -> None:
    from litgpt import GPT, Config

    from tests.bench.peer_litgpt import NAMES, shape_of
    from train.models.build import build

    setting = next(s for s in SETTINGS if s.name == "llama-fp32-1x1")
    job, _ = peers.job_of("litgpt", setting, Bench(rounds=1, small=True), tmp_path)
    theirs = GPT(Config(**shape_of(job)))
    theirs.load_state_dict({renamed(name, NAMES): weight for name, weight in job.weights().items()})
    ours = build(job.config.model, job.vocab, seed=job.config.seed, device=torch.device("cpu"))
    tokens = torch.randint(0, job.vocab, (2, job.config.model.context))
    torch.testing.assert_close(theirs(tokens), ours(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "peer", [pytest.param("litgpt-eager", marks=NEEDS_LITGPT), pytest.param("torchtitan-eager", marks=NEEDS_TITAN)]
)
def test_a_peer_does_the_same_work(peer: str, small_run: Small) -> None:
    folder, done = small_run
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["contestant"]: row for row in json.loads((folder / "figures.json").read_text())["results"][0]["rows"]}
    assert rows[peer]["parameters"] == rows["ours"]["parameters"]
    assert rows[peer]["loss_apart_early"] < 1e-5


@NEEDS_TITAN
def test_torchtitan_has_our_tied_llama_with_fewer_keys_than_queries(tmp_path: Path) -> None:
    """In a process of its own: it is told that its device is the CPU."""
    code = f"""
import torch
from pathlib import Path
from tests.bench import peers, peer_torchtitan
from tests.bench.contestants import SETTINGS
from train.commands import Bench
from train.models.build import build
peers.SHAPES["llama"] += " model.kv_heads=2 model.tied=true"
setting = next(s for s in SETTINGS if s.name == "llama-fp32-1x1")
job, _ = peers.job_of("torchtitan", setting, Bench(rounds=1, small=True), Path({str(tmp_path)!r}))
theirs = peer_torchtitan.model_of(job).build()
theirs.init_states(buffer_device=torch.device("cpu"))
theirs.load_state_dict(peer_torchtitan.named(job))
ours = build(job.config.model, job.vocab, seed=job.config.seed, device=torch.device("cpu"))
tokens = torch.randint(0, job.vocab, (2, job.config.model.context))
torch.testing.assert_close(theirs(tokens), ours(tokens), rtol=1e-4, atol=1e-4)
print(peer_torchtitan.count(theirs) == peer_torchtitan.count(ours))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr
