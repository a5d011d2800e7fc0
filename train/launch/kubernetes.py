"""Kubernetes with Kubeflow Trainer v2: a TrainingRuntime, which says how this image trains, and a TrainJob of it.

The trainer gives each pod its PET_NODE_RANK and PET_MASTER_ADDR, which train/nodes.py reads; the pods' token is a
Secret. A pod that ends with anything but 0 or 2 – 75, a node lost, a preemption – is started again, up to
`target.restarts` times, and takes part again. 2 is a mistake of the user, which starting again does not mend.

Fields: https://www.kubeflow.org/docs/components/trainer/operator-guides/runtime/ (API trainer.kubeflow.org/v1alpha1);
failurePolicy: https://jobset.sigs.k8s.io/docs/concepts/; podFailurePolicy:
https://kubernetes.io/docs/tasks/job/pod-failure-policy/.
"""

from __future__ import annotations

from typing import Any

import yaml

from train.checks import REFUSED, require
from train.launch.job import FILE, Job, Submission, elsewhere, named, tokens, verbatim

API = "trainer.kubeflow.org/v1alpha1"
NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"  # a label of DNS, with room for what the pods' names add to it
USER = 1000  # docker/Dockerfile's


def submission(job: Job) -> Submission:
    text = yaml.safe_dump_all(objects(job), sort_keys=False, width=120)
    return Submission(f"{named(job, NAME)}.k8s.yaml", text, ["kubectl", "apply", "--filename", FILE])


def objects(job: Job) -> list[dict[str, Any]]:
    target = job.config.target
    require(bool(target.image), "target.image", "name the image of docker/Dockerfile in a registry")
    kept = any(f"{job.config.runs}/".startswith(f"{place}/") for place in target.places)
    arguments = elsewhere(job, kept=kept)
    metadata = {"name": named(job, NAME), "namespace": target.namespace}
    resources = {"nvidia.com/gpu": str(target.gpus)} if target.gpus else {}
    resources |= {"cpu": str(target.cpus)} if target.cpus else {}
    refused = {"name": "refused", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    policy = {"maxRestarts": target.restarts, "rules": [refused]}
    runtime = {
        "apiVersion": API,
        "kind": "TrainingRuntime",
        "metadata": {**metadata, "labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": job.config.most_nodes, "torch": {}},
            "template": {
                "spec": {"failurePolicy": policy, "replicatedJobs": [{"name": "node", "template": node(job)}]}
            },
        },
    }
    trainer = {"numNodes": job.config.most_nodes, "image": target.image, "args": ["train", *verbatim(arguments)]}
    if resources:
        trainer["resourcesPerNode"] = {"requests": resources, "limits": dict(resources)}
    reference = {"apiGroup": API.partition("/")[0], "kind": "TrainingRuntime", "name": metadata["name"]}
    spec = {"runtimeRef": reference, "trainer": trainer}
    found = [runtime, {"apiVersion": API, "kind": "TrainJob", "metadata": metadata, "spec": spec}]
    if secret := tokens(job):
        found.insert(0, {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": secret})
    return found


def node(job: Job) -> dict[str, Any]:
    """The template of the batch/v1 Job that has a pod for each node."""
    target = job.config.target
    claims = {f"mount-{i}": mount.rpartition(":") for i, mount in enumerate(target.mounts)}
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]  # NCCL's, between processes
    volumes += [{"name": name, "persistentVolumeClaim": {"claimName": c[0]}} for name, c in claims.items()]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    mounts += [{"name": name, "mountPath": c[2]} for name, c in claims.items()]
    bounds = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {"name": "node", "image": target.image, "securityContext": bounds, "volumeMounts": mounts}
    if job.config.most_nodes > 1:
        container["envFrom"] = [{"secretRef": {"name": named(job, NAME)}}]
    user = {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"}}
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": target.grace,
        "automountServiceAccountToken": False,
        "securityContext": user,
        "containers": [container],
        "volumes": volumes,
    }
    refused = {"containerName": "node", "operator": "In", "values": [REFUSED]}
    policy = {"rules": [{"action": "FailJob", "onExitCodes": refused}]}
    labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    # A pod that is lost comes back alone: the others go on meanwhile, or wait for node 0.
    return {
        "metadata": {"labels": labels},
        "spec": {"backoffLimit": target.restarts, "podFailurePolicy": policy, "template": {"spec": pod}},
    }
