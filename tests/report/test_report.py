"""`colossus report`: what it shows of whole, faulty, broken, long and several runs, and that it is one safe file."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.report.folders import BEGUN, SPIKED, launched, leave, lines, started, struck
from train import cli, compose, events, folder
from train.checks import Refused
from train.report.chart import Series, chart, envelope, ticks
from train.report.page import page
from train.report.record import Run
from train.report.settings import defaults
from train.report.timeline import lanes

VOID = {"br", "meta", "link", "path", "rect"}


class Checked(HTMLParser):
    """Every tag closed in order; what the page would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.fetched: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID or tag in ("path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def shown(*runs: Path) -> str:
    """The page of these runs: well formed, nothing to fetch, nothing to run."""
    text = page([Run(path, held=False) for path in runs])
    found = Checked(text)
    assert not found.tags & {"script", "iframe", "object", "embed", "img", "form", "base"}
    assert found.fetched == ["data:,"]
    assert "url(" not in text
    assert "default-src 'none'" in text
    return text


def sections(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.13, 0.29, [0.15, 0.2, 0.25]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (1, 200_000, [50_000, 100_000, 150_000, 200_000]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_an_envelope_loses_no_extreme_and_no_gap() -> None:
    y: list[float | None] = [float(n % 7) for n in range(50_000)]
    y[31_234], y[31_235] = 99.0, -99.0
    y[10_000:20_000] = [None] * 10_000
    points = envelope(range(50_000), y, 1000)
    assert len(points) <= 4 * 1001
    assert {(31_234, 99.0), (31_235, -99.0), (0, 0.0)} <= set(points)
    assert None in points
    assert [p for p in points if p] == sorted(p for p in points if p)
    assert envelope([1, 2], [3.0, float("nan")], 1000) == [(1, 3.0), None]


def test_a_chart_of_nothing_is_nothing() -> None:
    assert chart("a", "", [Series(name="a", x=[1], y=[None])]) == ""
    one = chart("a", "", [Series(name="a", x=[1], y=[2.0])])
    assert 'class="dots' in one  # a single point is seen
    Checked(one)


def test_a_whole_run(tmp_path: Path, tiny: list[str]) -> None:
    text = shown(leave(tmp_path / "a", lines(50), tiny))
    assert sections(text) == [
        *("Learning", "Who was there", "Where the time went", "Energy and money", "In its own words"),
        *("This run on Colossus", "Settings", "Environment"),
    ]
    for said in (
        "d0" * 32,
        ">done<",
        "Training loss",
        "gzip -9: 3.500",
        "optimizer.lr",
        "def f():",
        "def after_10():",
        "rank 1",
        "assumed",
        "USD a million tokens",
    ):
        assert said in text, said
    assert text.count('class="line') >= 8
    assert re.search(r"± \d+\.?\d* %", text), "the projection's error stands beside it"
    assert "waiting for the sum</dt><dd>15.0 %" in text
    assert "least: 5.000 % of the time" in text
    assert "most: 25.000 % of the time" in text or "most: 25.00 % of the time" in text


def test_of_many_samples_some_are_shown_evenly_apart(tmp_path: Path, tiny: list[str]) -> None:
    found = [record for record in lines(5) if record["kind"] != "eval"]
    for step in range(10, 1000, 10):
        score: dict[str, Any] = {"step": step, "loss": 2.0, "bpb": 1.0, "tokens": 5, "whole": False, "seconds": 0.1}
        found.insert(-1, events.Evaluated(**score, time=BEGUN + 5.3, sample=f"wrote_{step}").record())
    found[-1] |= {"step": 1000, "sample": "wrote_1000"}
    written = re.findall(r"after step ([\d,]+)</figcaption><pre>(\w+)", shown(leave(tmp_path / "a", found, tiny)))
    assert written == [(f"{n:,}", f"wrote_{n}") for n in (10, 200, 400, 600, 800, 1000)]


def test_experts_have_a_section(tmp_path: Path, tiny: list[str]) -> None:
    text = shown(leave(tmp_path / "a", lines(50, experts=True), tiny))
    assert "Experts" in sections(text)
    assert ">2.50<" in text  # five of eight choices among four experts
    assert "Auxiliary losses" in text


def test_a_loss_is_a_gap_in_its_lane_that_the_next_process_fills(tmp_path: Path, tiny: list[str]) -> None:
    found = lanes(struck())
    assert found.count == 3
    assert [(s.member, s.lane, s.waiting) for s in found.spans] == [
        *((0, 0, False), (1, 1, False), (2, 2, False)),
        *((3, 1, True), (3, 1, False)),
    ]
    lost = next(s for s in found.spans if s.member == 1)
    assert lost.end == pytest.approx(BEGUN + 5.46)
    assert [(kind, lane) for kind, lane, _, _ in found.marks if kind in ("injected", "fault")] == [
        *(("injected", 1), ("fault", 1)),
    ]
    text = shown(leave(tmp_path / "a", struck(), tiny))
    assert "lost in reduce, process 1: killed by SIGKILL" in text
    assert "3, 2" in text  # its world sizes
    assert "What befell it" in sections(text)
    assert "where each process was" not in text


def test_a_hang_is_listed_with_who_waited_for_whom(tmp_path: Path, tiny: list[str]) -> None:
    flight = {"0": "reduce: step 4, waits for the exchange of elements 0 to 64", "1": "backward: step 4, alone"}
    words: Any = {"fault": "hang", "phase": "backward", "rank": 1, "step": None, "cause": "no sign of life"}
    hung = events.Fault(time=BEGUN + 5.45, flight=flight, **words).record()
    text = shown(leave(tmp_path / "a", [*lines(10), hung], tiny))
    assert "process 0: reduce: step 4, waits for the exchange of elements 0 to 64<br>process 1: backward" in text
    many = shown(leave(tmp_path / "b", [*lines(10), *[hung] * 250], tiny))
    assert "… and 50 more" in many


def test_a_pause_is_cut_out() -> None:
    found = lanes([*lines(50), launched(BEGUN + 90_000, 2), started(BEGUN + 90_002, 2, 50, 60)])
    (cut,) = found.cuts
    assert cut[1] - cut[0] == pytest.approx(90_000 - 1 - 11)
    assert found.squeeze(BEGUN + 90_002) - found.squeeze(BEGUN) == pytest.approx(14)


def test_a_broken_run_shows_what_there_is(tmp_path: Path, tiny: list[str]) -> None:
    path = leave(tmp_path / "a", lines(50), tiny)
    whole = (path / "events.jsonl").read_bytes()
    rows = whole.splitlines(keepends=True)
    odd = [
        b"{}\n",
        b"[1]\n",
        b"\xff\xfe\n",
        b'{"time":1,"kind":"step"}\n',
        b'{"time":"x","kind":"end"}\n',
        b"[" * 9999 + b"\n",
    ]
    (path / "events.jsonl").write_bytes(b"".join([*rows[:40], *odd, *rows[40:60]]) + rows[60][:20])
    text = shown(path)
    assert ">broken<" in text
    assert "without a last word" in text
    assert f"{len(odd)} lines of events.jsonl cannot be read" in text
    assert "Training loss" in text
    assert "state_sha256" not in text

    (path / "data.json").write_text("{}")
    assert "does not say how many token ids" in shown(path)

    (path / "config.yaml").write_text("a: [")
    (path / "data.json").unlink()
    text = shown(path)
    assert "config.yaml is missing" in text
    assert "Settings" not in sections(text)

    (path / "events.jsonl").unlink()
    assert "No step was recorded" in shown(path)


def test_what_a_restart_went_back_behind_is_not_drawn(tmp_path: Path, tiny: list[str]) -> None:
    """Steps 1 to 20, again from 10 on, to 15; one loss was no number."""
    first, again = lines(20)[:-1], [r for r in lines(20) if 10 < r.get("step", 0) <= 15]
    for record in again:
        record |= {"loss": 7.0 if record["step"] != 12 else None} if record["kind"] == "step" else {}
    run = Run(leave(tmp_path / "a", [*first, started(BEGUN + 9, 2, 10, 20), *again], tiny), held=True)
    assert list(run.steps) == list(range(1, 16))
    assert [run.steps[n]["loss"] for n in (11, 12, 13)] == [7.0, None, 7.0]
    (path,) = re.findall(r'<b>Training loss.*?class="line c0" d="(.*?)"', page([run]))
    assert path.count("M") == 2  # the gap


def test_values_of_the_wrong_type_cost_their_section_only(tmp_path: Path, tiny: list[str]) -> None:
    path = leave(tmp_path / "a", lines(20), tiny)
    text = (path / "events.jsonl").read_text().replace('"state_sha256":"d0', '"sample2":1,"state_sha256":"d0')
    (path / "events.jsonl").write_text(text.replace('"mfu":0.2', '"mfu":"<b>"'))
    assert "cannot be made of this record" in shown(path)


def test_what_a_run_says_is_never_markup(tmp_path: Path, tiny: list[str]) -> None:
    evil = "</title></style><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\"'&"
    found = lines(20, digest=evil)
    found.insert(5, events.Warned(time=BEGUN + 6, rank=0, text=evil).record())
    found.insert(
        5,
        events.Fault(
            time=BEGUN + 6, fault=evil, phase=evil, rank=1, step=None, cause=evil, flight={evil: evil}
        ).record(),
    )
    found.insert(5, events.Asked(time=BEGUN + 6, rank=0, by=evil).record())
    found[1] |= {"device": evil, "fingerprint": {evil: evil}, "peak_source": evil}
    found[-1]["sample"] = evil
    path = leave(tmp_path / "a&b", found, tiny)
    (path / "config.yaml").write_text((path / "config.yaml").read_text().replace("sample: ''", f"sample: {evil!r}"))
    text = shown(path)
    assert "&lt;script&gt;" in text
    other = leave(tmp_path / "c", lines(20), tiny)
    assert "&lt;script&gt;" in shown(other, path)


def test_several_runs_stand_beside_each_other(tmp_path: Path, tiny: list[str]) -> None:
    one = leave(tmp_path / "w1", lines(50, world=1), [*tiny, "devices=1"])
    two = leave(tmp_path / "w2", lines(50, world=2), [*tiny, "devices=2"])
    text = shown(one, two)
    assert "All 2 runs ended in the same bits" in text
    assert "w2 (same bits)" in text
    assert re.search(r"<code>devices</code></td><td>1</td><td><mark>2</mark>", text)
    third = leave(tmp_path / "w3", lines(50, digest="e1" * 32), [*tiny, "devices=1", "optimizer.lr=0.5"])
    text = shown(one, two, third)
    assert "All 3" not in text
    assert "same bits as w1" in text
    assert "<td>0.01</td><td>0.01</td><td><mark>0.5</mark></td>" in text


def test_defaults_are_those_of_the_command() -> None:
    with compose.hydra():
        told = compose.values("train")
    ours = defaults()
    assert len(ours) > 60
    for key, value in ours.items():
        assert str(getattr(told[key], "name", told[key])) == str("???" if value == "???" else value) or key == "name", (
            key
        )


def test_100_000_steps_are_a_small_file_that_shows_the_spike(tmp_path: Path, tiny: list[str]) -> None:
    text = shown(leave(tmp_path / "a", lines(100_000), tiny))
    assert len(text.encode()) < 6e6
    loss = re.search(r"<b>Training loss</b>.*?</figure>", text, re.S)
    assert loss is not None
    assert f"… {SPIKED:.3f} nats" in loss[0]  # where the pointer rests
    (faint,) = re.findall(r'<path class="line c0 faint" d="(.*?)"', loss[0])
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", faint)]
    assert min(heights) == pytest.approx(250 * 0.06 / 1.12, rel=0.01)  # the top but for its margin
    assert len(heights) > 2000
    assert all(len(path) < 100_000 for path in re.findall(r' d="(.*?)"', text))


def test_the_command_writes_and_refuses(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, other = (leave(tmp_path / "runs" / name, lines(20), tiny) for name in "ab")
    assert cli.main(["report", "run=a"]) == 0
    assert ">done<" in (path / "report.html").read_text()
    assert cli.main(["report", f"run=[{path},b]"]) == 0
    assert "same bits" in (tmp_path / "runs/report-a-b.html").read_text()
    assert cli.main(["report", "run=b", f"out={tmp_path}/my report.html"]) == 0
    assert (tmp_path / "my report.html").exists()
    assert not (other / "report.html").exists()
    for bad in (["run=nope"], ["run=[a,nope]"], ["run=[]"], [], ["run=a", "out=/nowhere/x.html"], ["run=a", "out=."]):
        capsys.readouterr()
        assert cli.main(["report", *bad]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.glob(".*")), "no draft is left where a file cannot be written"


@pytest.mark.parametrize("text", ["[]", "null", "[" * 100_000, '{"stopped": 5}', '{"stopped": false, "steps": "x"}'])
def test_a_broken_summary_costs_its_run_only(
    text: str, tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        leave(tmp_path / "runs" / name, lines(5), tiny)
    (tmp_path / "runs/a/summary.json").write_text(text)
    assert _states(tmp_path, capsys) == {"a": "broken", "b": "unfinished"}
    config = folder.read_train(tmp_path / "runs/a/config.yaml")
    with folder.RunFolder(tmp_path / "runs/a") as run, pytest.raises(Refused, match=r"a/summary\.json"):
        run.finished(config)


@pytest.mark.parametrize("line", ["garbage", "[1]", "5", '{"kind": "step"}', "\udcff"])
def test_broken_events_cost_their_run_only(
    line: str, tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        leave(tmp_path / "runs" / name, lines(5), tiny)
    with (tmp_path / "runs/a/events.jsonl").open("a", errors="surrogateescape") as file:
        file.write(line + "\n")
    assert _states(tmp_path, capsys) == {"a": "broken", "b": "unfinished"}


def _states(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert cli.main(["runs", f"runs={path}/runs"]) == 0
    assert cli.main(["runs", f"runs={path}/runs", "format=json"]) == 0
    return {run["name"]: run["state"] for run in json.loads(capsys.readouterr().out.splitlines()[-1])}


def test_files_of_a_run_that_are_none_are_named(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = leave(tmp_path / "runs" / "a", lines(5), tiny)
    (run / "checkpoints").mkdir()
    (run / "checkpoints/step-00000003").touch()
    (run / ".lock").mkdir()
    assert cli.main(["verify", f"run={run}"]) == 1
    assert "step-00000003" in capsys.readouterr().err
    assert cli.main(["resize", f"run={run}", "devices=2"]) == 2
    assert ".lock: cannot be locked" in capsys.readouterr().err
    (run / "config.yaml").write_bytes(b"\xff\x00")
    assert cli.main(["resize", f"run={run}", "devices=2"]) == 2
    assert "config.yaml" in capsys.readouterr().err
    for bad in ("~nope/x", "a" * 300):
        assert cli.main(["verify", f"run={bad}"]) == 2
        assert capsys.readouterr().err.startswith("colossus: run: ")


def test_every_run_leaves_its_report_and_none_fails_of_it(
    tmp_path: Path, tiny: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *tiny, "name=quiet", "devices=1", "steps=2"]) == 0
    assert not (tmp_path / "runs/quiet/report.html").exists()
    (tmp_path / "runs/b/report.html/in the way").mkdir(parents=True)
    capfd.readouterr()
    assert cli.main(["train", *tiny, "name=b", "devices=1", "steps=2", "report=true"]) == 0
    assert "warning: no report was written" in capfd.readouterr().out


def test_loggers_get_the_names_that_people_expect(tmp_path: Path, tiny: list[str]) -> None:
    more = ["name=a", "devices=1", "report=true", "logger=[csv,tensorboard]"]
    assert cli.main(["train", *tiny, *more]) == 0
    assert ">done<" in (tmp_path / "runs/a/report.html").read_text()
    names = {"train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_second", "perf/mfu", "val/loss", "val/bpb"}
    (table,) = (tmp_path / "runs/a/csv").rglob("metrics.csv")
    assert names <= set(table.read_text().splitlines()[0].split(","))
    found = EventAccumulator(str(tmp_path / "runs/a/tensorboard"))
    found.Reload()
    assert names <= set(found.Tags()["scalars"])
