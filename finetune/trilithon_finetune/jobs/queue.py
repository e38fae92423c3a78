"""
The worker's side of the store: who holds which job, and for how long.

A job is claimed by one statement, so that no reader turns writer. The lease ends at a time of the database's clock; its
token grows with every claim and guards every write. A job whose lease ran out is taken by any worker, which first puts
its former processes to rest (`recover.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, case, delete, func, insert, select, update

from trilithon_finetune.jobs.database import Database
from trilithon_finetune.jobs.moves import Ending, LeaseLost, NewEvent, change, write_events
from trilithon_finetune.jobs.records import Desired, Job
from trilithon_finetune.jobs.rows import job_of
from trilithon_finetune.jobs.schema import checkpoints, job_attempts, job_events, jobs
from trilithon_finetune.jobs.states import JobState

KEEP_ALL_STEPS, KEEP_EVERY = 1000, 10
"""Events of steps: every one of the newest so many, of older ones every tenth."""
_THIN_EVERY = 100  # steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """
    A job in the hands of a worker.

    Attributes:
        token: of the lease.
        events_offset: bytes of the attempt's events.jsonl that are in the table.
        used_s: that workers have spent on the job before.
    """

    job: Job
    token: int
    events_offset: int
    used_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCheckpoint:
    """A row of `checkpoints` to write; `servable` False where its directory is gone."""

    step: int
    digest: str = ""
    bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    servable: bool = True


@dataclass(frozen=True, slots=True)
class Verified:
    """The step whose export was verified, and what was measured of it then."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Move:
    """One step of a job: the new state (None: it stays) and what is told of it."""

    to: JobState | None = None
    events: tuple[NewEvent, ...] = ()


class Queue:
    """What workers do with the table of jobs."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def claim(self, state: JobState, *, owner: str, lease_s: float, only: str | None = None) -> Claim | None:
        """
        The next job of `queued` or `validating`, leased to `owner`; None when there is none to be had.

        Args:
            only: the one job that may be taken; None: any.
        """
        now = self.database.now
        free = (jobs.c.state == str(state), jobs.c.not_before <= now, jobs.c.lease_owner.is_(None), *_only(only))
        target = JobState.PREPARING if state is JobState.QUEUED else state
        values = {
            "state": str(target),
            "attempt": jobs.c.next_attempt,
            "next_attempt": jobs.c.next_attempt + 1,
            "events_offset": case((jobs.c.attempt == jobs.c.next_attempt, jobs.c.events_offset), else_=0),
        }
        events = [NewEvent(kind="claimed", message="A worker has taken the job.")]
        if target is JobState.PREPARING:
            events.append(NewEvent(kind="prepare_started", message="The data is being prepared."))
        return self._take(free, values, events, owner=owner, lease_s=lease_s)

    def take_over(self, *, owner: str, lease_s: float, only: str | None = None) -> Claim | None:
        """A job whose lease ran out, in the state in which its worker left it; None when there is none."""
        left = (jobs.c.lease_owner.is_not(None), jobs.c.lease_expires_at < self.database.now, *_only(only))
        message = "The job's worker was lost; another looks after it."
        events = [NewEvent(kind="lease_lost", level="warn", message=message)]
        return self._take(left, {}, events, owner=owner, lease_s=lease_s)

    def renew(self, claim: Claim, *, lease_s: float, used_s: float) -> Desired:
        """Hold the lease for `lease_s` more; what the job's owner wants. Raises LeaseLost."""
        with self.database.write() as connection:
            statement = (
                update(jobs)
                .where(*self._held(claim))
                .values(lease_expires_at=self._expiry(lease_s), used_ms=int(used_s * 1000))
                .returning(jobs.c.desired)
            )
            return self._desired(claim, connection.execute(statement).scalar_one_or_none())

    def look(self, claim: Claim) -> Desired:
        """What the job's owner wants. Raises LeaseLost."""
        with self.database.read() as connection:
            statement = select(jobs.c.desired).where(*self._held(claim))
            return self._desired(claim, connection.execute(statement).scalar_one_or_none())

    def write(
        self,
        claim: Claim,
        *moves: Move,
        values: Mapping[str, Any] | None = None,
        wait_s: float | None = None,
        release: bool = False,
        ending: Ending | None = None,
        offset: int | None = None,
        saved: Sequence[NewCheckpoint] = (),
        verified: Verified | None = None,
    ) -> Job:
        """
        Write what a worker did, in one transaction. The second try of a write whose answer was lost changes nothing.

        Args:
            moves: to make one after the other.
            values: further columns, with the last move.
            wait_s: the job may be claimed again after so long.
            release: end the lease.
            ending: of the attempt.
            offset: of the attempt's events.jsonl behind the events of these moves.
            saved: rows of checkpoints. verified: the one whose export was verified.
        Raises:
            LeaseLost: somebody else has the job.
        """
        new = dict(values or {})
        *before, last = moves
        with self.database.write() as connection:
            row = connection.execute(select(jobs).where(jobs.c.id == claim.job.id)).mappings().one()
            mine = row["lease_token"] == claim.token
            if mine and (row["state"] == last.to if offset is None else row["events_offset"] >= offset):
                return job_of(row)
            if wait_s is not None:
                new["not_before"] = self.database.now + int(wait_s * 1000)
            if offset is not None:
                new["events_offset"] = offset
            for move in before:
                change(connection, self.database, claim.job.id, to=move.to, events=move.events, token=claim.token)
            row = change(
                connection,
                self.database,
                claim.job.id,
                to=last.to,
                events=last.events,
                token=claim.token,
                values=new,
                release=release,
                ending=ending,
            )
            for checkpoint in saved:
                self._save(connection, claim, checkpoint)
            if verified is not None:
                key = {"job_id": claim.job.id, "step": verified.step}
                known = connection.execute(select(checkpoints.c.metrics).filter_by(**key)).scalar_one_or_none() or {}
                found = {"verified": True, "metrics": {**known, **verified.metrics}}
                connection.execute(update(checkpoints).filter_by(**key).values(found))
            self._thin(connection, claim, [event.step for event in last.events if event.step is not None])
            return job_of(row)

    def _take(
        self,
        where: Sequence[ColumnElement[bool]],
        values: Mapping[str, Any],
        events: Sequence[NewEvent],
        *,
        owner: str,
        lease_s: float,
    ) -> Claim | None:
        chosen = (
            select(jobs.c.id)
            .where(*where)
            .order_by(jobs.c.priority.desc(), jobs.c.created_seq)
            .limit(1)
            .with_for_update(skip_locked=True)  # on PostgreSQL; SQLite has one writer at a time
            .scalar_subquery()
        )
        statement = (
            update(jobs)
            .where(jobs.c.id == chosen)
            .values(
                lease_owner=owner,
                lease_token=jobs.c.lease_token + 1,
                lease_expires_at=self._expiry(lease_s),
                last_seq=jobs.c.last_seq + len(events),
                started_at=func.coalesce(jobs.c.started_at, self.database.now),
                **values,
            )
            .returning(jobs)
        )
        with self.database.write() as connection:
            row = connection.execute(statement).mappings().one_or_none()
            if row is None:
                return None
            write_events(connection, self.database, row, events)
            key = {"job_id": row["id"], "attempt": row["attempt"]}
            known = select(job_attempts.c.attempt).filter_by(**key)
            if connection.execute(known).one_or_none() is None:
                new = insert(job_attempts).values(**key, owner=owner, started_at=self.database.now)
                connection.execute(new)
            return Claim(
                job=job_of(row),
                token=row["lease_token"],
                events_offset=row["events_offset"],
                used_s=row["used_ms"] / 1000,
            )

    def _expiry(self, lease_s: float) -> ColumnElement[int]:
        return self.database.now + int(lease_s * 1000)

    @staticmethod
    def _held(claim: Claim) -> tuple[ColumnElement[bool], ...]:
        return (jobs.c.id == claim.job.id, jobs.c.lease_token == claim.token, jobs.c.lease_owner.is_not(None))

    @staticmethod
    def _desired(claim: Claim, found: Desired | None) -> Desired:
        if found is None:
            raise LeaseLost(f"job {claim.job.id}: the lease with token {claim.token} is not held any more.")
        return found

    def _save(self, connection: Connection, claim: Claim, checkpoint: NewCheckpoint) -> None:
        key = {"job_id": claim.job.id, "step": checkpoint.step}
        if not checkpoint.servable:
            connection.execute(update(checkpoints).filter_by(**key).values(servable=False))
            return
        connection.execute(delete(checkpoints).filter_by(**key))  # the same step again, by another attempt
        connection.execute(
            insert(checkpoints).values(
                **key,
                attempt=claim.job.attempt,
                created_at=self.database.now,
                digest=checkpoint.digest,
                bytes=checkpoint.bytes,
                metrics=dict(checkpoint.metrics),
                servable=True,
                verified=False,
            )
        )

    @staticmethod
    def _thin(connection: Connection, claim: Claim, steps: Sequence[int]) -> None:
        if not steps or min(steps) // _THIN_EVERY == (max(steps) + 1) // _THIN_EVERY:
            return
        old = (job_events.c.kind == "step", job_events.c.step <= max(steps) - KEEP_ALL_STEPS)
        odd = job_events.c.step % KEEP_EVERY != 0
        connection.execute(delete(job_events).where(job_events.c.job_id == claim.job.id, *old, odd))


def _only(job_id: str | None) -> tuple[ColumnElement[bool], ...]:
    return () if job_id is None else (jobs.c.id == job_id,)
