"""
Train on a Slurm cluster: a batch script as text, and its submission.

One torchrun a node under srun; the ranks find each other at the first node. Before the time limit Slurm signals the
script, which hands SIGTERM to the steps (srun itself would kill them), so that the ranks write a checkpoint and end;
then the job is queued again and goes on from there. Nothing but the script reaches the cluster: no container, no
scheduler of our own.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trilithon_parallel.launch import LaunchError

SCRIPT_FILE = "job.sbatch"
_TIME = re.compile(r"(\d+-\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2})")
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SUBMIT_S = 60.0

_BODY = """\
set -euo pipefail
{setup}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
# A new store for each attempt: an old one holds the addresses of ranks that are gone (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# TERM comes before the time limit: write a checkpoint and queue again. INT is a person's: write one and end.
asked=
stop() {{
  asked=$1
  scancel --signal=TERM "$SLURM_JOB_ID" || true
}}
trap 'stop TERM' TERM
trap 'stop INT' INT

srun --kill-on-bad-exit=1 {launcher} &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a trap cuts wait short
  code=0
  wait "$step" || code=$?
done
{requeue}exit "$code"
"""

_REQUEUE = """\
if [ "$asked" = TERM ] && [ "$code" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
"""


@dataclass(frozen=True)
class SlurmJob:
    """
    A training job as Slurm is told of it.

    Args:
        name: of the job: letters, digits, dot, dash, underscore.
        command: what torchrun runs: `("-m", "package.module", "--flag")` or a script and its arguments.
        run_dir: absolute directory of the run, on a file system that all nodes share.
        nodes, nproc_per_node: machines, and ranks on each.
        gpus_per_node: 0 for ranks on CPUs.
        cpus_per_node: cores; by default what the partition gives.
        time_limit: in Slurm's words: minutes, `hours:minutes:seconds`, `days-hours:minutes:seconds`.
        partition, account: by default the user's own.
        max_restarts: how often torchrun starts all ranks again after a failure.
        grace_s: seconds before the time limit in which a checkpoint must be written.
        requeue: queue again when the time limit ended it; False: end there.
        environment: variables that the ranks get.
        setup: lines of shell that come first (`module load ...`, `source .../activate`).
        directives: further options of sbatch (`--constraint=h100`).
        python: interpreter on the nodes.
    """

    name: str
    command: tuple[str, ...]
    run_dir: Path
    nodes: int
    nproc_per_node: int
    gpus_per_node: int
    time_limit: str
    cpus_per_node: int | None = None
    partition: str | None = None
    account: str | None = None
    max_restarts: int = 3
    grace_s: int = 120
    requeue: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    directives: tuple[str, ...] = ()
    python: str = "python"

    def __post_init__(self) -> None:
        names = [text for text in (self.partition, self.account) if text is not None]
        plain = all(text.isprintable() and text.startswith("--") for text in self.directives)
        rules = (
            (_NAME.fullmatch(self.name), "name must be of letters, digits, dot, dash and underscore", self.name),
            (self.command, "command must say what torchrun runs", self.command),
            (self.run_dir.is_absolute(), "run_dir must be an absolute path, shared by all nodes", str(self.run_dir)),
            (self.nodes >= 1, "nodes must be at least 1", self.nodes),
            (self.nproc_per_node >= 1, "nproc_per_node must be at least 1", self.nproc_per_node),
            ((self.cpus_per_node or 1) >= 1, "cpus_per_node must be at least 1", self.cpus_per_node),
            (
                self.gpus_per_node in (0, self.nproc_per_node),
                f"gpus_per_node must be nproc_per_node ({self.nproc_per_node}), or 0 for ranks on CPUs",
                self.gpus_per_node,
            ),
            (_TIME.fullmatch(self.time_limit), "time_limit must be like 90, 12:00:00 or 2-00:00:00", self.time_limit),
            (self.max_restarts >= 0, "max_restarts must be at least 0", self.max_restarts),
            (0 < self.grace_s < 65536, "grace_s must be from 1 to 65535 (Slurm's own limit)", self.grace_s),
            (all(map(_VARIABLE.fullmatch, self.environment)), "environment must name variables", [*self.environment]),
            (all(map(_NAME.fullmatch, names)), "partition and account must be names", names),
            (plain, "directives must be options of sbatch like --constraint=h100", self.directives),
        )  # fmt: skip
        wrong = [f"slurm {rule}. Given: {value!r}." for holds, rule, value in rules if not holds]
        if wrong:
            raise LaunchError(" ".join(wrong), code="slurm_invalid")


def sbatch_script(job: SlurmJob) -> str:
    """The batch script of a job. Pure: it says what will run, and can be kept and changed by hand."""
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        *([f"--cpus-per-task={job.cpus_per_node}"] if job.cpus_per_node else []),
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        f"--time={job.time_limit}",
        *([f"--partition={job.partition}"] if job.partition else []),
        *([f"--account={job.account}"] if job.account else []),
        f"--output={job.run_dir}/slurm-%j.out",
        "--open-mode=append",
        f"--signal=B:TERM@{job.grace_s}",
        "--requeue" if job.requeue else "--no-requeue",
        *job.directives,
    ]
    launcher = [
        f"{shlex.quote(job.python)} -m torch.distributed.run",
        f"--nnodes={job.nodes} --nproc-per-node={job.nproc_per_node}",
        '--rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID"',
        f"--max-restarts={job.max_restarts} --shutdown-timeout={job.grace_s - job.grace_s // 8}",
        shlex.join(job.command),
    ]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    body = _BODY.format(
        setup="\n".join([*job.setup, *exports]),
        launcher=" \\\n  ".join(launcher),
        requeue=_REQUEUE if job.requeue else "",
    )
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {option}" for option in options), "", body])


def submit(job: SlurmJob) -> str:
    """
    Write the script into the run directory and submit it; the job's id.

    Raises:
        LaunchError: `slurm_missing`, there is no sbatch here; `slurm_refused`, with what it said.
    """
    job.run_dir.mkdir(parents=True, exist_ok=True)
    path = job.run_dir / SCRIPT_FILE
    path.write_text(sbatch_script(job), encoding="utf-8")
    try:
        result = subprocess.run(
            ["sbatch", "--parsable", str(path)], capture_output=True, text=True, timeout=_SUBMIT_S, check=False
        )
    except FileNotFoundError:
        raise LaunchError(
            "slurm: the command sbatch is not on this machine.",
            code="slurm_missing",
            hint=f"Submit {path} where it is: sbatch {path}",
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"slurm: sbatch did not answer within {_SUBMIT_S:g} s.", code="slurm_refused", hint="Is slurmctld up?"
        ) from None
    if result.returncode != 0:
        said = result.stderr.strip() or f"exit code {result.returncode}"
        raise LaunchError(f"slurm: sbatch refused {path}: {said}", code="slurm_refused")
    return result.stdout.strip().partition(";")[0]  # "id" or "id;cluster"
