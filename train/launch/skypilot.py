"""SkyPilot managed jobs: a task in YAML, which `sky jobs launch` keeps going on whatever cloud has machines.

A spot machine that is taken away is replaced by SkyPilot, and exit code 75 (stopped on request, saved) is always gone
on from; `restarts` of any other kind there are none, since the run makes its own. Each start fetches the newest
checkpoint from `checkpoint.store`.

Fields: https://docs.skypilot.co/en/latest/reference/yaml-spec.html and .../examples/managed-jobs.html; SKYPILOT_* are
read by train/nodes.py.
"""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from train.checks import STOPPED, require
from train.config import CONFIGS
from train.launch.job import FILE, Job, Submission, elsewhere, named, tokens


def submission(job: Job) -> Submission:
    name, text = named(job), yaml.safe_dump(task(job), sort_keys=False, width=120)
    return Submission(f"{name}.sky.yaml", text, ["sky", "jobs", "launch", "--yes", "--detach-run", FILE])


def task(job: Job) -> dict[str, Any]:
    target, arguments = job.config.target, elsewhere(job, kept=False)
    checkout = CONFIGS.parent
    have = bool(target.image) or (checkout / "Makefile").exists()
    require(have, "target.image", "name an image: only a checkout can be copied to the machines and set up there")
    resources: dict[str, Any] = {
        "infra": target.infra,
        "accelerators": f"{target.gpu}:{target.gpus}" if target.gpu else "",
        "cpus": f"{target.cpus}+" if target.cpus else "",
        "image_id": f"docker:{target.image}" if target.image else "",
    }
    require(target.gpus == 0 or bool(target.gpu), "target.gpu", "a cloud has many kinds: name one, such as H100")
    resources = {key: value for key, value in resources.items() if value}
    resources |= {"use_spot": target.spot, "job_recovery": {"recover_on_exit_codes": [STOPPED]}}
    command = ["colossus" if target.image else ".venv/bin/colossus", "train", *arguments]
    spec: dict[str, Any] = {"name": named(job), "num_nodes": job.config.most_nodes, "resources": resources}
    if secret := tokens(job):
        spec["secrets"] = secret
    if target.mounts:
        spec["file_mounts"] = {there: source for source, _, there in (m.rpartition(":") for m in target.mounts)}
    if not target.image:
        spec |= {"workdir": str(checkout), "setup": "make setup"}
    return {**spec, "run": f"exec {shlex.join(command)}\n"}
