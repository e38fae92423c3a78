"""
A job's training gang in the words of a cluster: Slurm's batch script, Kubernetes' JobSet.

Neither queues the job again by itself: an attempt that is lost goes back to the job store, whose next attempt
continues from the last checkpoint. The store's directory must be one that all nodes share.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trilithon_finetune.jobs.launch import LaunchSpec
from trilithon_parallel.launch.kubernetes import RUN_MOUNT, KubernetesJob
from trilithon_parallel.launch.slurm import SlurmJob

_MODULE = "trilithon_finetune.train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """Machines of a gang. `time_limit` in Slurm's words; `cpu` and `memory` of a node in Kubernetes'."""

    nodes: int = 1
    gpus_per_node: int = 0
    time_limit: str = "24:00:00"
    cpu: str = "8"
    memory: str = "32Gi"

    def per_node(self, num_ranks: int) -> int:
        """Ranks on each node. Raises ValueError where they do not divide."""
        if num_ranks % self.nodes:
            raise ValueError(f"nodes must divide the job's {num_ranks} ranks. Given: {self.nodes}.")
        return num_ranks // self.nodes


def slurm_job(spec: LaunchSpec, *, job_dir: Path, attempt: int, nodes: Nodes) -> SlurmJob:
    """What `trilithon_parallel.launch.slurm` writes the batch script from. Raises LaunchError, ValueError."""
    return SlurmJob(
        name=f"{job_dir.name}-{attempt}",
        command=("-m", _MODULE, str(job_dir), "--attempt", str(attempt)),
        run_dir=spec.directory,
        nodes=nodes.nodes,
        nproc_per_node=nodes.per_node(spec.nproc),
        gpus_per_node=nodes.gpus_per_node,
        time_limit=nodes.time_limit,
        max_restarts=0,
        grace_s=max(1, round(spec.grace_s)),
        requeue=False,
        environment=spec.environment,
    )


def kubernetes_job(
    spec: LaunchSpec, *, store: Path, job_dir: Path, attempt: int, nodes: Nodes, image: str, claim: str
) -> KubernetesJob:
    """
    What `trilithon_parallel.launch.kubernetes` writes the JobSet from. Raises LaunchError, ValueError.

    Args:
        store: directory that the PersistentVolumeClaim `claim` holds; pods see it at `/run/trilithon`.
    """
    inside = {str(store): RUN_MOUNT}
    environment = {name: _moved(value, inside) for name, value in spec.environment.items()}
    return KubernetesJob(
        name=f"{job_dir.name}-{attempt}",
        image=image,
        command=("-m", _MODULE, _moved(str(job_dir), inside), "--attempt", str(attempt)),
        nodes=nodes.nodes,
        nproc_per_node=nodes.per_node(spec.nproc),
        gpus_per_node=nodes.gpus_per_node,
        cpu=nodes.cpu,
        memory=nodes.memory,
        claim=claim,
        max_restarts=0,
        grace_s=max(1, round(spec.grace_s)),
        environment=environment,
    )


def _moved(value: str, inside: dict[str, str]) -> str:
    for outer, inner in inside.items():
        if PurePosixPath(value).is_relative_to(outer):
            return str(PurePosixPath(inner) / PurePosixPath(value).relative_to(outer))
    return value
