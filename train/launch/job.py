"""What every place is given, and what it gives back: jobs in, files and the commands that submit them out."""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Sequence
from typing import NamedTuple

from train.checks import require
from train.commands import Launch
from train.remote import TOKEN

PYTHON = [sys.executable, "-P", "-m", "train"]  # `colossus train` of this installation, whatever PATH says
FILE = "FILE"  # in a command, the path of the file


class Job(NamedTuple):
    config: Launch
    arguments: list[str]  # of `colossus train`, each one word; nothing is quoted for a shell


class Submission(NamedTuple):
    file: str  # its name under runs/.launch
    text: str
    command: list[str]  # FILE stands for its path


def named(job: Job, pattern: str = r"[\w.=,+-]+") -> str:
    """The job's name; refused where the place's tools would not take it."""
    name = job.config.name
    require(bool(re.fullmatch(pattern, name)), "name", f"'{name}' is no name there: {pattern} is")
    return name


def elsewhere(job: Job, *, kept: bool) -> list[str]:
    """The arguments for machines without this one's disks; a restart begins with the newest checkpoint in the store.

    Refused: data that is here only; and checkpoints that would go with their machine, unless the run folder is `kept`.
    """
    config = job.config
    for part in (config.data, *config.data.parts.values()):
        for path in part.paths():
            why = f"{path} is on this machine only: add 'target.mounts=[SOURCE:/data]' and write /data instead"
            require(path == "/", "data.path", why)
    store = config.checkpoint.store
    why = "without it the checkpoints go with their machine: name a bucket, such as s3://bucket/run"
    require(bool(store) or kept, "checkpoint.store", why)
    return [*job.arguments, f"resume_from={store}"] if store and not config.resume_from else job.arguments


def tokens(job: Job) -> dict[str, str]:
    """The variable by which the nodes of this job know each other, made up for it; none where there is one node."""
    return {TOKEN: secrets.token_hex(16)} if job.config.most_nodes > 1 else {}


def verbatim(arguments: Sequence[str]) -> list[str]:
    """For Kubernetes and Compose, which replace variables in arguments: a doubled dollar is one that means itself."""
    return [argument.replace("$", "$$") for argument in arguments]
