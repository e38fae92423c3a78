"""Gangs: who may start one, how it ends, what a cluster is told instead."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trilithon_finetune.jobs import gang
from trilithon_finetune.jobs.clusters import Nodes, kubernetes_job, slurm_job
from trilithon_finetune.jobs.jobfile import revoke_lease, write_lease
from trilithon_finetune.jobs.launch import Exit, LaunchHandle, LaunchSpec, LocalLauncher
from trilithon_parallel.launch.kubernetes import manifest
from trilithon_parallel.launch.slurm import sbatch_script

from .conftest import gone, wait_until

GOLDEN = Path(__file__).with_name("golden")
SLEEP = "import os, time; open(f'rank{os.environ[\"RANK\"]}', 'w').write(str(os.getpid())); time.sleep(600)"


def _spec(directory: Path, code: str, *, nproc: int = 1, token: int = 7) -> LaunchSpec:
    return LaunchSpec(
        name="train",
        command=(sys.executable, "-c", f"import os; os.chdir({str(directory)!r})\n{code}"),
        nproc=nproc,
        directory=directory,
        lock=directory / "lock",
        lease=directory / "lease",
        token=token,
        environment={"TRILITHON_JOB_ID": "ftjob-x"},
        grace_s=10.0,
    )


def _end(handle: LaunchHandle) -> Exit:
    wait_until(lambda: handle.poll() is not None, "the gang ends")
    ended = handle.poll()
    assert ended is not None
    return ended


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """An attempt's directory whose lease has token 7; nothing that was started there stays."""
    write_lease(tmp_path, 7)
    yield tmp_path
    for path in tmp_path.glob("rank?"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(path.read_text()), signal.SIGKILL)


def test_ranks_have_their_environment_and_a_log_each(directory: Path) -> None:
    """torchrun's variables and ours; what a rank prints is in its own file."""
    code = "print(os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['TRILITHON_JOB_ID'])"
    ended = _end(LocalLauncher().start(_spec(directory, code, nproc=2)))

    assert ended == Exit(code=0)
    assert [(directory / f"rank-{rank}.log").read_text() for rank in (0, 1)] == ["0 2 ftjob-x\n", "1 2 ftjob-x\n"]


def test_first_failed_rank_is_named(directory: Path) -> None:
    """The exit code and the number of the rank that is to blame."""
    ended = _end(LocalLauncher().start(_spec(directory, "import sys; sys.exit(int(os.environ['RANK']) * 5)", nproc=2)))

    assert (ended.code, ended.rank) == (5, 1)


@pytest.mark.parametrize("change", ["revoked", "another"])
def test_R10_nothing_starts_without_the_lease(directory: Path, change: str) -> None:
    """
    A worker that was slow starts nothing once another has the job.

    Inverse: without the look at the lease file in `gang.main`, the rank runs.
    """
    revoke_lease(directory) if change == "revoked" else write_lease(directory, 8)
    ended = _end(LocalLauncher().start(_spec(directory, "open('ran', 'w')")))

    assert ended.code == gang.EXIT_STALE
    assert not (directory / "ran").exists()


def test_R10_nothing_starts_beside_a_running_gang(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A second gang of the same job gives up as long as a process of the first lives.

    Inverse: without `pass_fds` the lock is free as soon as the first gang's own process is gone.
    """
    first = LocalLauncher().start(_spec(directory, SLEEP))
    wait_until((directory / "rank0").exists, "the rank runs")
    code = f"import sys; from trilithon_finetune.jobs import gang; gang._LOCK_S = 0.2; sys.exit(gang._take({_open}))"
    lock = subprocess.run([sys.executable, "-c", code, str(directory / "lock")], timeout=60, check=False)
    first.kill()

    assert lock.returncode == 0  # False: not taken
    assert LocalLauncher().clear(directory / "lock", limit_s=0.0, check=lambda: None)


_open = "__import__('os').open(sys.argv[1], 2)"


def test_R10_gang_dies_with_the_process_that_started_it(directory: Path) -> None:
    """SIGKILL of the worker ends gang and ranks, and the lock is free."""
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from jobs import test_launch as t; from trilithon_finetune.jobs.launch import LocalLauncher;"
        "LocalLauncher().start(t._spec(Path(sys.argv[1]), t.SLEEP, nproc=2)); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(directory), str(Path(__file__).parents[1])])
    try:
        wait_until(lambda: (directory / "rank0").exists() and (directory / "rank1").exists(), "the ranks run")
    finally:
        parent.kill()
        parent.wait()
    pids = [int((directory / f"rank{rank}").read_text()) for rank in (0, 1)]

    wait_until(lambda: all(map(gone, pids)), "the ranks are gone")


def test_R10_clear_kills_what_was_left_behind(directory: Path) -> None:
    """Whoever takes a job over ends its processes, and asks before each blow whether it still may."""
    handle = LocalLauncher().start(_spec(directory, SLEEP))
    wait_until((directory / "rank0").exists, "the rank runs")
    pid = int((directory / "rank0").read_text())
    asked: list[int] = []

    assert LocalLauncher().clear(directory / "lock", limit_s=60.0, check=lambda: asked.append(1))
    wait_until(lambda: gone(pid), "the rank is gone")
    assert asked
    assert _end(handle).code == 128 + signal.SIGKILL


def test_clear_spares_a_stranger_with_the_same_pid(directory: Path) -> None:
    """A lock file that names a process which started at another time kills nobody."""
    host, pid, start = gang.identity(os.getpid()).split()
    (directory / "lock").write_text(f"{host} {pid} {int(start) - 1}")
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(directory / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    cleared = LocalLauncher().clear(directory / "lock", limit_s=0.1, check=lambda: None)
    holder.communicate()

    assert not cleared


def _golden(name: str, text: str) -> None:
    """`GOLDEN=write pytest tests/jobs/test_launch.py` rewrites the files."""
    if os.environ.get("GOLDEN") == "write":
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()


def _cluster_spec() -> LaunchSpec:
    job_dir = Path("/shared/finetune/jobs/ftjob-0k2j4h5g6f7d8s9a0q1w")
    return LaunchSpec(
        name="train",
        command=("python", "-m", "trilithon_finetune.train", str(job_dir), "--attempt", "2"),
        nproc=16,
        directory=job_dir / "attempts" / "2",
        lock=job_dir / "lock",
        lease=job_dir / "attempts" / "2" / "lease",
        token=5,
        environment={
            "TRILITHON_JOB_ID": job_dir.name,
            "TRILITHON_ATTEMPT": "2",
            "TRILITHON_LEASE_FILE": str(job_dir / "attempts" / "2" / "lease"),
            "TRILITHON_RUN_DIR": str(job_dir / "run"),
        },
        grace_s=30.0,
    )


def test_sbatch_script_of_a_job_is_the_golden_one() -> None:
    """Slurm runs the gang of one attempt and never queues it again by itself."""
    nodes = Nodes(nodes=2, gpus_per_node=8, time_limit="12:00:00")
    spec = _cluster_spec()
    job = slurm_job(spec, job_dir=spec.directory.parents[1], attempt=2, nodes=nodes)

    _golden("job.sbatch", sbatch_script(job))


def test_jobset_of_a_job_is_the_golden_one() -> None:
    """Kubernetes sees the store where the claim is mounted."""
    nodes = Nodes(nodes=2, gpus_per_node=8, cpu="96", memory="512Gi")
    spec = _cluster_spec()
    job = kubernetes_job(
        spec,
        store=Path("/shared/finetune"),
        job_dir=spec.directory.parents[1],
        attempt=2,
        nodes=nodes,
        image="registry.example/trilithon:0.1.0",
        claim="finetune",
    )

    _golden("jobset.yaml", manifest(job))


def test_nodes_divide_the_ranks() -> None:
    """A gang that does not fit its nodes is refused with both numbers."""
    with pytest.raises(ValueError, match=r"nodes must divide the job's 16 ranks\. Given: 3"):
        Nodes(nodes=3).per_node(16)
