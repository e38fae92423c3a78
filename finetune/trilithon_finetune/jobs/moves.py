"""
Every change of a job, as one transaction: the legal move, the guard of the lease, and the events that tell of it.

A worker's write carries its lease token; one that changes no row has lost the lease and must touch nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, insert, select, update

from trilithon_finetune.jobs.database import Database
from trilithon_finetune.jobs.records import Level
from trilithon_finetune.jobs.schema import job_attempts, job_events, jobs
from trilithon_finetune.jobs.states import FINAL, JobState, sources

SOUND = "Configuration and data are sound; the job is in the queue."
"""What is told of a job that was checked, where the phase has no words of its own."""

_ROWS = 200  # of one statement: SQLite takes 32,766 values in one


class LeaseLost(Exception):
    """Another worker has the job now, or its lease ran out unseen: stop its processes, touch nothing."""


class IllegalMove(Exception):
    """The job's state does not allow the move; somebody was faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    """An event that has no number yet. `step` is set where events are thinned by it."""

    kind: str
    message: str
    level: Level = "info"
    data: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How an attempt ended: `succeeded`, `failed`, `lost`, `paused`, `cancelled` or `released`, and why."""

    outcome: str
    cause: str = ""
    rank: int | None = None


def change(
    connection: Connection,
    database: Database,
    job_id: str,
    *,
    events: Sequence[NewEvent],
    to: JobState | None = None,
    token: int | None = None,
    values: Mapping[str, Any] | None = None,
    release: bool = False,
    ending: Ending | None = None,
) -> RowMapping:
    """
    Move a job, or only write its columns and events; the row as it is then.

    Args:
        to: the new state; None: it stays.
        token: of the lease that allows the write; None: the write is not a worker's, and nobody may hold a lease.
        values: further columns.
        release: end the lease.
        ending: of the newest attempt.
    Raises:
        LeaseLost: the token is not the newest, or its lease was given back.
        IllegalMove: the state does not allow `to`.
    """
    held = jobs.c.lease_owner.is_(None) if token is None else _holds(token)
    allowed = jobs.c.state.in_([str(state) for state in sources(to)]) if to is not None else None
    new = dict(values or {})
    new |= {"state": str(to)} if to is not None else {}
    new |= {"finished_at": database.now, "estimated_finish": None} if to in FINAL else {}
    new |= {"lease_owner": None, "launch_handle": None} if release else {}
    statement = (
        update(jobs)
        .where(jobs.c.id == job_id, held, *([allowed] if allowed is not None else []))
        .values(last_seq=jobs.c.last_seq + len(events), **new)
        .returning(jobs)
    )
    row = connection.execute(statement).mappings().one_or_none()
    if row is None:
        raise _refused(connection, job_id, to=to, token=token)
    write_events(connection, database, row, events)
    if ending is not None:
        end_attempt(connection, database, row, ending)
    return row


def checked_columns(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the phase `validate` has found out, as columns of the job."""
    digests = ("base_digest", "data_digest", "template_digest")
    found = {name: data.get(name) for name in ("resolved", "report", "estimate", "seed")}
    return {**found, **{name: data.get(name) or "" for name in digests}}


def write_events(connection: Connection, database: Database, row: RowMapping, events: Sequence[NewEvent]) -> None:
    """Store events under the numbers that end at the row's `last_seq`."""
    first = row["last_seq"] - len(events) + 1
    rows = [
        {
            "job_id": row["id"],
            "seq": number,
            "created_at": database.now,
            "level": event.level,
            "kind": event.kind,
            "message": _text(event.message),
            "attempt": row["attempt"],
            "step": event.step,
            "data": dict(event.data),
        }
        for number, event in enumerate(events, start=first)
    ]
    for start in range(0, len(rows), _ROWS):
        connection.execute(insert(job_events).values(rows[start : start + _ROWS]))


def end_attempt(connection: Connection, database: Database, row: RowMapping, ending: Ending) -> None:
    """Say how the newest attempt ended."""
    connection.execute(
        update(job_attempts)
        .where(
            job_attempts.c.job_id == row["id"],
            job_attempts.c.attempt == row["attempt"],
            job_attempts.c.ended_at.is_(None),
        )
        .values(ended_at=database.now, outcome=ending.outcome, cause=_text(ending.cause) or None, rank=ending.rank)
    )


def _holds(token: int) -> ColumnElement[bool]:
    return and_(jobs.c.lease_token == token, jobs.c.lease_owner.is_not(None))


def _refused(connection: Connection, job_id: str, *, to: JobState | None, token: int | None) -> Exception:
    row = connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one()
    if token is not None and (row["lease_token"] != token or row["lease_owner"] is None):
        return LeaseLost(f"job {job_id}: the lease with token {token} is not held any more (now {row['lease_token']}).")
    return IllegalMove(f"job {job_id}: {row['state']} may not become {to}.")


def _text(message: str) -> str:
    """What both databases store: no NUL, no half of a character."""
    return message.replace("\0", "").encode("utf-8", "replace").decode()
