"""`colossus probe`: what this node's devices can do, and before a run, whether one of them is sick or slow.

Of a CPU it also measures how fast ranks add up and the disk, and keeps all of it as the projector's hardware `here`.

All devices work at once, as they will in a run: cores and GPUs share memory, power and cooling. A device is compared
with the others and with itself: the same computation must give the same bits each time and everywhere. What a slow one
costs a run is the difference, for all wait for it.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console as Rich
from rich.table import Column, Table

from train import hardware, links
from train.checks import DONE, FAILED, Refused, require
from train.commands import Format
from train.commands import Probe as Config
from train.console import Console
from train.faults.slow import slow
from train.folder import replace
from train.plan import MAX_RANKS, there
from train.processes import forkserver

SIDE = 1024  # of the matrices that are multiplied
BYTES = 64 << 20  # copied at a time
FEWEST = 3  # times that each thing is done, however long it takes
RANKS = [2, 4]  # that add up together
PATIENCE = 120.0  # seconds, besides those of the measurements, after which a device is given up

Row = dict[str, Any]


def probe(config: Config) -> int:
    """Exit code 0; with `check=true` 1 where a device is slow or computes other bits, which is named."""
    kind, available = there(config.accelerator)
    gpus = kind == "cuda"
    require(available > 0, "accelerator", "cuda: this process sees no GPU; use cpu")
    usual = available if gpus else min(available, MAX_RANKS)
    count = config.devices if isinstance(config.devices, int) else usual
    require(not gpus or count <= available, "devices", f"{count} are more than the {available} GPUs here")
    console = Console()
    progress = console.progress if config.format is Format.table else lambda *_: None
    rows = _measured([f"cuda:{i}" if gpus else "cpu" for i in range(count)], config.seconds, progress)
    faults = findings(rows)
    silent = any("error" in row for row in rows)
    between = {} if gpus or silent or config.check else _links(progress)
    console.close()
    if between:
        _keep(rows, between)
    config.format.tell({"devices": rows, "findings": faults} | between, lambda _: _show(rows, between))
    for fault in faults:
        console.error(fault)
    if config.format is Format.table and not faults:
        print(f"{count} device{'s' * (count > 1)}: equal bits, none of them slow")
    return FAILED if faults and config.check else DONE


def _links(progress: Callable[[str, int, int], None]) -> Row:
    """What ranks on this CPU have between them, and the disk that the current folder is on."""
    found = links.sums(RANKS, progress)
    if not found:
        raise Refused("accelerator", "no two ranks could add up over loopback: is `lo` up?")
    hop, speed = links.fit(found, hardware.cores())
    wrote, read = links.disk(Path.cwd())
    return {"sums": found, "hop_s": hop, "bus_bytes_per_s": speed, "disk_write": wrote, "disk_read": read}


def _keep(rows: Sequence[Row], between: Row) -> None:
    """A core as hardware `here`: medians of all cores at work at once."""

    def figure(value: float) -> Row:
        return {"value": value, "source": f"colossus probe, {time.strftime('%Y-%m-%d')}", "tag": "measured"}

    speeds = ("matmul_flops", "fp32_flops", "copy_bytes_per_s")
    core = {key: statistics.median(row[key] for row in rows) for key in speeds}
    cores = hardware.cores()
    entry: Row = {"name": f"{hardware.processor()[0]} core", "architecture": "cpu"}
    entry |= {"domain": cores, "memory_gb": figure(hardware.memory() / cores / 1e9)}
    entry |= dict.fromkeys(("bf16_tflops", "matmul_tflops"), figure(core["matmul_flops"] / 1e12))
    entry |= {"fp32_matmul_tflops": figure(core["fp32_flops"] / 1e12)}
    entry |= {"memory_tbs": figure(core["copy_bytes_per_s"] / 1e12), "hop_us": figure(between["hop_s"] * 1e6)}
    entry |= dict.fromkeys(("bus_gbs", "nic_gbs"), figure(between["bus_bytes_per_s"] / 1e9))
    entry |= {f"disk_{way}_gbs": figure(between[f"disk_{way}"] / 1e9) for way in ("write", "read")}
    path = hardware.kept()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, yaml.safe_dump(entry, sort_keys=False))
    except OSError as error:
        raise Refused("probe", f"{path} cannot be written ({error.strerror})") from error


def findings(rows: Sequence[Row]) -> list[str]:
    """A line for each device that gave no answer, does not agree with itself or with most others, or is slow."""
    found = [f"device {i} gave no answer: {row['error']}" for i, row in enumerate(rows) if "error" in row]
    well = [(i, row) for i, row in enumerate(rows) if "error" not in row]
    found += [f"device {i} does not compute the same bits twice" for i, row in well if len(row["digests"]) > 1]
    steady = [(i, row["digests"][0]) for i, row in well if len(row["digests"]) == 1]
    counts = Counter(digest for _, digest in steady).most_common()
    if len(counts) > 1:
        tied = counts[0][1] == counts[1][1]
        odd = [i for i, digest in steady if tied or digest != counts[0][0]]
        found.append(f"device{'s' * (len(odd) > 1)} {', '.join(map(str, odd))}: other bits than the others")
    for what, unit in (("matmul_flops", "multiplies"), ("copy_bytes_per_s", "copies")):
        times = slow([1 / row[what] for _, row in well]) if well else {}
        found += [f"device {well[i][0]} {unit} {x:.1f} times as slowly as the median" for i, x in times.items()]
    return found


def _measured(devices: Sequence[str], seconds: float, progress: Callable[[str, int, int], None]) -> list[Row]:
    context = forkserver()
    pipes: list[Connection] = []
    processes = []
    gate = context.Barrier(len(devices))
    for device in devices:
        ours, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=_device, args=(device, seconds, gate.wait, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    started = time.monotonic()
    rows: list[Row] = [{"device": device, "error": "it is silent"} for device in devices]
    waiting = dict(zip(pipes, range(len(devices)), strict=True))
    try:
        while waiting and (passed := time.monotonic() - started) < PATIENCE + 4 * seconds:
            progress("measuring", min(int(10 * passed), int(40 * seconds)), int(40 * seconds))
            for pipe in (one for one in wait(list(waiting), timeout=0.2) if isinstance(one, Connection)):
                index = waiting.pop(pipe)
                try:
                    rows[index] = json.loads(pipe.recv_bytes())
                except EOFError:
                    rows[index]["error"] = "its process died"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return rows


def _device(device: str, seconds: float, together: Callable[[float], object], connection: Connection) -> None:
    """In a process of its own, forked with torch imported: measure a device while the others are measured too."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    place = torch.device(device)
    dtype = torch.bfloat16 if device != "cpu" or hardware.processor()[1] else torch.float32
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIDE, SIDE, generator=draw).to(place, dtype) for _ in range(2))
    a32, b32 = a.float(), b.float()
    source = torch.empty(BYTES, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)

    def rate(action: Callable[[], object], amount: float) -> float:
        """Median of `amount` by the seconds of one action, over `seconds` or a little longer."""
        together(PATIENCE)
        rates: list[float] = []
        until = time.perf_counter() + seconds
        while len(rates) < FEWEST or time.perf_counter() < until:
            began = time.perf_counter()
            action()
            if place.type == "cuda":
                torch.cuda.synchronize(place)
            rates.append(amount / (time.perf_counter() - began))
        return statistics.median(rates)

    def digest() -> str:
        x = torch.softmax((a @ b).float() / SIDE**0.5, -1) @ b.float()
        return hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest()[:16]

    seen: list[str] = []
    rate(lambda: seen.append(digest()), 1.0)
    row = {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else f"{hardware.processor()[0]} core",
        "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
        "matmul_flops": rate(lambda: torch.mm(a, b), 2 * SIDE**3),
        "fp32_flops": rate(lambda: torch.mm(a32, b32), 2 * SIDE**3),
        "copy_bytes_per_s": rate(lambda: target.copy_(source), 2 * BYTES),
        "digests": sorted(set(seen)),
        "digests_taken": len(seen),
    }
    connection.send_bytes(json.dumps(row).encode())


def _show(rows: Sequence[Row], between: Row) -> None:
    names = ("matmul TFLOP/s", "in fp32", "copy GB/s", "bits taken")
    right = [Column(name, justify="right") for name in names]
    table = Table("", Column("device", no_wrap=True), "precision", *right, Column("bits", no_wrap=True), box=None)
    for i, row in enumerate(rows):
        if "error" in row:
            table.add_row(str(i), row["device"], "", "", "", "", "", row["error"])
        else:
            flops = (f"{row[key] / 1e12:.3g}" for key in ("matmul_flops", "fp32_flops"))
            speeds = *flops, f"{row['copy_bytes_per_s'] / 1e9:.3g}"
            said = *speeds, str(row["digests_taken"]), " ".join(row["digests"])
            table.add_row(str(i), row["device"], row["precision"], *said)
    Rich(soft_wrap=True, highlight=False).print(table)
    if between:
        hop, speed = between["hop_s"] * 1e6, between["bus_bytes_per_s"] / 1e9
        print(f"adding up: {hop:.0f} us a message, {speed:.2f} GB/s of a rank")
        print(f"disk: {between['disk_write'] / 1e9:.2f} GB/s written, {between['disk_read'] / 1e9:.2f} read")
        print(f"kept for `colossus scale cluster=here` in {hardware.kept()}")
