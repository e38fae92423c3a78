"""What Slurm and Kubernetes are told: the texts themselves, who parses them, and one real Slurm of one node."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from trilithon_parallel.launch import LaunchError
from trilithon_parallel.launch.kubernetes import KubernetesJob, jobset, manifest
from trilithon_parallel.launch.slurm import SCRIPT_FILE, SlurmJob, sbatch_script, submit

from .conftest import STAND_IN, wait_until

GOLDEN = Path(__file__).with_name("golden")
SLURM = SlurmJob(
    name="gpt-1b",
    command=("-m", "my_package.train", "--config", "my file.yaml"),
    run_dir=Path("/shared/runs/gpt-1b"),
    nodes=4,
    nproc_per_node=8,
    gpus_per_node=8,
    cpus_per_node=96,
    time_limit="1-12:00:00",
    partition="gpu",
    account="lab",
    environment={"NCCL_SOCKET_IFNAME": "ib0", "NOTE": "it's $HOME"},
    setup=("module load cuda",),
    directives=("--constraint=h100",),
    python="/shared/venv/bin/python",
)
KUBERNETES = KubernetesJob(
    name="gpt-1b",
    namespace="research",
    image="registry.example/trilithon:0.1.0",
    command=("-m", "my_package.train", "--note", "costs $(MUCH)"),
    nodes=4,
    nproc_per_node=8,
    gpus_per_node=8,
    cpu="96",
    memory="512Gi",
    claim="runs",
    environment={"NCCL_SOCKET_IFNAME": "eth0"},
    node_selector={"gpu": "h100"},
)


def _golden(name: str, text: str) -> None:
    """`GOLDEN=write pytest tests/launch/test_clusters.py` rewrites the files."""
    if os.environ.get("GOLDEN") == "write":
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()


def test_sbatch_script_is_the_golden_one() -> None:
    """Every option of a job is in the script, and nothing changes unseen."""
    _golden("job.sbatch", sbatch_script(SLURM))


def test_jobset_is_the_golden_one() -> None:
    """Every option of a job is in the manifest, and nothing changes unseen."""
    _golden("jobset.yaml", manifest(KUBERNETES))


def test_batch_script_is_shell_and_quotes_what_it_is_given(tmp_path: Path) -> None:
    """bash parses it, and arguments and variables reach the ranks as they were given."""
    fakes = {
        "scontrol": 'echo "node1"',
        "srun": 'shift; exec "$@"',
        "python": 'printf "%s\\n" "NOTE=$NOTE" "$@"',
        "module": "true",
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = sbatch_script(replace(SLURM, python=str(tmp_path / "python")))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-4]"}
    result = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, timeout=30)

    lines = result.stdout.splitlines()
    assert (result.returncode, result.stderr) == (0, "")
    assert lines[0] == "NOTE=it's $HOME"
    assert lines[-4:] == ["-m", "my_package.train", "--config", "my file.yaml"]
    assert "--rdzv-endpoint=node1:20007" in lines


SLURM_MISTAKES = [
    ({"name": "a b"}, "name must be of letters"),
    ({"command": ()}, "command must say what torchrun runs"),
    ({"run_dir": Path("here")}, "run_dir must be an absolute path"),
    ({"nodes": 0}, "nodes must be at least 1. Given: 0"),
    ({"gpus_per_node": 4}, r"gpus_per_node must be nproc_per_node \(8\), or 0 for ranks on CPUs. Given: 4"),
    ({"time_limit": "tomorrow"}, "time_limit must be like 90"),
    ({"environment": {"A B": "1"}}, "environment must name variables"),
    ({"directives": ("--a\nrm -rf /",)}, "directives must be options of sbatch"),
    ({"partition": "gpu\n#SBATCH --uid=0"}, "partition and account must be names"),
]
KUBERNETES_MISTAKES = [
    ({"name": "Upper"}, "name must be of lower-case letters"),
    ({"name": "a" * 60}, "host names at most 63 long"),
    ({"nodes": 0}, "nodes must be at least 1"),
    ({"gpus_per_node": 3}, "gpus_per_node must be nproc_per_node"),
    ({"memory": "much"}, "memory must be a quantity like 16 or 128Gi. Given: 'much'"),
    ({"claim": "../x"}, "claim must name a PersistentVolumeClaim"),
]


@pytest.mark.parametrize(
    ("job", "change", "message"),
    [(SLURM, *case) for case in SLURM_MISTAKES] + [(KUBERNETES, *case) for case in KUBERNETES_MISTAKES],
)
def test_R11_what_a_cluster_cannot_run_is_said(
    job: SlurmJob | KubernetesJob, change: dict[str, Any], message: str
) -> None:
    """A job that cannot be is refused in words before anything is written or submitted."""
    with pytest.raises(LaunchError, match=message):
        replace(job, **change)


def test_R11_no_sbatch_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Slurm the script is written all the same, and the error says what to do with it."""
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(LaunchError, match=r"sbatch is not on this machine. Submit .*job\.sbatch where it is"):
        submit(replace(SLURM, run_dir=tmp_path / "run"))
    assert (tmp_path / "run" / SCRIPT_FILE).exists()


# -- Kubernetes' own schema -----------------------------------------------------------------------------------


def _through_schema(document: dict[str, Any]) -> Any:
    """
    The document after the types that are generated from JobSet's and Kubernetes' OpenAPI schemas.

    They check every type and drop what they do not know: equal to what went in is valid and free of unknown fields.
    """
    models = pytest.importorskip("kubeflow_trainer_api.models")
    return models.JobsetV1alpha2JobSet.from_dict(copy.deepcopy(document)).to_dict()


@pytest.mark.parametrize("job", [KUBERNETES, replace(KUBERNETES, nodes=1, gpus_per_node=0, namespace=None)])
def test_jobset_fits_the_real_schema(job: KubernetesJob) -> None:
    """The manifest, read back from its YAML, passes the schemas of JobSet, Job and Pod unchanged."""
    document = yaml.safe_load(manifest(job))

    assert document == jobset(job)
    assert _through_schema(document) == document


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurePolicies"), {}),
        (("spec", "replicatedJobs", 0, "template", "spec", "backoffLimit"), "none"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "volumez"), []),
        (("spec", "network", "enableDNSHostnames"), "yes"),
    ],
    ids=["unknown", "type", "deep", "bool"],
)
def test_the_schema_finds_what_is_wrong(path: tuple[Any, ...], value: object) -> None:
    """The inverse check: a misspelt field and a wrong type, at any depth, are noticed."""
    document = jobset(KUBERNETES)
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value

    try:
        result = _through_schema(document)
    except ValueError:
        return
    assert result != document


def test_ranks_meet_at_pod_zero_by_its_name_in_the_headless_service() -> None:
    """The rendezvous is JobSet's name of the first pod: SET-JOB-0-0.SET, on a network that publishes it early."""
    document = jobset(KUBERNETES)

    container = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert "--rdzv-endpoint=gpt-1b-node-0-0.gpt-1b:29500" in container["args"]
    assert document["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    assert container["args"][-1] == "costs $$(MUCH)"


# -- a real Slurm ---------------------------------------------------------------------------------------------

_DAEMONS = ("munged", "slurmctld", "slurmd")
_PATH = f"{os.environ['PATH']}:/usr/sbin"
_MISSING = [name for name in (*_DAEMONS, "sbatch") if shutil.which(name, path=_PATH) is None]

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
SlurmctldPort={control_port}
SlurmdPort={node_port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES State=UP
"""


@pytest.fixture
def slurm(free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cluster of this one node, its files in a short temporary directory; gone with the test."""
    if _MISSING or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(_MISSING) or 'Slurm'} (apt-get install slurm-wlm munge)")
    root = Path(tempfile.mkdtemp(prefix="slurm"))
    (root / "state").mkdir()
    (root / "munge.key").write_bytes(os.urandom(1024))
    (root / "munge.key").chmod(0o400)
    values = {"root": root, "host": socket.gethostname().partition(".")[0], "cpus": os.cpu_count()}
    conf = root / "slurm.conf"
    conf.write_text(_CONF.format(**values, control_port=free_port(), node_port=free_port()))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    monkeypatch.setenv("PATH", _PATH)
    ends = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    files = [f"--{name}={root}/munge.{end}" for name, end in ends.items()]
    commands = (["munged", "--foreground", "--force", *files], ["slurmctld", "-D", "-c"], ["slurmd", "-D"])
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        with (root / "daemons.log").open("wb") as log:
            for command in commands:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
                if command[0] == "munged":
                    wait_until((root / "munge.socket").exists, "munged listens")
            wait_until(lambda: "idle" in _say("sinfo", "--noheader", "--format=%T"), "the node is idle")
        yield root
    finally:
        _say("scancel", "--full", "--signal=KILL", "--user=root")
        wait_until(lambda: "RUNNING" not in _say("squeue", "--noheader", "--format=%T"), "no job runs")
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(20)
        shutil.rmtree(root)


def _say(*command: str) -> str:
    """What a command of Slurm prints; nothing while its daemons start."""
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout


def _state(job_id: str) -> str:
    return _say("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job_id}").strip()


def test_real_slurm_checkpoints_requeues_and_finishes(slurm: Path, tmp_path: Path) -> None:
    """
    The submitted job runs under torchrun; the signal that comes before the time limit reaches every rank; the job is
    queued again and its second run finds the checkpoint and finishes. A person's INT ends a job without a second run.

    Inverse: with `kill -s TERM "$step"` in place of scancel, srun kills the ranks and no checkpoint is written.
    """
    job = SlurmJob(
        name="test",
        command=(str(STAND_IN), "train_in_two_jobs", str(tmp_path)),
        run_dir=tmp_path / "run",
        nodes=1,
        nproc_per_node=2,
        gpus_per_node=0,
        time_limit="10",
        environment={"COLOUR": "dark 'blue'"},
        python=sys.executable,
    )
    job_id = submit(job)
    wait_until(lambda: len(list(tmp_path.glob("ready*"))) == 2, "the ranks are under way")
    _say("scancel", "--batch", "--signal=TERM", job_id)
    wait_until(lambda: _state(job_id) == "PENDING", "the job is queued again")
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint*"))
    _say("scontrol", "update", f"jobid={job_id}", "starttime=now")  # Slurm holds a requeued job for two minutes
    wait_until(lambda: _state(job_id) == "COMPLETED", "the second run finishes")

    assert checkpoints == ["checkpoint0", "checkpoint1"]
    assert (tmp_path / "done1").read_text() == "dark 'blue'"


def test_real_slurm_ends_on_INT_without_a_second_run(slurm: Path, tmp_path: Path) -> None:
    """`scancel --batch --signal=INT` writes a checkpoint and ends the job."""
    command = (str(STAND_IN), "train_in_two_jobs", str(tmp_path))
    job = SlurmJob("test", command, tmp_path / "run", 1, 1, 0, time_limit="10", python=sys.executable)
    job_id = submit(job)
    wait_until((tmp_path / "ready0").exists, "the rank is under way")
    _say("scancel", "--batch", "--signal=INT", job_id)
    wait_until(lambda: _state(job_id) == "FAILED", "the job ends")

    assert (tmp_path / "checkpoint0").exists()


def test_real_slurm_refuses_in_its_own_words(slurm: Path, tmp_path: Path) -> None:
    """What sbatch says of a job that it refuses is passed on."""
    job = SlurmJob("test", ("train.py",), tmp_path, 1, 1, 0, time_limit="10", partition="gpu")

    with pytest.raises(LaunchError, match=r"sbatch refused .*invalid partition"):
        submit(job)
