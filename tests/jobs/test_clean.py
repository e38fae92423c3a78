"""What a store need not keep: what goes, what never does, and what a cleaning leaves that was killed half-way."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from trilithon_finetune.config import JobConfig
from trilithon_finetune.errors import FinetuneError
from trilithon_finetune.jobs.clean import clean
from trilithon_finetune.jobs.database import Database
from trilithon_finetune.jobs.records import Job
from trilithon_finetune.jobs.schema import jobs as job_rows
from trilithon_finetune.jobs.service import Jobs, StoreLimits
from trilithon_finetune.paths import StorePaths
from trilithon_server.catalog import Catalog, CatalogEntry

from .conftest import TENANT, Store, wait_until

NOW = "checkpoint_days: 0\nprepared_days: 0\nattempts: 1\n"
DATA = ("a" * 64, "b" * 64, "c" * 64)

_KILLED = """
import os, shutil, sys
from pathlib import Path
from trilithon_finetune.jobs.clean import clean
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.paths import StorePaths
left = int(sys.argv[2])
def counted(function):
    def call(*arguments, **keywords):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return function(*arguments, **keywords)
    return call
jobs = Jobs(None, StorePaths(Path(sys.argv[1])))
Path.rename, os.unlink, os.rmdir = counted(Path.rename), counted(os.unlink), counted(os.rmdir)
clean(jobs)
"""


@pytest.fixture
def old(make_store: Callable[..., Store], database_url: str | None) -> Store:
    """A store on each database whose policy keeps nothing that is not needed."""
    store = make_store(database_url)
    store.jobs.paths.policy.write_text(NOW)
    return store


def _done(store: Store, *, best: int = 2, steps: int = 8, **fields: Any) -> Job:
    """A job that has succeeded, with checkpoints of every second step, of which `best` was exported."""
    job = store.create(options={"steps": steps, "every": 2}, **fields)
    store.work()
    done = store.get(job)
    assert done.state == "succeeded"
    run = store.jobs.paths.job(job.id).run
    for path in run.glob("step_*"):
        (path / "manifest.json").write_text(json.dumps({"state": {"best": {"step": best}}}))
    result = {"export": {"step": best}, "verify": {}}
    with store.jobs.database.write() as connection:
        connection.execute(update(job_rows).where(job_rows.c.id == job.id).values(result=result))
    return store.get(job)


def _steps(store: Store, job: Job) -> list[int]:
    return sorted(int(path.name[5:]) for path in store.jobs.paths.job(job.id).run.glob("step_*"))


def _servable(store: Store, job: Job) -> list[int]:
    page = store.jobs.checkpoints(job.id, tenant=TENANT, limit=100)
    return sorted(item.step for item in page.data if item.servable)


def _serve(store: Store, job: Job, path: Path, name: str) -> None:
    entry = CatalogEntry(
        name=name, kind="adapter", base="base", base_digest="b", path=path.resolve(), digest=name, tenant=TENANT
    )
    Catalog(store.jobs.paths.models).register(entry)


def test_checkpoints_that_nothing_needs_go(old: Store) -> None:
    """The last, the best and what is served stay; rows say what is gone; a dry run tells the same and takes nothing."""
    job = _done(old, best=4, steps=10)
    run = old.jobs.paths.job(job.id).run
    _serve(old, job, run / "step_00000006", f"{job.name}:step-6")

    told = clean(old.jobs, dry_run=True)
    before = _steps(old, job)
    gone = clean(old.jobs)

    assert told == gone
    assert before == [2, 4, 6, 8, 10]
    assert _steps(old, job) == _servable(old, job) == [4, 6, 10]
    assert [(item.kind, item.name[-13:]) for item in gone] == [("checkpoint", f"step_0000000{step}") for step in (2, 8)]
    assert all(item.bytes > 0 for item in gone)
    assert not list(run.glob(".*"))
    assert clean(old.jobs) == []


def test_a_deployed_job_keeps_its_export(old: Store) -> None:
    """A result that a model of the catalogue and an alias stand on is there after any cleaning, and so is its job."""
    job = _done(old, deploy={"alias": "faq"})
    export = old.jobs.paths.job(job.id).export
    (export / "adapter_model.safetensors").write_text("weights")

    clean(old.jobs)

    entry = Catalog(old.jobs.paths.models).get("faq", tenant=TENANT)
    assert entry is not None
    assert (entry.path / "adapter_model.safetensors").read_text() == "weights"
    assert entry.path == export.resolve()


def test_a_job_that_is_not_over_keeps_everything(old: Store) -> None:
    """
    Paused with all its checkpoints, attempts and prepared data: nothing goes before its end.

    Seen red with a query that asks for no state.
    """
    job = old.create(options={"steps": 400, "step_s": 0.02, "every": 2})
    with old.working():
        wait_until(lambda: len(_servable(old, job)) > 3, "checkpoints are written")
        old.jobs.pause(job.id, tenant=TENANT)
        wait_until(lambda: old.get(job).state == "paused", "it rests")
    paths = old.jobs.paths.job(job.id)
    for path in paths.run.glob("step_*"):
        (path / "manifest.json").write_text('{"state": {}}')
    paths.prepared.write_text(json.dumps({"prepared": DATA[0]}))
    old.jobs.paths.prepared(DATA[0]).mkdir(parents=True)
    kept = _steps(old, job)

    assert clean(old.jobs) == []
    assert _steps(old, job) == kept
    assert old.jobs.paths.prepared(DATA[0]).is_dir()


@pytest.mark.parametrize("broken", ["no manifest", "catalogue"])
def test_what_is_not_known_stays(old: Store, broken: str) -> None:
    """A failed job whose best step cannot be read keeps its checkpoints; an unreadable catalogue stops a cleaning."""
    job = old.create(options={"steps": 6, "every": 2, "export": {"exit": 1}})
    old.work()
    assert old.get(job).state == "failed"
    if broken == "no manifest":
        assert [item.kind for item in clean(old.jobs)] == []
    else:
        place = old.jobs.paths.models / "entries"
        place.mkdir(parents=True)
        (place / f"{'0' * 64}.json").write_text("{")
        with pytest.raises(Exception, match="not a readable catalogue file"):
            clean(old.jobs)
    assert _steps(old, job) == [2, 4, 6]


def test_young_things_stay(make_store: Callable[..., Store]) -> None:
    """With the policy that a store has of itself, nothing of a job that has just ended goes."""
    store = make_store(None)
    job = _done(store)
    store.jobs.paths.prepared(DATA[0]).mkdir(parents=True)

    assert clean(store.jobs) == []
    assert _steps(store, job) == [2, 4, 6, 8]


def test_logs_of_old_attempts_go(old: Store) -> None:
    """The newest attempts keep what they printed, as many as the policy says."""
    job = old.create(options={"prepare": {"exit": 1, "error": {"code": "rank_lost", "message": "x"}, "attempts": [1]}})
    old.work()
    assert (old.get(job).state, old.get(job).attempt) == ("succeeded", 2)

    gone = clean(old.jobs)

    attempts = old.jobs.paths.job(job.id).root / "attempts"
    assert [path.name for path in attempts.iterdir()] == ["2"]
    assert ("attempt", f"jobs/{job.id}/attempts/1") in [(item.kind, item.name) for item in gone]


def test_prepared_data_that_no_job_needs_go(old: Store) -> None:
    """Data of a job that is over and data that a dead process left go; not while a phase prepares."""
    job = _done(old)
    old.jobs.paths.job(job.id).prepared.write_text(json.dumps({"prepared": DATA[0]}))
    for name in (DATA[0], f".{DATA[1]}.17-abcd.tmp"):
        (old.jobs.paths.root / "prepared" / name).mkdir(parents=True)
        (old.jobs.paths.root / "prepared" / name / "x").write_text("12345")
    lock = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_SH)"
    code = f"{lock}; print('held', flush=True); input()"
    preparing = subprocess.Popen(
        [sys.executable, "-c", code, str(old.jobs.paths.prepared_lock)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert preparing.stdout is not None
        assert preparing.stdout.readline() == "held\n"
        during = [item.kind for item in clean(old.jobs) if item.name.startswith("prepared")]
    finally:
        preparing.communicate("\n")

    after = clean(old.jobs)

    assert during == []
    assert [(item.kind, item.bytes) for item in after] == [("leftover", 5), ("prepared", 5)]


def test_files_and_keys_beyond_their_time_go(tmp_path: Path) -> None:
    """`file_days` of the policy gives files an end; a file that a live job reads outlives it."""
    paths, now = StorePaths(tmp_path / "store"), [1_000_000_000_000]
    paths.root.mkdir()
    paths.policy.write_text("file_days: 2\n")
    jobs = Jobs(None, paths, database=Database(None, paths.database, clock=lambda: now[0]), limits=StoreLimits())
    used, unused = (
        jobs.put_file(io.BytesIO(name.encode()), tenant=TENANT, filename=name, purpose="fine-tune")
        for name in ("used.jsonl", "unused.jsonl")
    )
    jobs.create(JobConfig(model="base", training_file=used.id), tenant=TENANT, idempotency_key="k")
    now[0] += 3 * 86_400_000

    told = clean(jobs, dry_run=True)
    gone = clean(jobs)

    assert told == gone
    assert [(item.kind, item.name, item.bytes) for item in gone] == [("file", unused.id, 12)]
    assert [file.id for file in jobs.list_files(tenant=TENANT).data] == [used.id]
    again = jobs.create(JobConfig(model="base", training_file=used.id, seed=1), tenant=TENANT, idempotency_key="k")
    assert again.config["seed"] == 1  # the key is free
    jobs.close()


@pytest.mark.parametrize("text", ["checkpoint_day: 3\n", "checkpoint_days: -1\n", "[1]\n", "a: [\n"])
def test_a_wrong_policy_is_refused_and_nothing_goes(make_store: Callable[..., Store], text: str) -> None:
    """A slip in policy.yaml is an error that says what is allowed; a store with one is not opened either."""
    store = make_store(None)
    store.jobs.paths.policy.write_text(text)

    with pytest.raises(FinetuneError, match=r"policy\.yaml") as caught:
        clean(store.jobs)

    assert "checkpoint_days" in str(caught.value)
    with pytest.raises(FinetuneError, match=r"policy\.yaml"):
        Jobs(None, store.jobs.paths)


def test_R10_a_cleaning_that_is_killed_leaves_a_readable_store(make_store: Callable[..., Store]) -> None:
    """
    SIGKILL before any one change of the disk: what is left reads well, nothing needed is gone, the next one ends it.

    Seen red where a directory is removed under its own name: a checkpoint is then found without its manifest.
    """
    store = make_store(None)
    store.jobs.paths.policy.write_text(NOW)
    job = _done(store, best=4, steps=10)
    (store.jobs.paths.prepared(DATA[0])).mkdir(parents=True)
    (store.jobs.paths.prepared(DATA[0]) / "index.json").write_text("{}")
    moments = [0, 1, 2, *random.Random(7).sample(range(3, 12), 3)]
    for moment in moments:
        ended = subprocess.run(
            [sys.executable, "-c", _KILLED, str(store.jobs.paths.root), str(moment)], timeout=60, check=False
        )
        assert ended.returncode in (0, -signal.SIGKILL)
        left = _steps(store, job)
        assert {4, 10} <= set(left)
        assert set(_servable(store, job)) <= set(left)
        for step in left:
            folder = store.jobs.paths.job(job.id).run / f"step_{step:08d}"
            assert {path.name for path in folder.iterdir()} == {"weights", "manifest.json"}
        for path in (store.jobs.paths.root / "prepared").glob("[!.]*"):
            assert (path / "index.json").is_file()
        assert store.get(job).state == "succeeded"

    clean(store.jobs)

    assert _steps(store, job) == [4, 10]
    assert not list(store.jobs.paths.root.rglob(".tmp-*"))


def test_a_worker_cleans_beside_its_jobs(old: Store) -> None:
    """Without a word from anybody."""
    job = _done(old)

    with old.working(sweep_s=0.05):
        wait_until(lambda: _steps(old, job) == [2, 8], "the worker cleans")
