"""The report and the live page in a real browser: nothing on its console, nothing asked for, data in every plot."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import Running
from train import cli

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

# Chromium asks its maker for this and that by itself; no name but loopback's is found here.
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=2000"
MAP = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


@pytest.fixture(scope="module")
def chromium() -> str:
    """Its path. Installs it where it is missing and can be had."""
    if shutil.which("chromium") is None:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            pytest.skip("skipped, because there is no chromium, and installing it needs root and apt-get")
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "chromium"]):
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip("skipped, because chromium cannot be installed here")
    return str(shutil.which("chromium"))


def visit(chromium: str, tmp_path: Path, url: str) -> tuple[str, list[str], list[str]]:
    """The page as the browser has understood it, what its console said, and what the page itself asked for."""
    net, profile = tmp_path / "net.json", tmp_path / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    command = [chromium, *FLAGS.split(), MAP, f"--user-data-dir={profile}", f"--log-net-log={net}", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    requests = []
    for event in json.loads(net.read_text())["events"]:
        about = event.get("params", {})
        if "url" in about and about.get("initiator", "not an origin") != "not an origin":  # the browser's own have none
            requests.append(about["url"])
    return done.stdout, said, requests


def plotted(text: str) -> int:
    """How many plots there are; each has data."""
    plots = re.findall(r'<svg viewBox="0 0 1000.*?</svg>', text, re.S) + re.findall(r'<svg class="bar".*?</svg>', text)
    for plot in plots:
        curve = re.search(r'class="(dots )?line[^"]*" d="M[-\d.]+ [-\d.]+([LMh][-\d. ]+)+"', plot)
        bars = [float(width) for width in re.findall(r'<rect class="[^"]*"[^>]* width="([\d.]+)"', plot)]
        assert curve or max(bars, default=0.0) > 0, plot[:300]
    return len(plots)


def test_the_check_sees_what_it_is_for(chromium: str, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://elsewhere.example/x"><script>console.error("oops")</script>')
    _, said, requests = visit(chromium, tmp_path, page.as_uri())
    assert any("oops" in line for line in said)
    assert requests == ["http://elsewhere.example/x"]
    with pytest.raises(AssertionError):
        plotted('<svg viewBox="0 0 1000 250"><path class="line c0" d=""/></svg>')


def test_reports(chromium: str, tmp_path: Path, tiny: list[str]) -> None:
    """Of a finished run, a faulty one, both beside each other, a MoE, and one that broke off."""
    runs = tmp_path / "runs"
    assert cli.main(["train", *tiny, "name=whole", "devices=1", "steps=12"]) == 0
    assert cli.main(["train", *tiny, "name=faulty", "devices=2", "steps=12", "faults.at=[kill:1@reduce:5]"]) == 0
    moe = [part for part in tiny if not re.match(r"model(\.(layers|width|heads|kv_heads|ffn))?=", part)]
    assert cli.main(["train", "model=grok_micro", *moe, "name=moe", "devices=1"]) == 0
    shutil.copytree(runs / "whole", runs / "broken")
    (runs / "broken/summary.json").unlink()
    path = runs / "broken/events.jsonl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b'\n{"half')
    seen = {}
    for name, which in {**{n: f"{runs}/{n}" for n in ("whole", "faulty", "moe", "broken")}}.items():
        assert cli.main(["report", f"run={which}"]) == 0
        seen[name] = runs / name / "report.html"
    assert cli.main(["report", f"run=[{runs}/whole,{runs}/faulty]", f"out={tmp_path}/both.html"]) == 0
    seen["both"] = tmp_path / "both.html"
    texts = {}
    for name, file in seen.items():
        texts[name], said, requests = visit(chromium, tmp_path, file.as_uri())
        assert (said, requests) == ([], []), name
        assert plotted(texts[name]) >= (10 if name != "broken" else 5), name
    assert "kill:1@reduce:5" in texts["faulty"]
    assert "Experts" in texts["moe"]
    assert "without a last word" in texts["broken"]
    assert "All 2 runs ended in the same bits" in texts["both"]


def test_the_live_page(chromium: str, tmp_path: Path, tiny: list[str]) -> None:
    running = Running(tiny, "name=a", "devices=2", "steps=100000", "eval.every=0", "checkpoint.every=0")
    watcher = None
    try:
        running.wait_for(lambda found: sum(record["kind"] == "step" for record in found) > 20)
        command = [sys.executable, "-c", "import sys; from train.cli import main; sys.exit(main(sys.argv[1:]))"]
        watcher = subprocess.Popen(
            [*command, "watch", f"run={running.folder}", "web=true"], stdout=subprocess.PIPE, text=True
        )
        assert watcher.stdout is not None
        url = watcher.stdout.readline().split()[0]
        text, said, requests = visit(chromium, tmp_path, url)
        assert said == []
        assert all(request.startswith(url) for request in requests)
        assert 'http-equiv="refresh"' in text
        assert ">running<" in text
        assert plotted(text) >= 8
    finally:
        running.process.terminate()
        code, _, err = running.end()
        if watcher is not None:
            try:
                assert watcher.wait(timeout=60) == 0  # it ends with the run
            finally:
                watcher.kill()
    assert code == 75, err
