"""`colossus watch`: what it shows, that it ends with the run, and that its page is for this machine alone."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tests.report.folders import leave, lines, struck
from train import cli, locks
from train.report.record import Run
from train.watch import Server, sparkline, view


def seen(path: Path, held: bool = False) -> str:
    run = Run(path, held=held)
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(view(run, run.state()))
    return console.export_text()


def unfinished(path: Path) -> None:
    """As it is while the run goes on: without its last word."""
    rows = (path / "events.jsonl").read_text().splitlines(keepends=True)
    (path / "events.jsonl").write_text("".join(rows[:-1]))


def finish(path: Path) -> None:
    with (path / "events.jsonl").open("a") as file:
        file.write(json.dumps(lines(10)[-1]) + "\n")


def test_what_is_seen(tmp_path: Path, tiny: list[str]) -> None:
    path = leave(tmp_path / "a", struck(), tiny)
    text = seen(path)
    assert "a  done" in text
    assert "10 of 10" in text
    assert "lost in reduce, process 1: killed by SIGKILL" in text
    assert "ETA" not in text
    unfinished(path)
    text = seen(path, held=True)
    assert "a  running" in text
    assert "ETA" in text
    assert [line.split()[:4] for line in text.splitlines() if "takes part" in line] == [
        *(["0", "0", "takes", "part"], ["1", "3", "takes", "part"], ["2", "2", "takes", "part"]),
    ]
    assert "a  broken" in seen(path)
    (path / "events.jsonl").unlink()
    assert "a  not begun" in seen(path) or "a  broken" in seen(path)


def test_no_event_can_write_to_the_terminal_or_style_it(tmp_path: Path, tiny: list[str]) -> None:
    found = struck()
    next(r for r in found if r["kind"] == "fault")["cause"] = "\x1b[2J\x07[red]boo"
    text = seen(leave(tmp_path / "a", found, tiny))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "·[2J·[red]boo" in text


def test_a_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, None, 8.0]) == "▁█"
    line = sparkline([float(n) for n in range(100_000)])
    assert len(line) == 60
    assert (line[0], line[-1]) == ("▁", "█")


def test_looking_again_reads_what_is_new(tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave(tmp_path / "a", lines(300), tiny)
    unfinished(path)
    run, load = Run(path, held=True), json.loads
    parsed: list[bytes] = []

    def loads(raw: bytes) -> Any:
        parsed.append(raw)
        return load(raw)

    monkeypatch.setattr(json, "loads", loads)
    assert not run.refresh()
    assert parsed == []
    with (path / "events.jsonl").open("a") as file:
        file.write('{"time":1,"ki')
        file.flush()
        assert not run.refresh()
        file.write('nd":"ready","rank":7}\n')
    assert run.refresh()
    assert len(parsed) == 1
    finish(path)
    assert run.refresh()
    assert run.state() == "done"
    assert len(parsed) == 2


def between_looks(monkeypatch: pytest.MonkeyPatch, act: Callable[[float], object]) -> None:
    """Have something done where `watch` would sleep; what else sleeps in this process goes on sleeping."""
    clock = {name: getattr(time, name) for name in ("time", "monotonic")}
    monkeypatch.setattr("train.watch.time", SimpleNamespace(**clock, sleep=act))


def test_it_ends_with_the_run(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = leave(tmp_path / "a", lines(20), tiny)
    unfinished(path)
    lock = locks.take(path / ".lock")
    assert lock is not None
    slept: list[float] = []

    def ends_in_the_third(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            finish(path)

    between_looks(monkeypatch, ends_in_the_third)
    assert cli.main(["watch", f"run={path}", "every=0.1"]) == 0
    assert slept == [0.1] * 3
    os.close(lock)
    assert "a  done" in capsys.readouterr().out
    unfinished(path)  # and nobody holds it: it has broken off
    assert cli.main(["watch", f"run={path}", "every=0.1"]) == 0
    assert "a  broken" in capsys.readouterr().out
    assert cli.main(["watch", "run=nope"]) == 2
    assert cli.main(["watch", f"run={path}", "port=99999"]) == 2


@pytest.mark.parametrize("web", ["true", "false"])
def test_ctrl_c_is_quiet(
    web: str, tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = leave(tmp_path / "a", lines(20), tiny)
    unfinished(path)
    lock = locks.take(path / ".lock")
    assert lock is not None
    between_looks(monkeypatch, lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert cli.main(["watch", f"run={path}", f"web={web}"]) == 0
    os.close(lock)
    assert capsys.readouterr().err == ""


@pytest.fixture
def server(tmp_path: Path, tiny: list[str]) -> Iterator[Server]:
    path = leave(tmp_path / "a", lines(20), tiny)
    unfinished(path)
    with Server(Run(path, held=True), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def asked(
    server: Server, method: str = "GET", path: str = "/", host: str = ""
) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


def test_the_page_is_made_anew_until_the_run_ends(server: Server) -> None:
    status, headers, text = asked(server)
    assert status == 200
    assert '<meta http-equiv="refresh"' in text
    assert ">running<" in text
    assert headers["Cache-Control"] == "no-store"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert headers["X-Content-Type-Options"] == "nosniff"
    finish(server.run.path)
    _, _, text = asked(server, host=f"localhost:{server.server_port}")
    assert ">done<" in text
    assert 'http-equiv="refresh"' not in text


def test_it_answers_this_machine_and_nothing_else(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    status, headers, text = asked(server, "HEAD")
    assert (status, text) == (200, "")
    assert int(headers["Content-Length"]) > 1000
    port = server.server_port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port}.evil.example"):
        status, _, text = asked(server, host=host)
        assert status == 403
        assert "running" not in text
    for path in ("/events.jsonl", "/../config.yaml", "/?x", "http://evil.example/"):
        assert asked(server, path=path)[0] == 404
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert asked(server, method)[0] == 501
