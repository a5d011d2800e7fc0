"""`colossus watch`: a run while it goes on, in a terminal, or as its report in a browser on this machine.

Events are read on from where the last look ended. The page is made when somebody asks for it, and so seldom that it
takes a tenth of a core at most, however long the run is: the ranks want the others.
"""

from __future__ import annotations

import statistics
import threading
import time
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from train.checks import DONE, Refused
from train.commands import Watch
from train.folder import locate
from train.report.page import POLICY, page
from train.report.record import SILENCE, Run
from train.report.timeline import lanes
from train.report.words import lasting, number, percent, plain, si

REFRESH = 5  # seconds after which a browser asks again, or more where a page takes long to make
SHARE = 0.1  # of a core's time that making pages may take
FAREWELL = 3  # refreshes for which the page of a run that has ended is still there
LATEST = 8  # events that are shown
BARS = "▁▂▃▄▅▆▇█"


def watch(config: Watch) -> int:
    """Until the run ends, or Ctrl-C. Exit code 0."""
    run = Run(locate(config.run))
    try:
        return _serve(run, config.port) if config.web else _show(run, config.every)
    except KeyboardInterrupt:
        return DONE


def _show(run: Run, every: float) -> int:
    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        while True:
            run.refresh()
            state = run.state(SILENCE)
            live.update(view(run, state), refresh=True)
            if state != "running":
                return DONE
            time.sleep(every)


def view(run: Run, state: str) -> Group:
    """The run as a terminal shows it."""
    steps, pace, score = list(run.steps.values()), run.last("throughput"), run.last("eval")
    done, wanted = (steps[-1]["step"] if steps else 0), run.wanted
    figures = {"step": f"{done:,} of {wanted:,}", "loss": number(steps[-1]["loss"] if steps else None)}
    if score:
        unit = "bits/byte" if score["bpb"] else "nats/token"
        figures["validation"] = f"{number(score['bpb'] or score['loss'])} {unit}"
    if pace:
        figures |= {"tokens/s": si(pace["tokens_per_s"]), "MFU": percent(pace["mfu"])}
    if state == "running" and steps:
        usual = statistics.median(step["seconds"] for step in steps[-50:])
        figures["ETA"] = lasting((wanted - done) * usual)
    numbers = Table(*figures, box=None, padding=(0, 3, 0, 0), header_style="dim")
    numbers.add_row(*figures.values())
    ranks = Table("rank", "process", "", "for", box=None, padding=(0, 3, 0, 0), header_style="dim")
    found = lanes(run.records)
    now = time.time() if state == "running" else run.records[-1]["time"] if run.records else 0.0
    for lane in range(found.count):
        span = next(span for span in reversed(found.spans) if span.lane == lane)
        what = "gone" if span.end is not None else "waits to join" if span.waiting else "takes part"
        since = span.begin if span.end is None else span.end
        ranks.add_row(str(lane), str(span.member), what, lasting(max(0.0, now - since)))
    latest = Text()
    for _, _, when, text in [mark for mark in found.marks if mark[0] != "eval"][-LATEST:]:
        latest.append(f"{datetime.fromtimestamp(when):%H:%M:%S}  ", "dim")
        latest.append(plain(" ".join(text.split()))[:150] + "\n")
    head = Text.assemble((run.name, "bold"), "  ", (state, "red" if state == "broken" else "cyan"))
    bar = Table.grid()
    bar.add_row(ProgressBar(total=max(1, wanted), completed=done, width=60))
    spark = Text(sparkline([step["loss"] for step in steps]), "cyan")
    return Group(head, bar, numbers, spark, ranks, latest)


def sparkline(values: list[float | None], width: int = 60) -> str:
    """The means of equal parts, lowest to highest."""
    size = max(1, -(-len(values) // width))
    parts = [[v for v in values[i : i + size] if v is not None] for i in range(0, len(values), size)]
    means = [statistics.fmean(part) for part in parts if part]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(BARS[round((mean - low) / ((high - low) or 1.0) * (len(BARS) - 1))] for mean in means)


class Server(ThreadingHTTPServer):
    """One page on this machine's loopback, for who asks for it by that name: GET and HEAD of `/`."""

    daemon_threads = True

    def __init__(self, run: Run, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.run, self.refresh = run, REFRESH
        self._lock, self._made, self._page, self._state = threading.Lock(), float("-inf"), "", ""

    def look(self) -> str:
        """The run's state now."""
        with self._lock:
            self.run.refresh()
            return self.run.state(SILENCE)

    def page(self) -> bytes:
        state = self.look()
        with self._lock:
            begun = time.monotonic()
            if state != self._state or begun - self._made >= self.refresh:
                self._page, self._state = page([self.run], self.refresh if state == "running" else 0), state
                self._made = time.monotonic()
                self.refresh = max(REFRESH, round((self._made - begun) / SHARE))
            return self._page.encode()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "colossus", ""
    timeout = 10.0

    def do_GET(self) -> None:
        """Another name in `Host` is a page elsewhere that had its name point here."""
        port, status, body = self.server.server_port, 200, b""
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            status, body = 403, b"this is 127.0.0.1 alone\n"
        elif self.path != "/":
            status, body = 404, b"there is only /\n"
        else:
            body = self.server.page()
        self.send_response(status)
        self.send_header("Content-Type", f"text/{'html' if status == 200 else 'plain'}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", f"{POLICY}; frame-ancestors 'none'")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a terminal is no access log."""


def _serve(run: Run, port: int) -> int:
    try:
        server = Server(run, port)
    except OSError as error:
        raise Refused("port", f"{port} cannot be listened at ({error.strerror}): use another, or 0 for any") from error
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"http://127.0.0.1:{server.server_port}/  (until the run ends, or Ctrl-C)", flush=True)
        try:
            while server.look() == "running":
                time.sleep(1.0)
            time.sleep(FAREWELL * REFRESH)
        finally:
            server.shutdown()
    return DONE
