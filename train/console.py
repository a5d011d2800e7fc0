"""What one sees of a run: a banner, a progress bar, a line for each event that matters, and at the end what to do next.

On a terminal the bar moves; elsewhere (a log file, CI) there is a plain line now and then. All of it is made from
events, which is why it can be shown by a process that knows nothing of torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console as Rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from train import hardware
from train.config import Train

QUIET = 15.0  # seconds between plain lines where there is no terminal
EXPECTED_MFU = 0.4  # for the expected time, until a throughput has been measured


class Console:
    def __init__(self) -> None:
        self._rich = Rich(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())
        self._moves = self._rich.is_terminal
        self._bar: Progress | None = None
        self._task: Any = None
        self._label = ""
        self._steps = 0
        self._spoke = 0.0
        self._pace = ""
        self._asked = False

    def say(self, text: str | Text | Table) -> None:
        with contextlib.suppress(OSError):  # a full disk, where what is said goes to a file: it ends no run
            self._rich.print(Text(text) if isinstance(text, str) else text)

    def error(self, text: str) -> None:
        self.close()
        print(f"colossus: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _begin(self, what: str, *columns: ProgressColumn, transient: bool = False, **task: Any) -> Progress:
        self.close()
        columns = (TextColumn("{task.description}"), *columns, TimeRemainingColumn())
        bar = Progress(*columns, console=self._rich, transient=transient, refresh_per_second=2)  # 10: 1.3 % of a core
        bar.start()
        self._task = bar.add_task(what, **task)
        return bar

    # ------------------------------------------------------------------------------------------ preparing

    def progress(self, label: str, done: float, total: float) -> None:
        """Of what is done before a run, or beside one: called as often as the caller likes."""
        if self._moves:
            if self._bar is None or label != self._label:
                self._bar = self._begin(label, BarColumn(), TextColumn("{task.percentage:>3.0f} %"), transient=True)
            self._bar.update(self._task, completed=done, total=total)
        elif label != self._label:
            self.say(f"{label} …")
        self._label = label

    # --------------------------------------------------------------------------------------------- events

    def event(self, record: dict[str, Any]) -> None:
        show = getattr(self, f"_on_{record['kind']}", None)
        if show is not None:
            show(record)

    def _on_restore(self, record: dict[str, Any]) -> None:
        for refused in record["refused"]:
            self.say(f"passed over a damaged checkpoint: {refused}")
        self.say(f"going on from step {record['step']} ({record['path']})")

    def _on_start(self, record: dict[str, Any]) -> None:
        self.close()
        self.say(_banner(record))
        self._steps = record["steps"]
        if self._moves:
            columns = MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.fields[numbers]}  ETA")
            done, total = record["step"], record["steps"]
            self._bar = self._begin("step", *columns, total=total, completed=done, numbers="")

    def _on_ownership(self, record: dict[str, Any]) -> None:
        shares = ", ".join(map(str, record["shares"]))
        self.say(f"step {record['step']}: the ranks host {shares} virtual ranks ({record['why']})")

    def _on_injected(self, record: dict[str, Any]) -> None:
        self.say(f"step {record['step']}: a fault on order, {record['id']}")

    def _on_regroup(self, record: dict[str, Any]) -> None:
        ranks = f"{record['world']} rank{'s' * (record['world'] > 1)}"
        lost = f", {record['redone']} of {record['kept'] + record['redone']} leaves again" if record["redone"] else ""
        self.say(f"step {record['step']}: {record['why']}: {ranks} go on after {record['seconds']:.2f} s{lost}")

    def _on_profiled(self, record: dict[str, Any]) -> None:
        self.say(f"step {record['step']}: where a step's time goes, of {record['steps']} on rank 0:")
        whole = sum(record["parts"].values())
        for part, seconds in [*record["parts"].items(), ("a step", whole)]:
            self.say(f"  {part:18} {1000 * seconds:9.1f} ms {seconds / whole:6.1%}")
        self.say(f"  the trace, for https://ui.perfetto.dev: {record['trace']}")

    def _on_throughput(self, record: dict[str, Any]) -> None:
        mfu = "n/a" if record["mfu"] is None else f"{100 * record['mfu']:.0f} %"
        self._pace = f"  {record['tokens_per_s']:,.0f} tokens/s  MFU {mfu}"

    def _on_step(self, record: dict[str, Any]) -> None:
        loss = "nan" if record["loss"] is None else f"{record['loss']:.4f}"
        numbers = f"loss {loss}{self._pace}"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], numbers=numbers)
        elif time.monotonic() - self._spoke > QUIET or record["step"] == self._steps:
            self._spoke = time.monotonic()
            self.say(f"step {record['step']}/{self._steps}  {numbers}")

    def _on_eval(self, record: dict[str, Any]) -> None:
        part = "the whole validation set" if record["whole"] else "validation"
        score = f"{record['loss']:.4f} nats per token"
        if record["bpb"] is not None:
            score = f"{record['bpb']:.4f} bits per byte, {score}"
        if record["experts"]:
            shares = [count * len(layer) / sum(layer) for layer in record["experts"] for count in layer]
            score += f", experts with {min(shares):.2f} to {max(shares):.2f} of an even share"
        self.say(f"step {record['step']}: {part} {score}")

    def _on_asked(self, record: dict[str, Any]) -> None:
        """Who was asked to stop, and by what. Of several ranks the first says it for all."""
        if record["rank"] is None:
            self.say(f"asked to stop ({record['by']}): finishing the step, saving … (again: at once)")
        elif not self._asked:
            self.say(f"rank {record['rank']} was asked to stop ({record['by']}): finishing the step, saving …")
        self._asked = True

    def _on_warning(self, record: dict[str, Any]) -> None:
        self.say(f"warning (rank {record['rank']}): {record['text']}")

    def _on_audit(self, record: dict[str, Any]) -> None:
        first, second = record["suspects"]
        one = f"rank {first} or rank {second}" if first != second else f"rank {first}"
        self.say(f"step {record['step']}: {one} computes virtual rank {record['virtual_rank']}'s gradient wrongly")

    def _on_rollback(self, record: dict[str, Any]) -> None:
        out = record["left_out"]
        without = f" without batch{'es' * (len(out) > 1)} {', '.join(map(str, out))}" if out else ""
        self.say(f"step {record['step']}: its loss cannot be right: all start again from before it{without}")

    def _on_slow(self, record: dict[str, Any]) -> None:
        times = f"{record['times']:.1f} times the median rank's time"
        self.say(f"step {record['step']}: rank {record['rank']} is slow: {times}")

    # ------------------------------------------------------------------------------------------------ end

    def finished_already(self, config: Train, summary: dict[str, Any]) -> None:
        more = "More: steps=N resume.allow=steps; again from the start: another name=…"
        self.say(f"{config.folder} is finished ({summary['steps']} steps). {more}")

    def summary(self, config: Train, path: Path, summary: dict[str, Any], records: list[dict[str, Any]]) -> None:
        """The last lines of a run: how it went, a sample, and what to do next."""
        done = f"{summary['steps']}/{config.steps} steps, {summary['tokens'] / 1e6:.2f} M tokens"
        speed = f"{summary['tokens_per_s']:,.0f} tokens/s" if summary["tokens_per_s"] else "too short to time"
        wall = summary["goodput"]["wall_s"]
        self.say(f"{'stopped' if summary['stopped'] else 'done'}: {done}, {speed}, {wall:.0f} s")
        if summary["stopped"]:
            self.say(f"the same command goes on from here ({path})")
            return
        end = next(record for record in reversed(records) if record["kind"] == "end")
        if summary["val_bpb"] is not None:
            self.say(f"validation: {summary['val_bpb']:.4f} bits per byte{_beside(summary)}")
        elif summary["val_loss"] is not None:  # nor that where a checkpoint was fetched that had nothing left to do
            self.say(f"validation: {summary['val_loss']:.4f} nats per token")
        if end["sample"]:
            self.say("a sample:")
            self.say("\n".join(f"  │ {line}" for line in end["sample"].splitlines()))
        self.say(f"state {summary['state_sha256'][:16]}… in {path}/summary.json")
        self.say("next:")
        ours = "colossus" if shutil.which("colossus") else os.path.relpath(Path(sys.prefix, "bin", "colossus"))
        for command in (f"sample run={path} prompt='def '", f"eval run={path}", "runs"):
            self.say(f"  {ours} {command}")


def _beside(summary: dict[str, Any]) -> str:
    """The yardsticks: what gzip makes of the same bytes."""
    yardsticks = summary["yardsticks"]
    windows, whole = yardsticks["gzip_windows"], yardsticks["gzip_documents"]
    if windows is None or whole is None:
        return ""
    verdict = "the model beats both" if summary["val_bpb"] < min(windows, whole) else "the model does not beat it yet"
    return f"\n  gzip -9: {windows:.4f} on windows of the model's context, {whole:.4f} on whole files: {verdict}"


def _banner(start: dict[str, Any]) -> Table:
    """What will be trained, on what, and what to expect."""
    steps, peak = start["steps"] - start["step"], start["peak_flops"]
    tokens = steps * start["tokens_per_step"]
    compiled = ", compiled first: minutes where that is new" if start["compiled"] else ""
    without = start["precision"] == "bf16" and start["device"].startswith("cpu") and not hardware.processor()[1]
    slow = ", for which this CPU names no instructions: fp32 may be ten times as fast" if without else ""
    cut = f"{start['virtual_ranks']} virtual ranks x {start['micro_batches']} x {start['micro_batch']} sequences"
    flops, expected = "peak n/a", ""
    if peak is not None:
        unit, size = ("T", 1e12) if peak > 1e10 else ("G", 1e9)
        flops = f"{peak / size:.2f} {unit}FLOP/s peak ({start['peak_source']})"
        seconds = tokens * start["flops_per_token"] / (EXPECTED_MFU * peak)
        expected = f", about {duration(seconds)} at {100 * EXPECTED_MFU:.0f} % MFU"
    memory = f"{start['memory_bytes'] / 2**30:.1f} GiB a rank"
    table = Table(Column(style="bold", min_width=9), Column(), show_header=False, box=None, pad_edge=False)
    table.add_row("model", f"{start['parameters'] / 1e6:.2f} M parameters, {start['precision']}{slow}{compiled}")
    table.add_row("batch", f"{start['tokens_per_step']:,} tokens a step: {cut}")
    table.add_row("on", f"{start['world']} rank{'s' * (start['world'] > 1)}, {start['device']}, {flops}")
    table.add_row("expected", f"{steps:,} steps, {tokens / 1e6:,.1f} M tokens{expected}, {memory}")
    return table


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
