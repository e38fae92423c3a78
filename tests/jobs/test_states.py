"""The table of moves, and random histories against it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from trilithon.errors import FailedPrecondition
from trilithon_finetune.jobs.database import Database
from trilithon_finetune.jobs.moves import IllegalMove, LeaseLost, NewEvent
from trilithon_finetune.jobs.queue import Claim, Move, Queue
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.jobs.states import FINAL, MOVES, JobState, openai_status, sources
from trilithon_finetune.paths import StorePaths

from .conftest import TENANT, Store

S = JobState
LEASE_MS = 30_000
ENDS = ("succeeded", "failed", "cancelled")


def test_every_state_is_reached_and_final_ones_are_never_left() -> None:
    """From validating every state can be reached; three have no way out; only those."""
    reached, todo = {S.VALIDATING}, [S.VALIDATING]
    while todo:
        new = MOVES[todo.pop()] - reached
        reached |= new
        todo += new

    assert reached == set(JobState)
    assert {state for state, targets in MOVES.items() if not targets} == FINAL
    assert sources(S.PREPARING) == (S.QUEUED,)


def test_status_is_in_openais_words() -> None:
    """Every state has a status; working ones are running."""
    assert {state: openai_status(state) for state in JobState} == {
        S.VALIDATING: "validating_files",
        S.QUEUED: "queued",
        S.PREPARING: "running",
        S.STARTING: "running",
        S.RUNNING: "running",
        S.PAUSING: "pausing",
        S.PAUSED: "paused",
        S.EXPORTING: "running",
        S.VERIFYING: "running",
        S.CANCELLING: "running",
        S.SUCCEEDED: "succeeded",
        S.FAILED: "failed",
        S.CANCELLED: "cancelled",
    }


class Histories(RuleBasedStateMachine):
    """Workers, some of them stale, and an owner, at random; time passes as it likes."""

    def __init__(self, database: Database, root: Path) -> None:
        super().__init__()
        jobs = Jobs(None, StorePaths(root), database=database)
        self.store, self.database, self.queue = Store(jobs, None), database, Queue(database)
        self.job = self.store.create()
        self.claims: list[Claim] = []
        self.seen: list[tuple[JobState, int]] = []

    @rule(state=st.sampled_from([S.VALIDATING, S.QUEUED]))
    def claim(self, state: JobState) -> None:
        before = self.store.get(self.job)
        claim = self.queue.claim(state, owner="worker", lease_s=LEASE_MS / 1000)
        if claim is not None:
            assert before.state is state
            assert claim.token == 1 + max([item.token for item in self.claims], default=0)
            self.claims.append(claim)

    @rule()
    def take_over(self) -> None:
        claim = self.queue.take_over(owner="other", lease_s=LEASE_MS / 1000)
        if claim is not None:
            self.claims.append(claim)

    @rule(data=st.data(), to=st.sampled_from(JobState), release=st.booleans())
    @precondition(lambda self: self.claims)
    def worker_moves(self, data: st.DataObject, to: JobState, release: bool) -> None:
        claim = data.draw(st.sampled_from(self.claims))
        before, last_seq = self.store.get(self.job), len(self.store.events(self.job))
        held = self.held()
        if to in (S.QUEUED, S.PAUSED, *FINAL):
            release = True  # as workers do: nobody holds what rests
        try:
            self.queue.write(claim, Move(to, (NewEvent(kind=str(to), message="moved"),)), release=release)
        except (LeaseLost, IllegalMove):
            assert len(self.store.events(self.job)) == last_seq
            assert self.store.get(self.job).state is before.state
        else:
            again = claim.token == self.claims[-1].token and before.state is to
            assert again or (held == claim.token and to in MOVES[before.state])

    @rule(wish=st.sampled_from(["cancel", "pause", "resume"]))
    def owner_asks(self, wish: str) -> None:
        before = self.store.get(self.job)
        ask = getattr(self.store.jobs, wish)
        if before.finished or (before.desired == "cancel" and wish != "cancel"):
            with pytest.raises(FailedPrecondition, match=str(before.state)):
                ask(self.job.id, tenant=TENANT)
        else:
            ask(self.job.id, tenant=TENANT)

    @rule(ms=st.sampled_from([1, LEASE_MS // 2, LEASE_MS + 1]))
    def time_passes(self, ms: int) -> None:
        clock["now"] += ms

    @invariant()
    def history_is_sound(self) -> None:
        events = self.store.events(self.job)
        job = self.store.get(self.job)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert job.last_seq == len(events)
        assert [event.kind for event in events if event.kind in ENDS] == ([str(job.state)] if job.finished else [])
        if self.seen and self.seen[-1][0] in FINAL:
            assert job.state is self.seen[-1][0]
        self.seen.append((job.state, job.last_seq))

    def held(self) -> int | None:
        """The token of the lease that is held."""
        with self.database.read() as connection:
            row = connection.exec_driver_sql("SELECT lease_owner, lease_token FROM jobs WHERE state IS NOT NULL").one()
        return None if row[0] is None else int(row[1])


clock: dict[str, int] = {"now": 1_700_000_000_000}


@contextlib.contextmanager
def _database(url: str | None) -> Iterator[tuple[Database, Path]]:
    root = Path(tempfile.mkdtemp(prefix="trilithon-states-"))
    database = Database(url, root / "jobs.db", clock=lambda: clock["now"])
    try:
        yield database, root
    finally:
        database.close()
        shutil.rmtree(root)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_R10_random_histories_keep_the_tables_laws(kind: str, request: pytest.FixtureRequest) -> None:
    """
    Random claims, take-overs, moves with current and stale tokens, requests and leaps of time: final states are never
    left, events count without a gap, a stale token changes nothing, and there is one end at most.

    Inverse: `held = true()` in `moves.change` lets a stale token write.
    """
    url = request.getfixturevalue("cluster").database() if kind == "postgresql" else None
    with _database(url) as (database, root):
        count = 0

        def machine() -> Histories:
            nonlocal count
            count += 1
            with database.write() as connection:  # the same database for all: its one job is the newest
                for table in ("job_events", "job_attempts", "checkpoints", "jobs", "files", "idempotency_keys"):
                    connection.exec_driver_sql(f"DELETE FROM {table}")
            return Histories(database, root)

        options: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
        run_state_machine_as_test(machine, settings=settings(max_examples=15, stateful_step_count=25, **options))
        assert count > 1
