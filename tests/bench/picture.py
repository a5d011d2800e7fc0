"""The timeline of a drill's report as a picture that stands alone: `python -m tests.bench.picture RUN_FOLDER`.

colossus drill steps=120 devices=3 faults.count=12 && python -m tests.bench.picture runs/drill
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.bench.report import RESULTS
from train.report.record import Run
from train.report.timeline import SIGNS, draw
from train.report.words import esc

LEFT, WIDE, ROW, TOP = 70, 900, 26, 64
COLORS = {"fault": "#d1432f", "injected": "#d9822b", "checkpoint": "#2a8f6d", "slow": "#8256c4"}
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#6e7681}.big{font-size:15px;font-weight:600}"
    "path{fill:none;vector-effect:non-scaling-stroke;stroke:#2f7fd6}.dot{stroke-width:8;stroke-linecap:round}"
    ".stroke{stroke-width:1.2}.there{fill:#2f7fd6;fill-opacity:.28}.waits{fill:#9aa3b0;fill-opacity:.3}"
)


def main() -> None:
    run, twin = (Run(Path(sys.argv[1] + part)) for part in ("", "-twin"))
    digest = run.summary["state_sha256"]
    assert digest is not None
    assert digest == twin.summary["state_sha256"], "their bits differ: there is nothing to boast of"
    figure = re.sub(r"<title>.*?</title>", "", draw(run.records), flags=re.S)
    found = re.search(r'<svg viewBox="0 0 1000 (\d+)"[^>]*>(.*?)</svg>', figure, re.S)
    assert found is not None, "there is nothing to draw"
    high = int(found[1]) * ROW // 10
    kinds = [kind for kind in SIGNS if f"m-{kind}" in found[2] and kind != "eval"]
    body = re.sub(r'<path class="dot m-eval"[^>]*></path>|<path class="dot m-eval"[^>]*/>', "", found[2])
    style = STYLE + "".join(f".m-{kind}{{stroke:{color}}}" for kind, color in COLORS.items())
    texts = []
    for share, text in re.findall(r'class="y" style="top:([\d.]+)%">(.*?)<', figure):
        texts.append(
            f'<text x="{LEFT - 10}" y="{TOP + high * float(share) / 100 + 4:.0f}" text-anchor="end">{text}</text>'
        )
    for share, text in re.findall(r'class="x[^"]*" style="left:([\d.]+)%">(.*?)<', figure):
        x = LEFT + WIDE * float(share) / 100
        texts.append(f'<text x="{x:.0f}" y="{TOP + high + 18}" text-anchor="middle">{text}</text>')
    x = LEFT
    for kind in kinds:
        texts.append(f'<path class="dot m-{kind}" d="M{x + 4} 45h0"/><text x="{x + 14}" y="49">{SIGNS[kind][0]}</text>')
        x += 34 + 8 * len(SIGNS[kind][0])
    faults = len({record["id"] for record in run.of("injected")})
    head = f"{faults} faults, and the same bits as without any: state {digest[:16]}…"
    RESULTS.joinpath("drill.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDE + 30} {TOP + high + 30}">'
        f'<style>{style}</style><text class="big" x="{LEFT}" y="22">{esc(head)}</text>{"".join(texts)}'
        f'<svg x="{LEFT}" y="{TOP}" width="{WIDE}" height="{high}" viewBox="0 0 1000 {found[1]}" '
        f'preserveAspectRatio="none">{body}</svg></svg>\n'
    )


if __name__ == "__main__":
    main()
