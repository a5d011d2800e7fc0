"""What a report says of one run, a section a function: HTML, or nothing where the run has nothing of the kind."""

from __future__ import annotations

import statistics
from typing import Any

from train.ledger import PARTS
from train.report import settings
from train.report.chart import Series, chart, parted, smooth
from train.report.record import Record, Run
from train.report.words import NONE, esc, lasting, number, percent, plain, si, table

FAULTS = 200  # that are listed
SAMPLES = 6  # of what the model wrote
GROUPS = {  # of the ledger's parts: useful, lost to faults, the run's own upkeep
    "good": ("steps",),
    "lost": ("redone", "detection", "regrouping", "restore", "missing"),
    "kept": ("checkpoint", "warm_up", "evaluation", "start_up", "other", "idle"),
}


def headline(run: Run) -> str:
    found, start = run.summary, run.last("start") or {}
    worlds = list(dict.fromkeys([*found["world_sizes"], *(r["world"] for r in run.of("regroup"))]))
    ledger, state = found["goodput"], run.state()
    step = f"{found['steps']:,}" + (f" <small>of {run.wanted:,}</small>" if run.wanted else "")
    score, unit = (found["val_loss"], "nats a token") if found["val_bpb"] is None else (found["val_bpb"], "bits a byte")
    figures = [
        ("steps", "", step),
        ("training loss", "nats a token", number(found["final_loss"])),
        ("validation", unit, number(score)),
        ("throughput", "tokens/s", si(found["tokens_per_s"])),
        ("model FLOPs utilization", "", percent(found["mfu"])),
        ("waiting for the sum", "of the steps", percent(found["waiting"]["mean"])),
        ("goodput", "", percent(ledger["share"] if ledger["wall_s"] else None)),
        ("wall time", "", lasting(ledger["wall_s"])),
        ("ranks", "", esc(", ".join(map(str, worlds)) or NONE)),
    ]
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{value} <small>{unit}</small></dd></div>" for name, unit, value in figures
    )
    line = [f"{si(start['parameters'])} parameters", esc(start["precision"]), esc(start["device"])] if start else []
    line += [f"{si(found['tokens'])} tokens"] if found["tokens"] else []
    digest = found["state_sha256"]
    bits = f'<p class="bits"><span>state_sha256</span> <code>{esc(digest)}</code></p>' if digest else ""
    sub = f'<p class="sub">{chip(state)} {" · ".join(line)}</p>'
    return f'{sub}{_trouble(run, state)}<dl class="figures">{cells}</dl>{bits}'


def chip(state: str) -> str:
    return f'<span class="chip {state.split()[0]}">{state}</span>'


def _trouble(run: Run, state: str) -> str:
    """What one would wonder about."""
    words = []
    if state == "broken":
        fault = run.last("fault")
        cause = f": {fault['fault']} in {fault['phase']}, process {fault['rank']}: {fault['cause']}" if fault else ""
        words.append(f"The record ends without a last word{cause}. The same command goes on from the last checkpoint.")
    if bad := run.tail.bad:
        words.append(f"{bad} line{'s' * (bad > 1)} of events.jsonl cannot be read and are left out.")
    if not run.config:
        words.append("config.yaml is missing or cannot be read: settings are not shown.")
    return "".join(f'<p class="trouble">{esc(word)}</p>' for word in words)


def curves(runs: list[Run]) -> str:
    """All line charts; of several runs one over the other, dashed where a run's bits are an earlier one's."""
    one = len(runs) == 1
    steps = [list(run.steps.values()) for run in runs]
    paces = [run.of("throughput") for run in runs]
    scores = [run.of("eval") for run in runs]
    digests = [run.summary["state_sha256"] for run in runs]
    same = [d is not None and d in digests[:i] for i, d in enumerate(digests)]

    def drawn(title: str, unit: str, records: list[list[Record]], key: str, **more: Any) -> str:
        factor, dots, zero = more.get("factor", 1.0), more.get("dots", False), more.get("zero", False)
        series = []
        for i, (run, some) in enumerate(zip(runs, records, strict=True)):
            found = {r["step"]: r.get(key) for r in some}  # of a step that was done again the last counts
            x = sorted(found)
            y = [None if found[n] is None else factor * found[n] for n in x]
            name = title if one else run.name + (" (same bits)" if same[i] else "")
            if x:
                series.append(Series(name=name, x=x, y=y, color=i, dots=dots and len(x) < 60, dashed=same[i]))
        note = more.get("note", "")
        if one and more.get("mean") and series and len(series[0].x) >= 100:
            window = max(5, len(series[0].x) // 50)
            raw, note = series[0], f"pale: every step; line: the mean of {window:,} steps"
            line = Series(name="mean", x=raw.x, y=smooth(raw.y, window))
            series = [Series(name="steps", x=raw.x, y=raw.y, faint=True), line]
        return chart(title, unit, series, zero=zero, note=note)

    bpb = any(r["bpb"] is not None for some in scores for r in some)
    valid = ("bits per byte", "bpb") if bpb else ("nats per token", "loss")
    charts = (
        drawn("Training loss", "nats per token", steps, "loss", mean=True),
        drawn("Validation", valid[0], scores, valid[1], dots=True, note=_gzip(runs) if bpb else ""),
        drawn("Gradient norm", "before clipping", steps, "grad_norm", mean=True),
        drawn("Learning rate", "", steps, "lr", zero=True),
        drawn("Throughput", "tokens/s", paces, "tokens_per_s", zero=True),
        drawn("MFU", "% of the devices' dense peak", paces, "mfu", factor=100, zero=True),
        drawn("Memory", "GiB, peak of rank 0", paces, "memory_bytes", factor=2**-30, zero=True),
        drawn("Time a step", "s", steps, "seconds"),
        waits(runs),
    )
    return f'<div class="grid2">{"".join(charts)}</div>' if any(charts) else "<p>No step was recorded.</p>"


def waits(runs: list[Run]) -> str:
    """For what share of the time ranks wait for the sum of the gradients."""
    series = []
    for i, run in enumerate(runs):
        found = {r["step"]: r["waiting"] for r in run.of("throughput") if r.get("waiting")}
        shares = [found[n] for n in sorted(found)]
        mean = {run.name: list(map(statistics.mean, shares))}
        ways = {"least": list(map(min, shares)), "most": list(map(max, shares))} if len(runs) == 1 else mean
        for j, (name, y) in enumerate(ways.items()):
            series += [Series(name=name, x=sorted(found), y=[100 * v for v in y], color=i + j)] if y else []
    note = "What the rank that waits least waits is communication; what others wait more is for slower ranks."
    unit = "% of the time, the rank that waits" if len(runs) == 1 else "% of the time, mean of the ranks"
    return chart("Waiting for the sum", unit, series, zero=True, note=note)


def _gzip(runs: list[Run]) -> str:
    """What gzip makes of the same bytes, where all runs were told the same."""
    said = {(y.get("gzip_windows"), y.get("gzip_documents")) for run in runs if (y := run.summary["yardsticks"])}
    windows, whole = said.pop() if len(said) == 1 else (None, None)
    return f"gzip -9: {number(windows)} on windows of the context, {number(whole)} on whole files" if whole else ""


def faults(run: Run) -> str:
    """What was lost or failed, each with its cause; of a hang, where every process was when it was found."""
    rows, begun = [], run.records[0]["time"] if run.records else 0.0
    for fault in (found := run.of("fault"))[:FAULTS]:
        where = "".join(f"<br>process {esc(one)}: {esc(said)}" for one, said in fault.get("flight", {}).items())
        more = f"<details><summary>where each process was</summary>{where[4:]}</details>" if where else ""
        step = NONE if fault["step"] is None else f"{fault['step']:,}"
        words = [esc(fault[key]) for key in ("rank", "fault", "phase")]
        rows.append([lasting(fault["time"] - begun), *words, step, esc(fault["cause"]) + more])
    left = f"<p class=note>… and {len(found) - FAULTS:,} more</p>" if len(found) > FAULTS else ""
    return table(["after|", "process|", "what", "in", "step|", "cause"], rows) + left if rows else ""


def goodput(run: Run) -> str:
    """Where the rank-seconds went: a bar, and a table of the parts that there were."""
    ledger = run.summary["goodput"]
    return stacked(ledger) + _parts(ledger) if ledger["wall_s"] else ""


def spent(run: Run) -> str:
    """Energy and money, each figure with where it is from."""
    found, hours = run.summary["economy"], run.summary["goodput"]["wall_s"] / 3600
    rows = [("watts", "W", 1.0), ("watts", "Wh, by the wall time", hours), ("joules_per_token", "J a token", 1.0)]
    rows += [("usd_per_million_tokens", "USD a million tokens", 1.0)]
    told = [(name, figure["value"] * times, figure) for key, name, times in rows if (figure := found[key])]
    return table(["", "|", "tag", "source"], [[a, number(v, 3), esc(f["tag"]), esc(f["source"])] for a, v, f in told])


def stacked(ledger: Record) -> str:
    bars = []
    for group, parts in GROUPS.items():
        for i, part in enumerate(parts):
            share = ledger["seconds"][part] / ledger["wall_s"]
            look = f'class="p-{group}" style="opacity:{1 - 0.14 * i:.2f}"'
            bars.append((look, share, f"{part.replace('_', ' ')}: {percent(share)}"))
    return parted("goodput", bars)


def _parts(ledger: Record) -> str:
    group = {part: name for name, parts in GROUPS.items() for part in parts}
    rows = []
    for part in sorted(PARTS, key=lambda part: -ledger["seconds"][part]):
        share = ledger["seconds"][part] / ledger["wall_s"]
        if share > 0:
            name = f'<i class="sw p-{group[part]}"></i>{part.replace("_", " ")}'
            rows.append([name, number(share * ledger["rank_s"], 3), percent(share)])
    rows.append(["all", number(ledger["rank_s"], 3), percent(1.0)])
    return table(["part", "rank-seconds|", "share|"], rows)


def experts(run: Run) -> str:
    """How often each expert was chosen: the last evaluation by layer, and the extremes on the way, in training."""
    evaluated = [r for r in run.of("eval") if r.get("experts")]
    scores = run.of("routing") or evaluated  # runs of before have told it of evaluations only
    if not scores:
        return ""
    last, x, dots = (evaluated or scores)[-1], [r["step"] for r in scores], scores is evaluated
    layers = [[count * len(layer) / max(1, sum(layer)) for count in layer] for layer in last["experts"]]
    head = ["layer", *(f"expert {i}|" for i in range(len(layers[0])))]
    rows = [[str(i), *(_heat(share) for share in layer)] for i, layer in enumerate(layers)]
    shares = [[c * len(layer) / max(1, sum(layer)) for layer in r["experts"] for c in layer] for r in scores]
    extremes = [
        Series(name="most chosen", x=x, y=[max(s) for s in shares], dots=dots),
        Series(name="least chosen", x=x, y=[min(s) for s in shares], color=1, dots=dots),
    ]
    losses = [
        Series(name=name, x=x, y=[r.get(key) for r in scores], color=i, dots=dots)
        for i, (name, key) in enumerate((("load balance (1: even)", "balance"), ("router z", "router_z")))
    ]
    charts = chart("Extremes", "times an even share", extremes, zero=True) + chart("Auxiliary losses", "", losses)
    of = "Evaluation" if evaluated else "Batch"
    note = f"<p class=note>{of} of step {last['step']:,}; 1.00 is an even share.</p>"
    return table(head, rows, "heat") + note + f'<div class="grid2">{charts}</div>'


def _heat(share: float) -> str:
    return f'<span style="--h:{min(1.0, share / 3):.2f}">{share:.2f}</span>'


def samples(run: Run) -> str:
    """What the model wrote to the same prompt and seed as it learnt: of many evaluations some, evenly apart."""
    said = {r["step"]: r["sample"] for kind in ("eval", "end") for r in run.of(kind) if r.get("sample")}
    steps = sorted(said)
    few = dict.fromkeys(steps[i * (len(steps) - 1) // (SAMPLES - 1)] for i in range(SAMPLES) if steps)
    shown = [f"<figcaption>after step {step:,}</figcaption><pre>{esc(plain(said[step]))}</pre>" for step in few]
    return "".join(f"<figure>{each}</figure>" for each in shown)


def configuration(run: Run) -> str:
    if not run.config:
        return ""
    rows = settings.changed(run.config)
    first = [[f"<code>{esc(key)}</code>", f"<b>{shown(ours)}</b>", shown(usual)] for key, ours, usual in rows]
    rest = [[f"<code>{esc(key)}</code>", shown(value)] for key, value in run.config.items()]
    return (
        table(["differs from the default", "this run", "default"], first)
        + f"<details><summary>all {len(rest)} settings</summary>{table(['key', 'value'], rest)}</details>"
    )


def shown(value: Any) -> str:
    """A setting."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else value
    return NONE if text in (None, "", {}) else esc(text)


def environment(run: Run) -> str:
    """The numerics fingerprint, and what the run said of its machine."""
    start = run.last("start")
    if start is None:
        return ""
    peak = f"{start['peak_flops'] / 1e12:.2f} TFLOP/s ({start['peak_source']})" if start["peak_flops"] else "n/a"
    shake = run.last("handshake")
    rows = {
        **start["fingerprint"],
        "peak of all ranks": peak,
        "memory a rank, expected": f"{si(start['memory_bytes'])}B",
    }
    if shake is not None:
        rows["ranks compute equal bits"] = "yes" if shake["equal"] else "NO: the law does not hold between them"
    note = "Two runs whose fingerprints agree compute the same bits, whatever their ranks."
    return table(["", ""], [[esc(k), shown(v)] for k, v in rows.items()]) + f"<p class=note>{note}</p>"
