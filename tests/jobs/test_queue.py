"""Claims and leases on both databases."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from trilithon_finetune.jobs.database import Database
from trilithon_finetune.jobs.leases import Lease
from trilithon_finetune.jobs.moves import Ending, LeaseLost, NewEvent
from trilithon_finetune.jobs.queue import KEEP_ALL_STEPS, Claim, Move, Queue
from trilithon_finetune.jobs.schema import job_attempts, jobs
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.jobs.states import JobState
from trilithon_finetune.paths import StorePaths

from .conftest import TENANT, Store

S = JobState
VALIDATED = Move(S.QUEUED, (NewEvent(kind="validated", message="sound"),))


@pytest.fixture
def timed(database_url: str | None, tmp_path: Path) -> Iterator[Store]:
    """A store whose database has a clock that tests turn: `timed.now[0]`, in milliseconds."""
    now = [1_700_000_000_000]
    database = Database(database_url, tmp_path / "timed" / "jobs.db", clock=lambda: now[0])
    store = Store(Jobs(None, StorePaths(tmp_path / "timed"), database=database), database_url)
    store.now = now  # type: ignore[attr-defined]  # for these tests alone
    yield store
    store.close()


def _claim(store: Store, state: JobState = S.VALIDATING, lease_s: float = 30.0) -> Claim | None:
    return Queue(store.jobs.database).claim(state, owner="worker", lease_s=lease_s)


def test_concurrent_workers_claim_each_job_once(store: Store) -> None:
    """Four threads and sixty jobs: every job is claimed by exactly one, and none fails on a lock."""
    ids = {store.create().id for _ in range(60)}
    claimed: list[str] = []

    def work() -> None:
        while (claim := _claim(store)) is not None:
            claimed.append(claim.job.id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(claimed) == sorted(ids)


def test_validated_job_goes_on_in_the_same_attempt(store: Store) -> None:
    """Validation and what follows are one attempt; a second run is another."""
    store.create()
    queue = Queue(store.jobs.database)
    first = _claim(store)
    assert first is not None
    queue.write(first, VALIDATED, values={"next_attempt": first.job.attempt}, release=True)
    second = _claim(store, S.QUEUED)
    assert second is not None
    queue.write(second, Move(S.QUEUED), release=True, wait_s=0, ending=Ending(outcome="lost", cause="tests"))
    third = _claim(store, S.QUEUED)
    assert third is not None

    with store.jobs.database.read() as connection:
        rows = connection.execute(select(job_attempts.c.attempt, job_attempts.c.outcome)).all()
    assert [claim.job.attempt for claim in (first, second, third)] == [1, 1, 2]
    assert [claim.token for claim in (first, second, third)] == [1, 2, 3]
    assert [tuple(row) for row in rows] == [(1, "lost"), (2, None)]


def test_lease_ends_by_the_databases_clock(timed: Store) -> None:
    """Until its last millisecond a lease holds; after that anybody takes the job, with the next token."""
    now = timed.now  # type: ignore[attr-defined]
    job = timed.create()
    queue = Queue(timed.jobs.database)
    claim = _claim(timed, lease_s=30.0)
    assert claim is not None
    now[0] += 30_000
    early = queue.take_over(owner="other", lease_s=30.0)
    now[0] += 1
    taken = queue.take_over(owner="other", lease_s=30.0)

    assert early is None
    assert taken is not None
    assert (taken.token, taken.job.attempt, taken.job.state) == (2, 1, S.VALIDATING)
    for write in (
        lambda: queue.write(claim, VALIDATED),
        lambda: queue.renew(claim, lease_s=30.0, used_s=1.0),
        lambda: queue.look(claim),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert timed.kinds(job) == ["created", "claimed", "lease_lost"]


def test_renewal_puts_the_end_off(timed: Store) -> None:
    """A renewed lease is not taken, and the time that was used is noted."""
    now = timed.now  # type: ignore[attr-defined]
    timed.create()
    queue = Queue(timed.jobs.database)
    claim = _claim(timed, lease_s=30.0)
    assert claim is not None
    now[0] += 20_000
    wish = queue.renew(claim, lease_s=30.0, used_s=20.0)
    now[0] += 20_000

    with timed.jobs.database.read() as connection:
        used_ms = connection.execute(select(jobs.c.used_ms)).scalar_one()
    assert (wish, queue.take_over(owner="other", lease_s=30.0), used_ms) == ("run", None, 20_000)


def test_write_whose_answer_was_lost_counts_once(store: Store) -> None:
    """The same move and the same piece of news, twice: the second changes nothing."""
    job = store.create()
    queue = Queue(store.jobs.database)
    claim = _claim(store)
    assert claim is not None
    news = Move(None, (NewEvent(kind="warning", message="once"),))
    for _ in range(2):
        queue.write(claim, news, offset=10)
    for _ in range(2):
        queue.write(claim, VALIDATED, release=True)

    assert store.kinds(job) == ["created", "claimed", "warning", "validated"]


def test_events_of_old_steps_are_thinned(store: Store) -> None:
    """The newest thousand steps stay, of older ones every tenth; nothing else is taken away."""
    job = store.create()
    queue = Queue(store.jobs.database)
    claim = _claim(store)
    assert claim is not None
    total = KEEP_ALL_STEPS + 500
    for start in range(1, total + 1, 250):
        steps = range(start, start + 250)
        events = tuple(NewEvent(kind="step", message="", data={"step": step}, step=step) for step in steps)
        queue.write(claim, Move(None, events), offset=start)

    kept = [event.data["step"] for event in store.events(job) if event.kind == "step"]
    assert kept == [*range(10, 501, 10), *range(501, total + 1)]
    assert store.kinds(job)[:2] == ["created", "claimed"]
    assert store.get(job).last_seq == 2 + total


def test_lease_counts_by_its_own_clock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's side lets go at the latest when the database could: from before it asked, plus the lease."""
    job = store.create()
    claim = _claim(store)
    assert claim is not None
    at = [100.0]
    monkeypatch.setattr("trilithon_finetune.jobs.leases.time.monotonic", lambda: at[0])
    lease = Lease(Queue(store.jobs.database), claim, since=100.0, lease_s=30.0, renew_s=10.0, look_s=1.0)
    at[0] = 129.9
    assert lease.beat() == "run"  # renewed
    at[0] = 159.8
    lease.check()
    store.jobs.pause(job.id, tenant=TENANT)
    assert lease.beat() == "pause"
    at[0] += 30.0

    with pytest.raises(LeaseLost):
        lease.check()


def test_claim_that_is_not_known_is_refused(store: Store) -> None:
    """A made-up token is no lease."""
    store.create()
    claim = _claim(store)
    assert claim is not None
    with pytest.raises(LeaseLost, match="token 99"):
        Queue(store.jobs.database).write(replace(claim, token=99), VALIDATED)


def test_not_before_keeps_a_job_back(timed: Store) -> None:
    """A job that waits for its next attempt is not claimed before its time."""
    now = timed.now  # type: ignore[attr-defined]
    timed.create()
    queue = Queue(timed.jobs.database)
    claim = _claim(timed)
    assert claim is not None
    queue.write(claim, VALIDATED, release=True, wait_s=10.0)
    now[0] += 9_999
    early = _claim(timed, S.QUEUED)
    now[0] += 1

    assert early is None
    assert _claim(timed, S.QUEUED) is not None
