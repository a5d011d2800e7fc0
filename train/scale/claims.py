"""What public statements about Colossus and its kin come to, by the figures of configs/ and tables/."""

from __future__ import annotations

from typing import Any

from train.scale.hardware import gpus
from train.scale.workload import TABLES, read


def claims() -> list[dict[str, Any]]:
    """One record a statement of tables/public_claims.csv: the verdict there, and the arithmetic done here."""
    h100, h200, b200 = (gpus()[key] for key in ("h100_sxm", "h200_sxm", "b200_sxm"))
    bf16, wide, large = 1e5 * h100.peak / 1e18, h200.bandwidth / h100.bandwidth, h200.memory / h100.memory
    more = [f"x{1.5 + 0.5 * ratio:.2f}" for ratio in (h200.peak / h100.peak, wide, large)]
    computed = {
        "Colossus 100k H100 online": f"{bf16:.1f} EF bf16, {2 * bf16:.1f} EF fp8, dense peak: no benchmark",
        "Aurora 10.6 exaflops": f"HPL-MxP, not comparable with {bf16:.0f} EF of peak",
        "H200 141 GB": f"x{wide:.2f} bandwidth, x{large:.2f} memory, x{h200.peak / h100.peak:.2f} FLOP/s",
        "Blackwell +36.2%": f"x{192e9 / h200.memory:.3f}, as shipped x{b200.memory / h200.memory:.3f}; bandwidth "
        f"x{b200.bandwidth / h200.bandwidth:.3f}",
        "100k on single RDMA": f"70 MW / 100,000 = 700 W: the GPUs' {h100.figures['tdp_w'].value:.0f} W alone",
        "computing power will double": "with 50k H200 alone x1.50; with 50k more H100 FLOP/s, bandwidth, memory "
        + ", ".join(more),
        "H200 most powerful": f"training FLOP/s x{h200.peak / h100.peak:.2f}",
        "12,000 H100": f"{500 / 12:.1f} k$ a GPU: a server's price",
        "Tesla $3-4B": f"{3e6 / (500 / 12) / 1e3:.0f}k to {4e6 / (500 / 12) / 1e3:.0f}k GPUs at that price",
        "Grok-2 on 15,000": f"{15000 * h100.peak * 0.4 * 86400:.2g} FLOP a day at 40 % MFU, assumed",
        "200k H100 OR": f"150k H100 + 50k H200 = {2 * bf16:.0f} EF bf16, dense peak",
    }
    found = []
    for row in read(TABLES / "public_claims.csv"):
        here = next((text for start, text in computed.items() if row["claim"].replace('"', "").startswith(start)), "–")
        found.append({"claim": row["claim"], "verdict": row["verdict"], "figures": here, "said_in": row["said_in"]})
    return found
