"""Workers, ranks, disks and databases that fail at any moment: every job ends once, and no attempt meets another."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from trilithon_finetune.jobs.records import Job
from trilithon_finetune.jobs.states import JobState
from trilithon_server.catalog import Catalog

from .conftest import TENANT, Cluster, Store, check_history, gone, wait_until

S = JobState
SHORT = {"lease_s": 1.5, "renew_s": 0.3, "max_attempts": 1000, "backoff_s": 0.05}


def _blocks(store: Store, job: Job, phase: str, attempt: int = 1) -> bool:
    return ["blocked", phase, str(attempt)] in [mark[:3] for mark in store.marks(job)]


def _checkpoints_are_whole(store: Store, job: Job) -> None:
    run = store.jobs.paths.job(job.id).run
    for path in run.glob("step_*"):
        assert (path / "weights").read_text() == f"weights of step {int(path.name[5:])}"
    assert (run / f"step_{int((run / 'latest').read_text()):08d}").is_dir()


@pytest.mark.parametrize("phase", ["validate", "prepare", "train", "export", "verify"])
def test_R10_worker_killed_in_every_phase(store: Store, phase: str) -> None:
    """
    SIGKILL of the worker in each phase: its processes die with it, another worker takes the job to its end.

    Inverse seen red: without the death signal in `gang.py` the phase's processes outlive their worker.
    """
    job = store.create(options={"steps": 4, phase: {"block": True, "attempts": [1]}}, parallel={"dp": 2})
    worker = store.spawn(**SHORT)
    wait_until(lambda: _blocks(store, job, phase), f"{phase} blocks")
    pids = [int(mark[4]) for mark in store.marks(job) if mark[0] == "blocked"]
    worker.kill()
    worker.wait()
    wait_until(lambda: all(map(gone, pids)), "the phase's processes are gone")
    with store.working(**SHORT):
        done = store.wait(job)

    check_history(store, job)
    _checkpoints_are_whole(store, job)
    assert (done.state, done.attempt, done.failures) == (S.SUCCEEDED, 2, 1)
    assert store.kinds(job).count("lease_lost") == 1


def _busy(workers: list[subprocess.Popen[bytes]]) -> list[int]:
    """Numbers of the workers that have a process of some phase."""
    found = []
    for number, worker in enumerate(workers):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(worker.pid).children():
                found.append(number)
    return found


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_R10_killed_at_random_moments(store: Store, kills: int) -> None:
    """
    SIGKILL of workers and of any of their processes at random moments of their work, 8 on each database (100 in the
    slow run).

    Inverse seen red: without the death signal, the job's lock and the clearing in `recover`, of which each one is
    enough, processes of two attempts overlap.
    """
    chance = random.Random(kills)
    slow = {"steps": 8, "step_s": 0.5, "every": 4}  # ranks that were left behind would outlive the lease
    jobs = [store.create(options=slow, parallel={"dp": 2}) for _ in range(2)]
    workers = [store.spawn(**SHORT) for _ in range(2)]
    for _ in range(kills):
        if all(store.get(job).finished for job in jobs):
            jobs.append(store.create(options=slow))
        wait_until(lambda: _busy(workers), "a worker is at work")
        time.sleep(chance.uniform(0.0, 0.5))
        number = chance.choice(_busy(workers) or range(2))
        try:
            below = psutil.Process(workers[number].pid).children(recursive=True)
        except psutil.NoSuchProcess:
            below = []
        if below and chance.random() < 0.5:
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(below).kill()
            continue
        workers[number].kill()
        workers[number].wait()
        workers[number] = store.spawn(**SHORT)
    for job in jobs:
        assert store.wait(job).state is S.SUCCEEDED, store.get(job).error

    for job in jobs:
        check_history(store, job)
        _checkpoints_are_whole(store, job)
        assert Catalog(store.jobs.paths.models).get(job.name, tenant=TENANT) is not None


def test_R10_stopped_worker_changes_nothing_when_it_wakes(store: Store) -> None:
    """
    A worker that is stopped (SIGSTOP) past its lease loses the job: its ranks are killed, and while the next attempt is
    at work the old worker, awake again, writes nothing and starts nothing.

    Inverses seen red: with the token compared neither in `Queue` nor in `moves.change`, of which each is enough, the
    old worker sends the job back to the queue beneath the new one; where `recover` leaves the old ranks alone, the next
    attempts end on the job's lock.
    """
    job = store.create(options={"steps": 4, "train": {"block": True}}, parallel={"dp": 2})
    old = store.spawn(**SHORT)
    wait_until(lambda: _blocks(store, job, "train"), "training blocks")
    pids = [int(mark[4]) for mark in store.marks(job) if mark[0] == "blocked"]
    wait_until(lambda: _stopped_between_writes(store, old), "the worker stops between two writes")
    with store.working(**SHORT):
        wait_until(lambda: _blocks(store, job, "train", 2), "the next attempt trains")
        events = store.events(job)
        os.kill(old.pid, signal.SIGCONT)
        other = store.create()
        assert store.wait(other).state is S.SUCCEEDED  # by the old worker: the new one has its hands full
        assert store.events(job) == events
        store.go(job)
        done = store.wait(job)

    check_history(store, job)
    assert (done.state, done.attempt) == (S.SUCCEEDED, 2)
    assert all(map(gone, pids))


def _stopped_between_writes(store: Store, worker: subprocess.Popen[bytes]) -> bool:
    """Stop it; where it holds SQLite's one lock for writers, which would keep out everyone, let it go on for now."""
    os.kill(worker.pid, signal.SIGSTOP)
    if store.url is not None:
        return True
    with contextlib.closing(sqlite3.connect(store.jobs.paths.database, timeout=0)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            os.kill(worker.pid, signal.SIGCONT)
            return False
        connection.rollback()
    return True


def test_R10_killed_rank_costs_one_attempt(store: Store) -> None:
    """SIGKILL of one rank ends its gang; the cause names it."""
    job = store.create(options={"steps": 2, "train": {"block": True, "attempts": [1]}}, parallel={"dp": 2})
    with store.working(**SHORT):
        wait_until(lambda: sum(mark[0] == "blocked" for mark in store.marks(job)) == 2, "both ranks block")
        os.kill(
            next(int(mark[4]) for mark in store.marks(job) if mark[0] == "blocked" and mark[3] == "1"), signal.SIGKILL
        )
        done = store.wait(job)

    lost = next(event for event in store.events(job) if event.kind == "attempt_failed")
    check_history(store, job)
    assert (done.state, done.attempt) == (S.SUCCEEDED, 2)
    assert (lost.data["code"], lost.data["rank"]) == ("rank_lost", 1)


def test_R10_several_workers_never_run_one_job_twice(store: Store) -> None:
    """Three workers and six jobs: each job has one attempt, and every worker is content."""
    jobs = [store.create(options={"steps": 2}) for _ in range(6)]
    with store.working(slots=2), store.working(slots=2), store.working():
        ends = [store.wait(job) for job in jobs]

    for job in jobs:
        check_history(store, job)
    assert {(job.state, job.attempt) for job in ends} == {(S.SUCCEEDED, 1)}


def test_R10_sigterm_of_a_worker_process_gives_back(store: Store) -> None:
    """SIGTERM ends the process with 0, its job has written a checkpoint and waits."""
    job = store.create(options={"steps": 100, "step_s": 0.05, "every": 1000})
    worker = store.spawn()
    store.wait(job, S.RUNNING)
    worker.terminate()
    code = worker.wait(60)

    assert (code, store.get(job).state, store.get(job).failures) == (0, S.QUEUED, 0)
    assert (store.jobs.paths.job(job.id).run / "latest").exists()
    assert store.kinds(job)[-2:] == ["checkpoint_saved", "queued"]


def test_R10_postgresql_restarted_while_a_job_runs(make_store: Callable[..., Store], cluster: Cluster) -> None:
    """
    The database is away while ranks run: they go on, and the worker writes the rest when it is back.

    Inverse seen red: without `except Unavailable` in `Lease.beat` and `JobRun._catch_up` the attempt is lost.
    """
    store = make_store(cluster.database())
    job = store.create(options={"steps": 30, "step_s": 0.05})
    with store.working(lease_s=120.0):
        store.wait(job, S.RUNNING)
        cluster.stop()
        time.sleep(1.0)  # time passes for the worker, which must not let go
        cluster.start()
        done = store.wait(job)

    check_history(store, job)
    assert (done.state, done.attempt, done.progress.step) == (S.SUCCEEDED, 1, 30)


def test_R10_database_away_past_the_lease_ends_the_gang(make_store: Callable[..., Store], cluster: Cluster) -> None:
    """A worker that cannot renew its lease in time stops its ranks, since another may start them anew."""
    store = make_store(cluster.database())
    job = store.create(options={"steps": 2, "train": {"block": True, "attempts": [1]}})
    with store.working(lease_s=1.0, renew_s=0.2):
        wait_until(lambda: _blocks(store, job, "train"), "training blocks")
        pids = [int(mark[4]) for mark in store.marks(job) if mark[0] == "blocked"]
        cluster.stop()
        try:
            wait_until(lambda: all(map(gone, pids)), "the ranks are gone")
        finally:
            cluster.start()
        done = store.wait(job)

    check_history(store, job)
    assert done.state is S.SUCCEEDED
    assert done.attempt >= 2  # a lease of one second may be lost again where the host is busy


def test_R10_sqlite_locked_by_another_process_for_seconds(make_store: Callable[..., Store]) -> None:
    """A lock that outlasts the busy timeout is waited out; no attempt is lost."""
    store = make_store(None)
    job = store.create(options={"steps": 20, "step_s": 0.05})
    with store.working():
        store.wait(job, S.RUNNING)
        with contextlib.closing(sqlite3.connect(store.jobs.paths.database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            time.sleep(6.0)  # SQLite's busy timeout is 5 s
            other.execute("ROLLBACK")
        done = store.wait(job)

    check_history(store, job)
    assert (done.state, done.attempt) == (S.SUCCEEDED, 1)


@pytest.mark.skipif(os.getuid() != 0, reason="a small file system can only be mounted by root")
def test_R10_full_disk_pauses_and_leaves_the_last_checkpoint(make_store: Callable[..., Store]) -> None:
    """On a full disk the job rests with its last checkpoint whole, and goes on when there is room again."""
    store = make_store(None)
    jobs_dir = store.jobs.paths.root / "jobs"
    jobs_dir.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(jobs_dir)], capture_output=True).returncode:
        pytest.skip("mount of a tmpfs is not allowed here")
    try:
        job = store.create(options={"steps": 40, "step_s": 0.05, "every": 1})
        with store.working():
            paused = _fill_when_running(store, job, jobs_dir)
            (jobs_dir / "ballast").unlink()
            store.jobs.resume(job.id, tenant=TENANT)
            done = store.wait(job)
        _checkpoints_are_whole(store, job)
    finally:
        subprocess.run(["umount", "-l", str(jobs_dir)], check=True)

    assert paused.state is S.PAUSED
    assert paused.error is not None
    assert paused.error.code == "disk_full"
    assert done.state is S.SUCCEEDED


def _fill_when_running(store: Store, job: Job, directory: Path) -> Job:
    store.wait(job, S.RUNNING)
    with contextlib.suppress(OSError), (directory / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    return store.wait(job, S.PAUSED)
