"""What a machine says of itself, from made-up files; and the table of peaks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from train import hardware
from train.checks import Refused
from train.hardware import Gpu, cores, devices, gpus, memory, peak_flops, processor

GIB = 2**30


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def test_this_machine_answers() -> None:
    assert cores() >= 1
    assert memory() > 0
    assert processor()[0]


CPUINFO = "processor : 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx512f {} sse\n\nprocessor : 1\n"


@pytest.mark.parametrize(
    ("flags", "found"),
    [("avx512_bf16 amx_bf16", ("avx512_bf16", "amx_bf16")), ("avx512_bf16x", ()), ("avx512_bf16", ("avx512_bf16",))],
)
def test_processor(tmp_path: Path, flags: str, found: tuple[str, ...]) -> None:
    put(tmp_path, {"proc/cpuinfo": CPUINFO.format(flags)})
    assert processor(tmp_path) == ("Some CPU @ 2 GHz", found)
    assert processor(tmp_path / "nothing") == ("unknown", ())


V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "4:memory:/a\n3:cpu,cpuacct:/a\n0::/\n"}


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "350000 100000\n"}, 3),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"}, 1),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "sys/fs/cgroup/a/cpu.max": "200000 100000\n"}, 2),
        (V2 | {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),  # the folder itself is not visible from inside
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "9900000 100000\n"}, 8),
        (V1 | {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000"}, 8),
        (V1 | {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "250000", "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000"}, 2),
    ],
)
def test_cores_know_their_quota(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert cores(put(tmp_path, files)) == expected


MEMINFO = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {16 * GIB // 1024} kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 0),
        (MEMINFO, 16),
        (MEMINFO | V2 | {"sys/fs/cgroup/a/b/memory.max": "max", "sys/fs/cgroup/a/b/memory.current": "7"}, 16),
        (
            MEMINFO
            | V2
            | {
                "sys/fs/cgroup/a/memory.max": f"{8 * GIB}",
                "sys/fs/cgroup/a/memory.current": f"{5 * GIB}",
                "sys/fs/cgroup/a/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            },
            4,
        ),
        (
            MEMINFO
            | V1
            | {
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{8 * GIB}",
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{6 * GIB}",
            },
            2,
        ),
    ],
)
def test_memory_is_the_least_of_machine_and_cgroups(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert memory(put(tmp_path, files)) == expected * GIB


SMI = """#!/bin/sh
echo 'GPU-aa1, NVIDIA H100 80GB HBM3, 81559'
echo 'GPU-ab2, NVIDIA H200, 143771'
echo 'GPU-cc3, NVIDIA H100 80GB HBM3, 81559'
"""
A, B = Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20), Gpu("NVIDIA H200", 143771 * 2**20)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, (A, B, A)),
        ("", ()),
        ("-1", ()),
        ("1", (B,)),
        ("2,1", (A, B)),
        ("0,7,1", (A,)),
        ("GPU-ab", (B,)),
        ("GPU-a", ()),
        ("0,0", (A,)),
    ],
)
def test_gpus_are_those_cuda_would_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: tuple[Gpu, ...]
) -> None:
    put(tmp_path, {"nvidia-smi": SMI})
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus() == expected


@pytest.mark.parametrize("script", [None, "#!/bin/sh\nexit 9\n", "#!/bin/sh\necho 'No devices were found'\n"])
def test_without_a_working_nvidia_smi_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None
) -> None:
    if script:
        put(tmp_path, {"nvidia-smi": script})
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus() == ()


def test_peaks_are_dense_and_never_guessed() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert peak_flops("NVIDIA H200", "bf16") == 989.5e12
    assert peak_flops("NVIDIA B200", "fp32") is None  # no figure of it with a source
    for unknown in ("NVIDIA H100", "H100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GB200", "Tesla T4", ""):
        assert peak_flops(unknown, "bf16") is None


def test_every_entry_is_whole() -> None:
    table = devices()
    assert len({device.name for device in table.values()}) >= 10
    for device in table.values():
        assert device.memory >= 24e9
        # Tensor cores are faster than plain fp32, or as fast; bf16 is at most 2.01 times TF32 and not the sparse 4
        assert device.peaks["bf16"] / device.peaks.get("tf32", device.peaks["bf16"]) < 2.05


GOOD = "name: X\naliases: [X 1]\nmemory_gb: {value: 1, source: s}\nbf16_tflops: {value: 2, source: s}\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (GOOD.replace(", source: s}\nbf16", "}\nbf16"), "memory_gb needs a value and a source"),
        (GOOD + "bf16_flops: {value: 2, source: s}\n", "unknown key bf16_flops"),
        (GOOD.replace("X 1", "Y 1"), "'Y 1' is X already"),
    ],
)
def test_a_bad_entry_is_refused(tmp_path: Path, text: str, why: str) -> None:
    put(tmp_path, {"a.yaml": GOOD.replace("X 1", "Y 1"), "b.yaml": text})
    with pytest.raises(Refused, match=why):
        hardware.devices(tmp_path)
