"""The door to the store: what tenants may ask, and what they are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trilithon.errors import Conflict, FailedPrecondition, InvalidArgument, NotFound, Overloaded
from trilithon_finetune.config import seed_of
from trilithon_finetune.jobs.database import Database
from trilithon_finetune.jobs.records import Event
from trilithon_finetune.jobs.service import Jobs, StoreLimits
from trilithon_finetune.jobs.states import JobState
from trilithon_finetune.paths import StorePaths

from .conftest import TENANT, Store

S = JobState


def test_created_job_is_in_validation_with_its_first_event(store: Store) -> None:
    """The job holds its configuration; its id sorts by time; its name is known."""
    first, second = store.create(suffix="faq", metadata={"team": "a"}), store.create()
    (event,) = store.events(first)

    assert (first.state, first.status, first.attempt) == (S.VALIDATING, "validating_files", 0)
    assert first.id < second.id
    assert first.name == f"ft:base:faq:{first.id.removeprefix('ftjob-')}"
    assert (first.fine_tuned_model, first.metadata, first.task) == (None, {"team": "a"}, "sft")
    assert store.get(first) == first
    assert (event.kind, event.seq, event.type, event.id) == ("created", 1, "message", f"ftevent-{first.id[6:]}-1")


def test_a_job_that_was_checked_is_in_the_queue(store: Store) -> None:
    """It skips validation with what the check has found, and the seed of its own id; a worker goes on from there."""
    resolved = store.config(options={"steps": 2}).model_dump(mode="json") | {"seed": 1}
    estimate = {"allowed": True, "peak_bytes_per_rank": 110}
    checked = {"resolved": resolved, "report": {"rows": 3}, "estimate": estimate, "seed": 1}
    digests = {"base_digest": "b" * 64, "data_digest": "d" * 64, "template_digest": "t" * 64}

    job = store.jobs.create(store.config(options={"steps": 2}), tenant=TENANT, checked=checked | digests)
    given = store.jobs.create(store.config(seed=5), tenant=TENANT, checked=checked | digests)
    store.work()

    done = store.get(job)
    assert (job.state, job.queue_position, job.attempt) == (S.QUEUED, 1, 0)
    assert (job.report, job.base_digest) == ({"rows": 3}, "b" * 64)
    assert job.seed == seed_of(job.id)
    assert job.resolved is not None
    assert job.resolved["seed"] == job.seed
    assert given.seed == 5
    assert (done.state, done.attempt) == (S.SUCCEEDED, 1)
    assert store.kinds(job)[:4] == ["created", "validated", "claimed", "prepare_started"]
    assert not [mark for mark in store.marks(job) if mark[1] == "validate"]


def test_jobs_are_listed_newest_first_in_pages(store: Store) -> None:
    """Pages join to the whole list; filters and limits hold."""
    ids = [store.create().id for _ in range(5)]
    store.jobs.cancel(ids[1], tenant=TENANT)
    first = store.jobs.list(tenant=TENANT, limit=2)
    second = store.jobs.list(tenant=TENANT, limit=2, after=first.data[-1].id)
    third = store.jobs.list(tenant=TENANT, limit=2, after=second.data[-1].id)
    cancelled = store.jobs.list(tenant=TENANT, states=(S.CANCELLED,))

    assert [job.id for page in (first, second, third) for job in page.data] == ids[::-1]
    assert [page.has_more for page in (first, second, third)] == [True, True, False]
    assert [job.id for job in cancelled.data] == [ids[1]]
    with pytest.raises(InvalidArgument, match=r"limit must be from 1 to 100\. Given: 0\."):
        store.jobs.list(tenant=TENANT, limit=0)


def test_S7_tenants_see_nothing_of_each_other(store: Store) -> None:
    """Another tenant's job or file does not exist, whatever is asked of it."""
    job = store.create()
    ask: list[Callable[[], object]] = [
        lambda: store.jobs.get(job.id, tenant="other"),
        lambda: store.jobs.cancel(job.id, tenant="other"),
        lambda: store.jobs.pause(job.id, tenant="other"),
        lambda: store.jobs.resume(job.id, tenant="other"),
        lambda: store.jobs.events(job.id, tenant="other"),
        lambda: store.jobs.checkpoints(job.id, tenant="other"),
        lambda: store.jobs.metrics(job.id, tenant="other"),
        lambda: store.jobs.list(tenant="other", after=job.id),
        lambda: store.jobs.get_file(store.file_id, tenant="other"),
        lambda: store.jobs.file_path(store.file_id, tenant="other"),
        lambda: store.jobs.delete_file(store.file_id, tenant="other"),
        lambda: store.jobs.list_files(tenant="other", after=store.file_id),
    ]
    for call in ask:
        with pytest.raises(NotFound):
            call()

    assert store.jobs.list(tenant="other").data == ()
    assert store.jobs.list_files(tenant="other").data == ()
    with pytest.raises(InvalidArgument, match="training_file must be the id of a file of yours"):
        store.create(tenant="other")
    assert store.get(job).desired == "run"


def test_requests_of_waiting_jobs_are_obeyed_at_once(store: Store) -> None:
    """Nobody holds a job that waits: it is cancelled in the call; final states say so."""
    job = store.create()
    cancelled = store.jobs.cancel(job.id, tenant=TENANT)

    assert (cancelled.state, cancelled.finished_at is not None) == (S.CANCELLED, True)
    for ask in (store.jobs.cancel, store.jobs.pause, store.jobs.resume):
        with pytest.raises(FailedPrecondition, match="the job is cancelled, which is final"):
            ask(job.id, tenant=TENANT)
    assert store.kinds(job) == ["created", "cancelled"]


def test_idempotency_key_makes_one_job(
    make_store: Callable[..., Store], database_url: str | None, tmp_path: Path
) -> None:
    """The same key and body is the same job for a day, whoever else uses the key; another body is refused."""
    now = [1_700_000_000_000]
    database = Database(database_url, tmp_path / "keyed" / "jobs.db", clock=lambda: now[0])
    store = Store(Jobs(None, StorePaths(tmp_path / "keyed"), database=database), database_url)
    try:
        config = store.config()
        first = store.jobs.create(config, tenant=TENANT, idempotency_key="key")
        now[0] += 86_399_000
        again = store.jobs.create(config, tenant=TENANT, idempotency_key="key")
        with pytest.raises(Conflict) as caught:
            store.jobs.create(store.config(suffix="x"), tenant=TENANT, idempotency_key="key")
        now[0] += 2_000
        later = store.jobs.create(store.config(suffix="x"), tenant=TENANT, idempotency_key="key")
    finally:
        store.close()

    assert (again.id, caught.value.code) == (first.id, "idempotency_mismatch")
    assert later.id != first.id


@pytest.mark.parametrize("model", ["/etc", "../base", "~/base", "a/b", ".", "C:\\base", "two\nlines"])
def test_S10_model_of_a_request_is_no_path(make_store: Callable[..., Store], model: str) -> None:
    """Only the command may name a directory."""
    store = make_store(None)
    with pytest.raises(InvalidArgument, match="model must be a name, not a path"):
        store.create(model=model)


def test_unfinished_jobs_are_limited(make_store: Callable[..., Store], database_url: str | None) -> None:
    """A tenant at its limit is told so; a job that ends makes room."""
    store = make_store(database_url, StoreLimits(tenant_jobs=1))
    job = store.create()
    with pytest.raises(Overloaded, match="at most 1 jobs may be unfinished"):
        store.create()
    store.jobs.cancel(job.id, tenant=TENANT)

    assert store.create().state is S.VALIDATING


def test_events_are_read_behind_a_cursor(store: Store) -> None:
    """Every page begins behind the last number that was seen."""
    job = store.create(options={"steps": 20})
    store.work()
    whole = store.events(job)
    pages: list[Event] = []
    while page := store.jobs.events(job.id, tenant=TENANT, after_seq=len(pages), limit=7):
        pages += page

    assert pages == whole
    with pytest.raises(InvalidArgument, match="limit must be from 1 to 1000"):
        store.jobs.events(job.id, tenant=TENANT, limit=1001)


def test_checkpoints_are_paged(store: Store) -> None:
    """Newest first, behind an id of the page before."""
    job = store.create(options={"steps": 6})
    store.work()
    first = store.jobs.checkpoints(job.id, tenant=TENANT, limit=2)
    second = store.jobs.checkpoints(job.id, tenant=TENANT, limit=2, after=first.data[-1].id)

    assert ([item.step for item in first.data], first.has_more) == ([6, 4], True)
    assert ([item.step for item in second.data], second.has_more) == ([2], False)
    assert first.data[0].model == f"{job.name}:step-6"
    assert first.data[0].metrics == {"valid_loss": 1.0 / 6, "exact_match": 0.5}  # the second was measured at its end
    assert first.data[1].metrics == {"valid_loss": 1.0 / 4}
    with pytest.raises(NotFound, match="after names no checkpoint of this job"):
        store.jobs.checkpoints(job.id, tenant=TENANT, after="ftckpt-x-1")


def test_jobs_carry_their_newest_checkpoints(store: Store) -> None:
    """One job and a list of them tell the newest of each job's own checkpoints, newest first; the rest is paged."""
    few, many = (store.create(options={"steps": steps}) for steps in (6, 50))
    store.work()
    none = store.create()
    listed = {job.id: job.checkpoints for job in store.jobs.list(tenant=TENANT).data}
    found = [store.get(job).checkpoints for job in (few, many, none)]

    assert found == [listed[job.id] for job in (few, many, none)]
    assert found[0] == store.jobs.checkpoints(few.id, tenant=TENANT).data
    assert [item.step for item in found[1]] == list(range(50, 10, -2))
    assert found[2] == ()
    assert store.jobs.checkpoints(many.id, tenant=TENANT, limit=20).has_more


def test_metrics_are_the_trainers_own_file(make_store: Callable[..., Store]) -> None:
    """The whole series, without a line that is still being written."""
    store = make_store(None)
    job = store.create()
    before = store.jobs.metrics(job.id, tenant=TENANT)
    run = store.jobs.paths.job(job.id).run
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.5}) + "\n" + '{"step": 2, "lo')

    assert before == []
    assert store.jobs.metrics(job.id, tenant=TENANT) == [{"step": 1, "loss": 2.5}]
