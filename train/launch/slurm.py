"""Slurm: a batch script that one `sbatch` submits. The nodes share this folder; a sweep is an array.

Two minutes before its limit Slurm sends SIGUSR1 to all processes of the job's steps, and SIGTERM when it is preempted:
the run saves and ends with 75, and the script puts the job back into the queue itself, because Slurm does not do so
with a job that ends by itself inside the grace of its preemption. Whoever cancels the job ends the script as well, so
that it does not come back. When a node fails, the run goes on without it.

Options: https://slurm.schedmd.com/sbatch.html; SLURM_NODEID and the node list are read by train/nodes.py.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from train.checks import STOPPED, seconds
from train.launch.job import FILE, PYTHON, Job, Submission, named
from train.remote import TOKEN

SCRIPT = """\
# Several jobs may share a node, and each has a place to meet: below the ports that the kernel gives away (32768 on).
export PET_MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export {token}="${{{token}:-$(od -A n -N 16 -t x1 /dev/urandom | tr -d ' ')}}"
srun --kill-on-bad-exit=0 --no-kill {python} "$@"
code=$?
if [ "$code" -eq {stopped} ]; then
    scontrol requeue "$SLURM_JOB_ID" && sleep 60  # this script ends when the job is taken back
fi
exit "$code"
"""


def submissions(jobs: list[Job]) -> list[Submission]:
    config, target = jobs[0].config, jobs[0].config.target
    names = [named(job) for job in jobs]
    name = names[0] if len(names) == 1 else f"{names[0]}+{len(names) - 1}"
    limit, several = seconds(target.time), len(jobs) > 1
    options = {
        "job-name": name,
        "nodes": config.nodes,
        "ntasks-per-node": 1,  # it starts the node's ranks itself
        "cpus-per-task": target.cpus,
        "gpus-per-node": f"{target.gpu}:{target.gpus}" if target.gpu else target.gpus,
        "time": limit and math.ceil(limit / 60),
        "partition": target.partition,
        "account": target.account,
        "signal": f"USR1@{target.grace}",
        "open-mode": "append",  # one file for all that a job prints, however often it is queued again
        "output": f"{config.runs}/.launch/{name}-{'%A_%a' if several else '%j'}.out",
        "array": f"0-{len(jobs) - 1}" if several else "",
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in options.items() if value)]
    lines += ["#SBATCH --requeue", "#SBATCH --no-kill", f"cd {shlex.quote(str(Path.cwd()))} || exit"]
    cases = (f"    {index}) set -- {shlex.join(job.arguments)} ;;" for index, job in enumerate(jobs))
    lines += ['case "${SLURM_ARRAY_TASK_ID:-0}" in', *cases, "esac"]
    text = "\n".join([*lines, SCRIPT.format(python=shlex.join(PYTHON), stopped=STOPPED, token=TOKEN)])
    return [Submission(f"{name}.sbatch", text, ["sbatch", FILE])]
