"""A job on its way through a worker, with stand-ins for its phases: every end that it can have."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable

import pytest

from trilithon_finetune.jobs.states import JobState
from trilithon_server.catalog import Catalog

from .conftest import TENANT, Store, check_history, wait_until

S = JobState


def test_job_walks_through_its_phases_and_is_served(store: Store) -> None:
    """Every phase's events in order, its checkpoints and numbers in the table, its result in the catalogue."""
    job = store.create(suffix="faq", options={"steps": 12}, deploy={"alias": "faq"}, parallel={"dp": 2})
    store.work()

    done = store.get(job)
    kinds = [kind for kind in store.kinds(job) if kind not in ("step", "checkpoint_saved")]
    entry = Catalog(store.jobs.paths.models).get("faq", tenant=TENANT)
    checkpoints = store.jobs.checkpoints(job.id, tenant=TENANT)
    ranks = {mark[3] for mark in store.marks(job) if mark[1] == "train"}
    check_history(store, job)
    assert (done.state, done.attempt, done.error, done.seed) == (S.SUCCEEDED, 1, None, 7)
    assert kinds == [
        *("created", "claimed", "validated", "claimed", "prepare_started", "prepared", "gang_started", "running"),
        *("export_started", "exported", "verify_started", "verified", "deployed", "succeeded"),
    ]
    assert (done.progress.step, done.progress.total_steps, done.progress.fraction) == (12, 12, 1.0)
    assert (done.progress.trained_tokens, done.progress.seconds_remaining) == (120, 0)
    assert done.fine_tuned_model == f"ft:base:faq:{job.id.removeprefix('ftjob-')}"
    assert entry is not None
    assert (entry.name, entry.job_id, entry.step, entry.base_digest) == (done.name, job.id, 12, "b" * 64)
    assert [item.step for item in checkpoints.data] == [12, 10, 8, 6, 4, 2]
    assert [item.verified for item in checkpoints.data] == [True, False, False, False, False, False]
    assert ranks == {"0", "1"}
    assert next(event for event in store.events(job) if event.kind == "prepared").data == {"rows": 3}
    assert store.jobs.get_file(done.result_files[0], tenant=TENANT).filename == "step_metrics.csv"


def test_deploy_on_checkpoint_serves_each_one(store: Store) -> None:
    """Every checkpoint is a name of its own; the alias ends at the result."""
    job = store.create(options={"steps": 4}, deploy={"alias": "live", "on": "checkpoint"}, tuning={"kind": "lora"})
    store.work()

    catalog = Catalog(store.jobs.paths.models)
    names = {entry.name for entry in catalog.entries(tenant=TENANT)}
    alias = catalog.alias("live", tenant=TENANT)
    assert names == {job.name, f"{job.name}:step-2", f"{job.name}:step-4"}
    assert alias is not None
    assert (alias.target, alias.version) == (job.name, 3)
    assert store.kinds(job).count("deployed") == 3


@pytest.mark.parametrize("phase", ["validate", "prepare", "train", "export", "verify"])
def test_users_error_of_a_phase_ends_the_job(store: Store, phase: str) -> None:
    """The phase's own record is the job's error, with its attempt, and nothing is tried again."""
    error = {"code": "nan_loss", "message": "step 3: the loss is not finite.", "hint": "Lower the learning rate."}
    job = store.create(options={phase: {"error": error, "exit": 3}})
    store.work()

    done = store.get(job)
    check_history(store, job)
    assert done.state is S.FAILED
    assert done.error is not None
    assert (done.error.code, done.error.kind, done.error.attempt) == ("nan_loss", "user", 1)
    assert done.error.rank == (0 if phase == "train" else -1)
    assert done.report == ({"rows": 2} if phase == "validate" else {"rows": 3})
    assert "retry_scheduled" not in store.kinds(job)


def test_lost_rank_is_tried_again_and_goes_on_from_the_checkpoint(store: Store) -> None:
    """Infrastructure that fails costs an attempt; the next continues where the last checkpoint is."""
    job = store.create(options={"steps": 4, "export": {"signal": signal.SIGKILL, "attempts": [1]}})
    store.work()

    done = store.get(job)
    steps = [event.data["step"] for event in store.events(job) if event.kind == "step"]
    check_history(store, job)
    assert (done.state, done.attempt, done.failures, done.error) == (S.SUCCEEDED, 2, 1, None)
    assert steps == [1, 2, 3, 4]
    assert [kind for kind in store.kinds(job) if kind in ("attempt_failed", "retry_scheduled")] == [
        *("attempt_failed", "retry_scheduled"),
    ]


def test_attempts_end_with_their_number(store: Store) -> None:
    """A job whose every attempt is lost fails with the last cause; the wait between them doubles."""
    job = store.create(options={"train": {"exit": 6, "rank": 1}}, parallel={"tp": 2})
    with store.working(backoff_s=0.01):
        done = store.wait(job)

    waits = [event.message for event in store.events(job) if event.kind == "retry_scheduled"]
    check_history(store, job)
    assert (done.state, done.attempt, done.failures) == (S.FAILED, 3, 3)
    assert done.error is not None
    assert (done.error.code, done.error.rank, done.error.attempt) == ("rank_lost", 1, 3)
    assert waits == ["The next attempt may start in 0.01 s.", "The next attempt may start in 0.02 s."]


def test_phase_that_dies_without_a_word_is_a_bug_without_a_trace(store: Store) -> None:
    """No path, no trace: an id, and where to look."""
    job = store.create(options={"prepare": {"exit": 1}})
    store.work()

    error = store.get(job).error
    assert error is not None
    assert (error.code, error.kind) == ("bug", "internal")
    assert "Id: " in error.message
    assert "/" not in error.message + error.hint


@pytest.mark.parametrize("phase", ["validate", "prepare", "train", "export", "verify"])
def test_cancel_in_every_phase(store: Store, phase: str) -> None:
    """A cancelled job stops its processes, wherever it is; again is no error until it is final."""
    job = store.create(options={phase: {"block": True}})
    with store.working():
        wait_until(lambda: ["blocked", phase] in [mark[:2] for mark in store.marks(job)], f"{phase} blocks")
        store.jobs.cancel(job.id, tenant=TENANT)
        store.jobs.cancel(job.id, tenant=TENANT)
        done = store.wait(job)

    check_history(store, job)
    assert done.state is S.CANCELLED
    assert store.kinds(job)[-2:] == ["cancelling", "cancelled"]


@pytest.mark.parametrize("phase", ["prepare", "train", "export", "verify"])
def test_pause_and_resume_in_every_phase(store: Store, phase: str) -> None:
    """A paused job holds nothing; resumed, it ends as if nothing had been."""
    job = store.create(options={"steps": 4, phase: {"block": True, "attempts": [1]}})
    with store.working():
        wait_until(lambda: ["blocked", phase] in [mark[:2] for mark in store.marks(job)], f"{phase} blocks")
        store.jobs.pause(job.id, tenant=TENANT)
        paused = store.wait(job, S.PAUSED)
        store.jobs.pause(job.id, tenant=TENANT)
        store.jobs.resume(job.id, tenant=TENANT)
        done = store.wait(job)

    check_history(store, job)
    assert (paused.state, done.state, done.attempt, done.failures) == (S.PAUSED, S.SUCCEEDED, 2, 0)


def test_pause_while_validating_rests_before_the_queue(store: Store) -> None:
    """Validation is short and ends; then the job rests."""
    job = store.create(options={"validate": {"block": True}})
    with store.working():
        wait_until(lambda: store.marks(job), "validation blocks")
        store.jobs.pause(job.id, tenant=TENANT)
        store.go(job)
        store.wait(job, S.PAUSED)

    check_history(store, job)
    assert store.kinds(job)[-2:] == ["validated", "paused"]


def test_withdrawn_pause_goes_on(store: Store) -> None:
    """A resume while the job is pausing sends it from its rest into the queue."""
    job = store.create(options={"train": {"block": True, "deaf": True, "attempts": [1]}})
    with store.working():
        wait_until(lambda: ["blocked", "train"] in [mark[:2] for mark in store.marks(job)], "training blocks")
        store.jobs.pause(job.id, tenant=TENANT)
        store.wait(job, S.PAUSING)
        store.jobs.resume(job.id, tenant=TENANT)
        store.go(job)
        done = store.wait(job)

    kinds = store.kinds(job)
    assert done.state is S.SUCCEEDED
    assert kinds.index("pausing") < kinds.index("paused") < kinds.index("resumed")


def test_deaf_gang_is_killed_after_its_grace(store: Store) -> None:
    """Ranks that do not end by themselves are ended."""
    job = store.create(options={"train": {"block": True, "deaf": True}}, parallel={"dp": 2})
    with store.working(grace_s=0.2):
        wait_until(lambda: len([mark for mark in store.marks(job) if mark[0] == "blocked"]) == 2, "both ranks block")
        store.jobs.cancel(job.id, tenant=TENANT)
        done = store.wait(job)

    assert done.state is S.CANCELLED


def test_stopped_worker_gives_its_job_back(store: Store) -> None:
    """The job writes a checkpoint and waits for the next worker, and no attempt counts as lost."""
    job = store.create(options={"steps": 4, "train": {"block": True, "attempts": [1]}})
    with store.working() as stop:
        wait_until(lambda: ["blocked", "train"] in [mark[:2] for mark in store.marks(job)], "training blocks")
        stop.set()
        waiting = store.wait(job, S.QUEUED)
    store.work()

    check_history(store, job)
    assert (waiting.failures, store.get(job).state, store.get(job).attempt) == (0, S.SUCCEEDED, 2)


def test_time_limit_ends_the_job(store: Store) -> None:
    """Hours under workers are counted, and the checkpoint stays."""
    job = store.create(options={"train": {"block": True}}, limits={"max_hours": 0.2 / 3600})
    store.work()

    error = store.get(job).error
    assert error is not None
    assert (error.code, error.param, store.get(job).state) == ("time_limit", "limits.max_hours", S.FAILED)


def test_full_disk_pauses_the_job(store: Store) -> None:
    """A job without room rests, says why, and goes on when it is resumed."""
    error = {"code": "disk_full", "message": "no room for the checkpoint of step 2."}
    job = store.create(options={"train": {"error": error, "exit": 1, "attempts": [1]}})
    store.work()
    paused = store.get(job)
    store.jobs.resume(job.id, tenant=TENANT)
    store.work()

    check_history(store, job)
    assert paused.state is S.PAUSED
    assert paused.error is not None
    assert paused.error.code == "disk_full"
    assert (store.get(job).state, store.get(job).error) == (S.SUCCEEDED, None)


def test_unknown_model_is_the_users_error(store: Store) -> None:
    """The sentence says what is known, and the nearest name."""
    job = store.create(model="bose")
    store.work()

    error = store.get(job).error
    assert error is not None
    assert (error.code, error.param, error.hint) == ("model_not_found", "model", "Did you mean 'base'?")


def test_slots_share_the_jobs_and_priority_comes_first(store: Store) -> None:
    """As many jobs as there are slots run at once; of those that wait, the higher priority goes first."""
    jobs = [store.create(options={"train": {"block": True}}, priority=priority) for priority in (0, 0, 5)]
    worker, stop = store.worker(), threading.Event()
    while worker.work_once(S.VALIDATING, stop):
        pass
    assert [store.get(job).queue_position for job in jobs] == [2, 3, 1]
    with store.working(slots=2):
        wait_until(lambda: sum(store.get(job).state is S.RUNNING or bool(store.marks(job)) for job in jobs) >= 2, "two")
        store.wait(jobs[2], S.STARTING)
        store.wait(jobs[0], S.STARTING)
        waiting = store.get(jobs[1]).state
        for job in jobs:
            store.jobs.paths.job(job.id).root.mkdir(parents=True, exist_ok=True)
            store.go(job)
        ends = [store.wait(job).state for job in jobs]

    assert waiting is S.QUEUED
    assert ends == [S.SUCCEEDED] * 3


def test_job_file_says_what_phases_need(store: Store) -> None:
    """The resolved configuration, the digests, and where model and data lie."""
    job = store.create()
    store.work()

    document = json.loads(store.jobs.paths.job(job.id).spec.read_text())
    assert document["model_dir"] == str(store.jobs.paths.root / "base")
    assert document["training_path"] == str(store.jobs.file_path(store.file_id, tenant=TENANT))
    assert (document["name"], document["base_digest"], document["validation_path"]) == (job.name, "b" * 64, None)
    assert (document["training_name"], document["adapter_dir"]) == ("rows.jsonl", None)


def test_job_goes_on_from_an_adapter_that_another_made(make_store: Callable[..., Store]) -> None:
    """The base's directory and the adapter's are both told, and the result is an adapter of the same base."""
    store = make_store(None)
    first = store.create()
    store.work()
    second = store.create(model=first.name, suffix="more")
    store.work()

    document = json.loads(store.jobs.paths.job(second.id).spec.read_text())
    entry = Catalog(store.jobs.paths.models).get(second.name, tenant=TENANT)
    assert store.get(second).state is S.SUCCEEDED
    assert document["model_dir"] == str(store.jobs.paths.root / "base")
    assert document["adapter_dir"] == str(store.jobs.paths.job(first.id).export)
    assert second.name == f"ft:base:more:{second.id.removeprefix('ftjob-')}"
    assert entry is not None
    assert entry.base == "base"
