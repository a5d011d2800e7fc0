"""`colossus launch`: the job is described once, in the keys of `colossus train`; a place has it its own way.

All keys are checked here first, so nothing is submitted that `colossus train` would refuse.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from train.checks import DONE, FAILED, require
from train.commands import Launch, Place
from train.launch import compose, kubernetes, local, skypilot, slurm
from train.launch.job import FILE, Job, Submission

PLACES: dict[Place, Callable[[list[Job]], list[Submission]]] = {
    Place.local: local.submissions,
    Place.slurm: slurm.submissions,
    Place.skypilot: lambda jobs: [skypilot.submission(job) for job in jobs],
    Place.kubernetes: lambda jobs: [kubernetes.submission(job) for job in jobs],
    Place.compose: lambda jobs: [compose.submission(job) for job in jobs],
}


def launch(found: list[tuple[Launch, list[str]]]) -> int:
    """Exit code 0 once all is submitted, 1 where the place's tool has failed; of `local`, that of the job."""
    config = found[0][0]
    place = config.target.kind
    for key in ("target", "dry", *["nodes"] * (place is Place.slurm)):
        same = all(getattr(other, key) == getattr(config, key) for other, _ in found)
        require(same, key, "is one for all jobs of a sweep: call launch for each value")
    submissions = PLACES[place]([Job(*one) for one in found])
    if config.dry:
        for submission in submissions:
            print(submission.text, end="")
        return DONE
    tool = submissions[0].command[0]
    why = f"{place.name} needs {tool}, which is not here (dry=true prints what would be submitted)"
    require(shutil.which(tool) is not None, "target", why)
    if place is Place.local:
        os.execv(tool, submissions[0].command)
    folder = Path(config.runs).expanduser() / ".launch"
    folder.mkdir(parents=True, exist_ok=True)
    for one in submissions:
        (folder / one.file).touch(mode=0o600)  # it may hold the token of the job's nodes
        (folder / one.file).write_text(one.text)
        command = [str(folder / one.file) if word == FILE else word for word in one.command]
        if subprocess.run(command).returncode != 0:
            return FAILED  # the tool has said why
    return DONE
