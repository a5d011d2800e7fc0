"""This machine: the command itself, in the place of this process, so that signals and exit codes are its own."""

from __future__ import annotations

import shlex

from train.checks import require
from train.launch.job import PYTHON, Job, Submission


def submissions(jobs: list[Job]) -> list[Submission]:
    require(len(jobs) == 1, "--multirun", "colossus train --multirun does that here")
    require(jobs[0].config.most_nodes == 1, "nodes", "this machine is one: use devices=N, or target=compose")
    command = [*PYTHON, *jobs[0].arguments]
    return [Submission("", shlex.join(command) + "\n", command)]
