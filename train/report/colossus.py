"""This run on Colossus: the same model, batch and tokens as `colossus scale` predicts them, and what that is worth."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml

from train.checks import Refused
from train.commands import Scale
from train.config import CONFIGS
from train.folder import read_json, read_train
from train.report.record import Run
from train.report.words import esc, lasting, number, percent, si, table
from train.scale.project import held_out, project
from train.scale.tables import published
from train.scale.workload import FIELDS, Shape

CLUSTER = "colossus_200k"


def projected(run: Run) -> str:
    """A table and what to make of it; where the projector refuses the model, why. Empty for a run without settings."""
    steps = run.summary["steps"]
    data = read_json(run.path / "data.json")
    if not run.config or not steps or data is None:
        return ""
    try:
        config = read_train(run.path / "config.yaml")
        there = yaml.safe_load((CONFIGS / "cluster" / f"{CLUSTER}.yaml").read_text())
        whole = config.steps * config.tokens_per_step
        scale = Scale(
            model=config.model, cluster=there, vocab=data["vocab"], batch=config.batch.sequences, tokens=float(whole)
        )
        answer = project(scale)
    except Refused as refusal:
        return f"<p>The projector has no answer: {esc(refusal)}</p>"
    wrong, bias = held_out()
    speed, job, step = run.summary["tokens_per_s"], answer["job"], answer["step"]
    seconds, used = step["seconds"]["value"], job["gpus_used"]
    here = config.tokens_per_step / speed if speed else None
    size = used + job["gpus_idle"]
    money, days = answer["whole"]["money"]["value"] * 1e6, answer["whole"]["days"]["value"]
    rows = [
        ["GPUs", f"{run.summary['world_sizes'][-1]} ranks", f"{used:,} of {size:,}"],
        ["a step", lasting(here), f"{lasting(seconds)} <span class=pm>± {percent(wrong)}</span>"],
        [f"{config.steps:,} steps, {si(whole)} tokens", lasting(here and here * config.steps), lasting(days * 86400)],
        ["MFU", percent(run.summary["mfu"]), f"{number(step['mfu']['value'], 2)} %"],
        ["a failure every", "", lasting(answer["failures"]["between"]["value"] * 3600)],
        ["price", "", f"{number(money, 2)} USD"],
    ]
    return table(["", "here, measured|", "Colossus, predicted|"], rows) + _worth(wrong, bias, answer, used / size)


def _worth(wrong: float, bias: float, answer: dict[str, Any], share: float) -> str:
    least, mine = _smallest(), answer["job"]["parameters"]["value"]
    text = f"± {percent(wrong)} is the mean error of step time on published runs that the projector was not fitted to; "
    text += f"on the mean it says {100 * bias:+.0f} %. "
    if mine < least:
        text += f"The smallest of those has {si(least)} parameters, {number(least / mine, 2)} times this model's "
        text += f"{si(mine)}: here it is mostly what a step costs before it computes, and the error is not known. "
    if share < 0.5:
        text += "A batch of this size cannot be cut for more GPUs: the others would stand idle. "
    return f"<p class=note>{text}<code>colossus scale</code> asks for other models, batches and clusters.</p>"


@cache
def _smallest() -> int:
    """Parameters of the smallest model among the published runs."""
    jobs = [run.job for run in published() if run.usable and run.job]
    return min(Shape(**{k: int(job[k]) for k in FIELDS}).parameters for job in jobs)  # type: ignore[arg-type]
