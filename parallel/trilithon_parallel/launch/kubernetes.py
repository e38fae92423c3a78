"""
Train on Kubernetes: a JobSet as a manifest (https://jobset.sigs.k8s.io, `jobset.x-k8s.io/v1alpha2`).

One pod a node, each with one torchrun; JobSet's headless service gives pods names, and the ranks meet at the first.
torchrun restarts ranks that fail; when a pod goes, JobSet makes all of them again. The run directory is a claim that
all pods mount.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from trilithon_parallel.launch import LaunchError

RUN_MOUNT = "/run/trilithon"
_JOB, _CONTAINER, _PORT = "node", "trainer", 29500
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_CLAIM = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_MAX_HOST_LEN = 63  # of a pod's host name, a DNS label


@dataclass(frozen=True)
class KubernetesJob:
    """
    A training job as Kubernetes is told of it.

    Args:
        name: of the JobSet: lower-case letters, digits, dashes.
        image: container image with Python and this package.
        command: what torchrun runs: `("-m", "package.module", "--flag")`.
        nodes, nproc_per_node: pods, and ranks in each.
        gpus_per_node: `nvidia.com/gpu` of a pod; 0 for ranks on CPUs.
        cpu, memory: of a pod, as Kubernetes writes quantities (`16`, `128Gi`).
        claim: PersistentVolumeClaim of the run directory (ReadWriteMany where there are several pods), mounted at
            `/run/trilithon`.
        namespace: by default that of kubectl.
        shared_memory: size of `/dev/shm`, through which NCCL and gloo move data inside a pod; counts as memory.
        max_restarts: how often torchrun restarts failed ranks, and JobSet all pods.
        grace_s: seconds after SIGTERM in which a checkpoint must be written.
        environment: variables that the ranks get.
        node_selector: labels that nodes must have.
    """

    name: str
    image: str
    command: tuple[str, ...]
    nodes: int
    nproc_per_node: int
    gpus_per_node: int
    cpu: str
    memory: str
    claim: str
    namespace: str | None = None
    shared_memory: str = "16Gi"
    max_restarts: int = 3
    grace_s: int = 120
    environment: Mapping[str, str] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        longest = len(f"{self.name}-{_JOB}-0-{max(self.nodes - 1, 0)}")
        quantities = {"cpu": self.cpu, "memory": self.memory, "shared_memory": self.shared_memory}
        rules = (
            (_NAME.fullmatch(self.name), "name must be of lower-case letters, digits and dashes", self.name),
            (longest <= _MAX_HOST_LEN, f"name must leave pods' host names at most {_MAX_HOST_LEN} long", self.name),
            (self.namespace is None or _NAME.fullmatch(self.namespace), "namespace must be like name", self.namespace),
            (self.image and not self.image.startswith("-"), "image must be a container image", self.image),
            (self.command, "command must say what torchrun runs", self.command),
            (self.nodes >= 1, "nodes must be at least 1", self.nodes),
            (self.nproc_per_node >= 1, "nproc_per_node must be at least 1", self.nproc_per_node),
            (
                self.gpus_per_node in (0, self.nproc_per_node),
                f"gpus_per_node must be nproc_per_node ({self.nproc_per_node}), or 0 for ranks on CPUs",
                self.gpus_per_node,
            ),
            (_CLAIM.fullmatch(self.claim), "claim must name a PersistentVolumeClaim", self.claim),
            (self.max_restarts >= 0, "max_restarts must be at least 0", self.max_restarts),
            (self.grace_s >= 1, "grace_s must be at least 1", self.grace_s),
            (all(map(_VARIABLE.fullmatch, self.environment)), "environment must name variables", [*self.environment]),
            *(
                (_QUANTITY.fullmatch(value), f"{name} must be a quantity like 16 or 128Gi", value)
                for name, value in quantities.items()
            ),
        )
        wrong = [f"kubernetes {rule}. Given: {value!r}." for holds, rule, value in rules if not holds]
        if wrong:
            raise LaunchError(" ".join(wrong), code="kubernetes_invalid")


def jobset(job: KubernetesJob) -> dict[str, Any]:
    """The JobSet of a job as plain data. Pure."""
    labels = {"app.kubernetes.io/name": "trilithon", "app.kubernetes.io/instance": job.name}
    pod = {
        "restartPolicy": "Never",  # a pod that ends is the JobSet's to replace
        "terminationGracePeriodSeconds": job.grace_s + 30,  # torchrun's own end comes after that of its ranks
        "automountServiceAccountToken": False,
        **({"nodeSelector": dict(job.node_selector)} if job.node_selector else {}),
        "containers": [_container(job)],
        "volumes": [
            {"name": "run", "persistentVolumeClaim": {"claimName": job.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.shared_memory}},
        ],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name, **({"namespace": job.namespace} if job.namespace else {}), "labels": labels},
        "spec": {
            # Names must resolve before a pod is ready: it becomes so only once it has met the others.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": job.max_restarts},
            "successPolicy": {"operator": "All"},
            "replicatedJobs": [
                {
                    "name": _JOB,
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "completions": job.nodes,
                            "parallelism": job.nodes,
                            "backoffLimit": 0,
                            "template": {"metadata": {"labels": dict(labels)}, "spec": pod},
                        }
                    },
                }
            ],
        },
    }


def manifest(job: KubernetesJob) -> str:
    """The JobSet as YAML for `kubectl apply -f`."""
    return yaml.safe_dump(jobset(job), sort_keys=False)


def _container(job: KubernetesJob) -> dict[str, Any]:
    resources = {"cpu": job.cpu, "memory": job.memory}
    resources |= {"nvidia.com/gpu": str(job.gpus_per_node)} if job.gpus_per_node else {}
    # A new store for each attempt: an old one holds the addresses of ranks that are gone (pytorch#135712).
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **job.environment}
    first = f"{job.name}-{_JOB}-0-0.{job.name}"  # pod 0's host name in the headless service, which is called as the set
    return {
        "name": _CONTAINER,
        "image": job.image,
        "command": ["python", "-m", "torch.distributed.run"],
        "args": [
            f"--nnodes={job.nodes}",
            f"--nproc-per-node={job.nproc_per_node}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={first}:{_PORT}",
            f"--rdzv-id={job.name}",
            f"--max-restarts={job.max_restarts}",
            f"--shutdown-timeout={job.grace_s}",
            *map(_literal, job.command),
        ],
        "env": [{"name": name, "value": _literal(value)} for name, value in environment.items()],
        "ports": [{"name": "rendezvous", "containerPort": _PORT, "protocol": "TCP"}],
        "resources": {"limits": resources, "requests": dict(resources)},
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": [{"name": "run", "mountPath": RUN_MOUNT}, {"name": "shm", "mountPath": "/dev/shm"}],
    }


def _literal(text: str) -> str:
    """Kubernetes would replace `$(NAME)`; a doubled dollar stands for itself."""
    return text.replace("$", "$$")
