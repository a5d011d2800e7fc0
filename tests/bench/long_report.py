"""What the report of a long run costs: seconds and bytes of 100,000 steps with their digests.

    make bench-report

`read` from an empty start, `page` from what was read, `again` what a look at a live run costs when 100 steps are new.
CPU seconds stand beside those of the clock, since the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench import report
from tests.report.folders import leave, lines
from train.report.page import page
from train.report.record import Run


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    begun, used = time.perf_counter(), time.process_time()
    result = work()
    return result, {"s": round(time.perf_counter() - begun, 2), "cpu_s": round(time.process_time() - used, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    steps = parser.parse_args().steps
    settings = ["data=synthetic", "precision=fp32", "accelerator=cpu", "batch.micro_batch=1"]
    found = lines(steps + 100)
    late = [record for record in found if record.get("step", 0) > steps]
    early = [record for record in found if record.get("step", 0) <= steps]
    with tempfile.TemporaryDirectory() as folder:
        path = leave(Path(folder) / "long", early, settings)
        size = (path / "events.jsonl").stat().st_size
        run, read = timed(lambda: Run(path, held=True))
        text, made = timed(lambda: page([run]))
        with (path / "events.jsonl").open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in late)
        _, again = timed(run.refresh)
    figures: dict[str, Any] = {"steps": steps, "events_mb": round(size / 1e6, 1), "read": read, "page": made}
    report.write("long_report", "make bench-report", **figures, again=again, html_mb=round(len(text.encode()) / 1e6, 2))
    print(json.dumps(figures | {"again": again}))


if __name__ == "__main__":
    main()
