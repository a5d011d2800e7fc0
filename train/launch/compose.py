"""Containers on this machine, one a node, by `docker compose`: several hosts on a laptop.

A container that ends with anything but 0 is started again, and goes on from its checkpoint; `docker compose stop` asks
the run to save. Each node has a volume of its own for its run folder, as separate hosts would.

Fields: https://docs.docker.com/reference/compose-file/services/.
"""

from __future__ import annotations

from typing import Any

import yaml

from train.checks import require
from train.launch.job import FILE, Job, Submission, elsewhere, named, tokens, verbatim
from train.nodes import PORT

RUNS = "/work/runs"  # docker/Dockerfile's
NAME = r"[a-z0-9][a-z0-9_-]*"  # of a Compose project


def submission(job: Job) -> Submission:
    name, text = named(job, NAME), yaml.safe_dump(services(job), sort_keys=False, width=120)
    command = ["docker", "compose", "--project-name", name, "--file", FILE, "up", "--detach"]
    return Submission(f"{name}.compose.yaml", text, command)


def services(job: Job) -> dict[str, Any]:
    target, nodes = job.config.target, job.config.most_nodes
    require(bool(target.image), "target.image", "build one first: docker/Dockerfile")
    require(job.config.runs in ("runs", RUNS), "runs", f"is {RUNS} there, in a volume a node: leave it out")
    arguments = elsewhere(job, kept=True)
    found, secret = {}, tokens(job)
    for index in range(nodes):
        variables = {"PET_NODE_RANK": str(index), "PET_MASTER_ADDR": "node0", "PET_MASTER_PORT": str(PORT)}
        found[f"node{index}"] = {
            "image": target.image,
            "command": ["train", *verbatim(arguments)],
            "environment": variables | secret,
            "volumes": [*verbatim([f"{mount}:ro" for mount in target.mounts]), f"runs{index}:{RUNS}"],
            "restart": f"on-failure:{target.restarts}",
            "stop_grace_period": f"{target.grace}s",
            "security_opt": ["no-new-privileges:true"],
            "cap_drop": ["ALL"],
        }
    return {"services": found, "volumes": {f"runs{index}": {} for index in range(nodes)}}
