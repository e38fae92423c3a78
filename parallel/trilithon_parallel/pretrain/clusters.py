"""A pretraining run as a job of a cluster: what its configuration file says, in the words of Slurm or Kubernetes."""

from __future__ import annotations

from pathlib import Path

from trilithon_parallel.config import ModelError
from trilithon_parallel.launch import LaunchError
from trilithon_parallel.launch.kubernetes import KubernetesJob, manifest
from trilithon_parallel.launch.slurm import SlurmJob, sbatch_script
from trilithon_parallel.launch.slurm import submit as submit_job
from trilithon_parallel.pretrain.config import PretrainConfig

__all__ = ["LaunchError", "kubernetes_manifest", "slurm_script", "submit"]

_MODULE = "trilithon_parallel.pretrain"


def slurm_script(path: Path, settings: PretrainConfig, *, num_ranks: int) -> str:
    """
    The batch script that `submit` gives to Slurm.

    Raises:
        ModelError: `config_invalid`, there is no section launch.slurm, or nodes do not divide the ranks.
        LaunchError: `slurm_invalid`, a value that Slurm would not take.
    """
    return sbatch_script(_slurm(path, settings, num_ranks))


def submit(path: Path, settings: PretrainConfig, *, num_ranks: int) -> str:
    """Submit the run; the job's id. Raises as `slurm_script` does, and LaunchError where sbatch refuses it."""
    return submit_job(_slurm(path, settings, num_ranks))


def kubernetes_manifest(settings: PretrainConfig, *, num_ranks: int) -> str:
    """
    The JobSet, as YAML.

    Raises:
        ModelError: `config_invalid`, there is no section launch.kubernetes, or nodes do not divide the ranks.
        LaunchError: `kubernetes_invalid`, a value that Kubernetes would not take.
    """
    section = settings.launch.kubernetes
    if section is None:
        raise _missing("kubernetes", "image and claim")
    return manifest(
        KubernetesJob(
            name=settings.run.directory.name.lower().replace("_", "-"),
            image=section.image,
            command=("-m", _MODULE, section.config),
            nodes=section.nodes,
            nproc_per_node=_per_node(num_ranks, section.nodes, "kubernetes"),
            gpus_per_node=section.gpus_per_node,
            cpu=section.cpu,
            memory=section.memory,
            claim=section.claim,
            namespace=section.namespace,
            max_restarts=settings.run.max_restarts,
            environment=section.environment,
            node_selector=section.node_selector,
        )
    )


def _slurm(path: Path, settings: PretrainConfig, num_ranks: int) -> SlurmJob:
    section = settings.launch.slurm
    if section is None:
        raise _missing("slurm", "time_limit")
    return SlurmJob(
        name=settings.run.directory.name,
        command=("-m", _MODULE, str(path.resolve())),
        run_dir=settings.run.directory.resolve(),
        nodes=section.nodes,
        nproc_per_node=_per_node(num_ranks, section.nodes, "slurm"),
        gpus_per_node=section.gpus_per_node,
        time_limit=section.time_limit,
        cpus_per_node=section.cpus_per_node,
        partition=section.partition,
        account=section.account,
        max_restarts=settings.run.max_restarts,
        requeue=section.requeue,
        environment=section.environment,
        setup=tuple(section.setup),
        directives=tuple(section.directives),
        python=section.python,
    )


def _per_node(num_ranks: int, nodes: int, name: str) -> int:
    if num_ranks % nodes:
        raise ModelError(
            f"launch.{name}.nodes must divide the layout's {num_ranks} ranks. Given: {nodes}.",
            code="config_invalid",
            hint=f"Allowed: {', '.join(str(n) for n in range(1, num_ranks + 1) if num_ranks % n == 0)}.",
        )
    return num_ranks // nodes


def _missing(name: str, fields: str) -> ModelError:
    return ModelError(
        f"configuration has no section launch.{name}, which --launch {name} needs.",
        code="config_invalid",
        hint=f"Give at least {fields} there.",
    )
