"""
The one door to the job store for fronts and the command.

    >>> jobs = Jobs(None, StorePaths(directory))  # doctest: +SKIP
    >>> jobs.create(config, tenant="acme").state  # doctest: +SKIP
    <JobState.VALIDATING: 'validating'>

Every method blocks for a moment (a database, a disk): an event loop calls it in a thread, but for `receive_file`.
Errors are those of `trilithon.errors`, so both fronts map them as they map all others:
NotFound for what the tenant does not own, InvalidArgument for a broken rule, FailedPrecondition for the wrong state,
Conflict for a key or a file in use, Overloaded for a quota, BodyTooLarge for a file, Unavailable when the database is.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import Connection, RowMapping, delete, func, insert, or_, select, update

from trilithon.errors import Conflict, FailedPrecondition, InvalidArgument, NotFound, Overloaded, Violation
from trilithon_finetune.config import PASSAGES, JobConfig, seed_of
from trilithon_finetune.jobs.database import Database
from trilithon_finetune.jobs.files import Files, StoreLimits
from trilithon_finetune.jobs.ids import new_id
from trilithon_finetune.jobs.moves import SOUND, Ending, NewEvent, change, checked_columns, write_events
from trilithon_finetune.jobs.paging import check_limit, page_of
from trilithon_finetune.jobs.policy import read_policy
from trilithon_finetune.jobs.records import Checkpoint, Desired, Event, File, Job, Page, Purpose
from trilithon_finetune.jobs.rows import checkpoint_id, checkpoint_of, event_of, job_of
from trilithon_finetune.jobs.saved import with_checkpoints
from trilithon_finetune.jobs.schema import checkpoints, idempotency_keys, job_events, jobs
from trilithon_finetune.jobs.states import FINAL, JobState
from trilithon_finetune.paths import StorePaths
from trilithon_finetune.sources import names_in

__all__ = ["Jobs", "StoreLimits"]

_DAY_MS = 86_400_000
_KEY_LEN = 256


class Jobs:
    """
    The job store.

    Args:
        url: of the database, `postgresql://...`; None: SQLite in the store's directory.
        paths: the store's directory; made where missing.
        database: an open one instead of `url`, for tests and workers.
    Raises:
        FinetuneError: `store_unavailable`: a network file system under SQLite, or a newer schema; `invalid_config`: of
            the store's policy.
    """

    def __init__(
        self,
        url: str | None,
        paths: StorePaths,
        *,
        limits: StoreLimits | None = None,
        database: Database | None = None,
    ) -> None:
        self.paths, self.limits = paths, limits or StoreLimits()
        if (days := read_policy(paths).file_days) is not None:
            self.limits = replace(self.limits, file_days=days)
        self.database = database or Database(url, paths.database)
        self._files = Files(self.database, paths, self.limits)

    def close(self) -> None:
        """Release the database's connections."""
        self.database.close()

    # -- jobs -----------------------------------------------------------------------------------------------

    def create(
        self,
        config: JobConfig,
        *,
        tenant: str,
        idempotency_key: str | None = None,
        local_paths: bool = False,
        checked: Mapping[str, Any] | None = None,
    ) -> Job:
        """
        A new job, in `validating`; one that was checked is in the queue at once.

        Args:
            config: its files must be file ids of this tenant.
            idempotency_key: within 24 h the same key with the same configuration answers with the first job.
            local_paths: whether models and concepts may be paths of this host: the command's, never a request's.
            checked: what the phase `validate` has found out about this configuration on the host that will run it.
        Raises:
            InvalidArgument: a file is not this tenant's, or a path is given for a name.
            Conflict: `idempotency_mismatch`, the key came with another configuration.
            Overloaded: `quota_exceeded`, the tenant has too many live jobs.
        """
        document = config.model_dump(mode="json")
        body = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        for param, name in () if local_paths else names_in(config):
            if not _is_name(name):
                raise _invalid(param, "invalid_model", f"{param} must be a name, not a path. Given: {name[:64]!r}.")
        if idempotency_key is not None and not _is_key(idempotency_key):
            message = f"an idempotency key must have 1 to {_KEY_LEN} printable characters."
            raise _invalid("idempotency_key", "invalid_idempotency_key", message)
        with self.database.write() as connection:
            self.database.take_turns(connection, f"tenant:{tenant}")
            known = None if idempotency_key is None else self._known(connection, tenant, idempotency_key, body)
            if known is not None:
                return self._told(connection, self._row(connection, known, tenant))
            self._check_files(connection, config, tenant)
            self._check_live(connection, tenant)
            job_id = new_id("ftjob")
            row = self._insert(connection, job_id, config, document, tenant)
            write_events(connection, self.database, row, [NewEvent(kind="created", message="The job was created.")])
            if checked is not None:
                row = self._queued(connection, job_id, config, checked)
            if idempotency_key is not None:
                connection.execute(
                    insert(idempotency_keys).values(
                        tenant=tenant,
                        key=idempotency_key,
                        body_digest=body,
                        job_id=job_id,
                        expires_at=self.database.now + _DAY_MS,
                    )
                )
            return job_of(row, queue_position=self._position(connection, row))

    def get(self, job_id: str, *, tenant: str) -> Job:
        """One job. Raises NotFound."""
        with self.database.read() as connection:
            return self._told(connection, self._row(connection, job_id, tenant))

    def list(
        self, *, tenant: str, after: str | None = None, limit: int = 20, states: Sequence[JobState] = ()
    ) -> Page[Job]:
        """Newest first, those behind the job `after`; `limit` from 1 to 100."""
        query = select(jobs).where(jobs.c.tenant == tenant)
        if states:
            query = query.where(jobs.c.state.in_([str(state) for state in states]))
        with self.database.read() as connection:
            page = page_of(
                connection,
                query,
                jobs,
                after=after,
                limit=limit,
                tenant=tenant,
                record=lambda row: job_of(row, queue_position=self._position(connection, row)),
            )
            return replace(page, data=with_checkpoints(connection, page.data))

    def cancel(self, job_id: str, *, tenant: str) -> Job:
        """Ask for its end. Again is no error. Raises FailedPrecondition in a final state."""
        return self._ask(job_id, tenant, "cancel")

    def pause(self, job_id: str, *, tenant: str) -> Job:
        """Ask for a checkpoint and a rest. Again is no error. Raises FailedPrecondition in a final state."""
        return self._ask(job_id, tenant, "pause")

    def resume(self, job_id: str, *, tenant: str) -> Job:
        """Go on from the last checkpoint, or withdraw a pause. Raises FailedPrecondition in a final state."""
        return self._ask(job_id, tenant, "run")

    # -- what it told -----------------------------------------------------------------------------------------

    def events(self, job_id: str, *, tenant: str, after_seq: int = 0, limit: int = 100) -> Sequence[Event]:
        """Events with a larger seq, oldest first; `limit` from 1 to 1000."""
        check_limit(limit, most=1000)
        query = select(job_events).where(job_events.c.job_id == job_id, job_events.c.seq > after_seq)
        with self.database.read() as connection:
            self._row(connection, job_id, tenant)
            rows = connection.execute(query.order_by(job_events.c.seq).limit(limit)).mappings().all()
            return [event_of(row) for row in rows]

    def checkpoints(self, job_id: str, *, tenant: str, after: str | None = None, limit: int = 20) -> Page[Checkpoint]:
        """Newest first, those behind the checkpoint `after`."""
        check_limit(limit)
        query = select(checkpoints).where(checkpoints.c.job_id == job_id)
        with self.database.read() as connection:
            job = job_of(self._row(connection, job_id, tenant))
            if after is not None:
                step = after.rpartition("-")[2]
                if not step.isdecimal() or after != checkpoint_id(job_id, int(step)):
                    message = f"after names no checkpoint of this job. Given: {after[:64]!r}."
                    raise NotFound(message, code="cursor_not_found")
                query = query.where(checkpoints.c.step < int(step))
            rows = connection.execute(query.order_by(checkpoints.c.step.desc()).limit(limit + 1)).mappings().all()
            return Page(tuple(checkpoint_of(row, job) for row in rows[:limit]), has_more=len(rows) > limit)

    def metrics(self, job_id: str, *, tenant: str) -> Sequence[Mapping[str, Any]]:
        """The whole series, one object a step, as the trainer wrote it; empty before the first."""
        self.get(job_id, tenant=tenant)
        try:
            text = (self.paths.job(job_id).run / "metrics.jsonl").read_text("utf-8")
        except FileNotFoundError:
            return []
        *lines, _ = text.split("\n")  # the last one may still be being written
        return [json.loads(line) for line in lines]

    # -- files ------------------------------------------------------------------------------------------------

    def put_file(
        self, stream: BinaryIO, *, tenant: str, filename: str, purpose: Purpose, sha256: str | None = None
    ) -> File:
        """
        Store a file, streamed to disk.

        Args:
            filename: 1 to 128 of letters, digits, dot, dash, underscore and space; never used as a path.
            sha256: in hex; compared when given.
        Raises:
            InvalidArgument: the name, the purpose or the digest is wrong, or nothing was sent.
            BodyTooLarge: more than the limit of one file. Overloaded: `quota_exceeded`.
        """
        return self._files.put(stream, tenant=tenant, filename=filename, purpose=purpose, sha256=sha256)

    async def receive_file(
        self, stream: AsyncIterator[bytes], *, tenant: str, filename: str, purpose: Purpose, sha256: str | None = None
    ) -> File:
        """`put_file` for an event loop; the disk and the database are waited for in threads."""
        upload = await asyncio.to_thread(
            self._files.upload, tenant=tenant, filename=filename, purpose=purpose, sha256=sha256
        )
        with upload:
            async for piece in stream:
                await asyncio.to_thread(upload.write, piece)
            return await asyncio.to_thread(upload.commit)

    def get_file(self, file_id: str, *, tenant: str) -> File:
        """One file. Raises NotFound."""
        return self._files.get(file_id, tenant=tenant)

    def list_files(
        self, *, tenant: str, after: str | None = None, limit: int = 20, purpose: Purpose | None = None
    ) -> Page[File]:
        """Newest first, those behind the file `after`."""
        return self._files.list(tenant=tenant, after=after, limit=limit, purpose=purpose)

    def delete_file(self, file_id: str, *, tenant: str) -> None:
        """Forget a file. Raises NotFound, or Conflict `file_in_use` while a live job reads it."""
        self._files.delete(file_id, tenant=tenant)

    def file_path(self, file_id: str, *, tenant: str) -> Path:
        """Where its bytes lie; never to be shown. Raises NotFound."""
        return self._files.path(file_id, tenant=tenant)

    def beyond_their_time(self) -> tuple[Sequence[File], Sequence[Path]]:
        """The files that `sweep` would take away, and what others have left unfinished."""
        return self._files.expired(), self._files.leftovers()

    def sweep(self) -> int:
        """Take away what is beyond its time: files, keys of requests; how many files went."""
        with self.database.write() as connection:
            connection.execute(delete(idempotency_keys).where(idempotency_keys.c.expires_at <= self.database.now))
        return self._files.sweep()

    # -- inside -----------------------------------------------------------------------------------------------

    def _row(self, connection: Connection, job_id: str, tenant: str, *, lock: bool = False) -> RowMapping:
        query = select(jobs).where(jobs.c.id == job_id, jobs.c.tenant == tenant)
        query = query.with_for_update() if lock else query
        row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise NotFound(f"there is no job {job_id[:64]!r}.", code="job_not_found", hint="List your jobs.")
        return row

    def _told(self, connection: Connection, row: RowMapping) -> Job:
        (job,) = with_checkpoints(connection, [job_of(row, queue_position=self._position(connection, row))])
        return job

    def _position(self, connection: Connection, row: RowMapping) -> int | None:
        if row["state"] != JobState.QUEUED:
            return None
        earlier = (jobs.c.priority == row["priority"]) & (jobs.c.created_seq < row["created_seq"])
        ahead = jobs.c.state == str(JobState.QUEUED), or_(jobs.c.priority > row["priority"], earlier)
        return 1 + connection.execute(select(func.count()).select_from(jobs).where(*ahead)).scalar_one()

    def _known(self, connection: Connection, tenant: str, key: str, body: str) -> str | None:
        """The job that a request with this key made before."""
        mine = (idempotency_keys.c.tenant == tenant, idempotency_keys.c.key == key)
        connection.execute(delete(idempotency_keys).where(*mine, idempotency_keys.c.expires_at <= self.database.now))
        query = select(idempotency_keys.c.job_id, idempotency_keys.c.body_digest).where(*mine)
        found = connection.execute(query).one_or_none()
        if found is None:
            return None
        if found.body_digest != body:
            raise Conflict(
                f"the idempotency key was used for the job {found.job_id}, with another configuration.",
                code="idempotency_mismatch",
                hint="Choose a new key for a new job.",
            )
        return str(found.job_id)

    def _check_files(self, connection: Connection, config: JobConfig, tenant: str) -> None:
        named = {field: getattr(config, field) for field in ("training_file", "validation_file")}
        for field, file_id in {**named, f"options.{PASSAGES}": config.passages}.items():
            if file_id is None:
                continue
            try:
                file = self._files.find(connection, file_id, tenant)
            except NotFound:
                message = f"{field} must be the id of a file of yours. Given: {file_id[:64]!r}."
                raise _invalid(field, "file_not_found", message) from None
            fit = ("fine-tune",) if field in named else ("fine-tune", "evidence")
            if file.purpose not in fit:
                message = f"{field} must be a file of purpose {' or '.join(fit)}. Given: {file.purpose}."
                raise _invalid(field, "invalid_purpose", message)

    def _check_live(self, connection: Connection, tenant: str) -> None:
        live = jobs.c.tenant == tenant, jobs.c.state.not_in([str(state) for state in FINAL])
        count = connection.execute(select(func.count()).select_from(jobs).where(*live)).scalar_one()
        if count >= self.limits.tenant_jobs:
            raise Overloaded(
                f"at most {self.limits.tenant_jobs} jobs may be unfinished. Given: {count} and a new one.",
                code="quota_exceeded",
                hint="Wait for the end of one, or cancel one.",
            )

    def _insert(
        self, connection: Connection, job_id: str, config: JobConfig, document: dict[str, Any], tenant: str
    ) -> RowMapping:
        zeros = ("attempt", "failures", "not_before", "lease_token", "lease_expires_at", "events_offset", "used_ms")
        values = {
            "id": job_id,
            "tenant": tenant,
            "state": str(JobState.VALIDATING),
            "desired": "run",
            "priority": config.priority,
            "config": document,
            "training_file": config.training_file,
            "validation_file": config.validation_file,
            "next_attempt": 1,
            "last_seq": 1,
            "base_digest": "",
            "data_digest": "",
            "template_digest": "",
            "created_at": self.database.now,
            **dict.fromkeys(zeros, 0),
        }
        return connection.execute(insert(jobs).values(values).returning(jobs)).mappings().one()

    def _queued(self, connection: Connection, job_id: str, config: JobConfig, checked: Mapping[str, Any]) -> RowMapping:
        """The move that a worker makes after the same check."""
        seed = seed_of(job_id) if config.seed is None else config.seed
        columns = checked_columns({**checked, "resolved": {**checked["resolved"], "seed": seed}, "seed": seed})
        event = NewEvent(kind="validated", message=SOUND)
        return change(connection, self.database, job_id, to=JobState.QUEUED, events=[event], values=columns)

    def _ask(self, job_id: str, tenant: str, wish: Desired) -> Job:
        """Note what the owner wants; where no worker holds the job, do it at once."""
        with self.database.write() as connection:
            row = self._row(connection, job_id, tenant, lock=True)
            state = JobState(row["state"])
            if state in FINAL:
                raise FailedPrecondition(f"the job is {state}, which is final.", code="job_finished")
            if row["desired"] == "cancel" and wish != "cancel":
                raise FailedPrecondition(f"the job is {state} and is being cancelled.", code="job_cancelling")
            return self._obey(connection, row, state, wish)

    def _obey(self, connection: Connection, row: RowMapping, state: JobState, wish: Desired) -> Job:
        free = row["lease_owner"] is None
        to: JobState | None = None
        events: list[NewEvent] = []
        values: dict[str, Any] = {"desired": wish}
        if free and wish == "cancel":
            to = JobState.CANCELLED
            events = [NewEvent(kind="cancelled", message="The job was cancelled while no worker had it.")]
        elif free and wish == "pause" and state is JobState.QUEUED:
            to = JobState.PAUSED
            events = [NewEvent(kind="paused", message="The job rests until it is resumed.")]
        elif free and wish == "run" and state is JobState.PAUSED:
            to = JobState.QUEUED
            events = [NewEvent(kind="resumed", message="The job is in the queue again.")]
            values |= {"failures": 0, "error": None, "not_before": self.database.now}
        if to is None:
            note = update(jobs).where(jobs.c.id == row["id"]).values(values).returning(jobs)
            row = connection.execute(note).mappings().one()
        else:
            ending = Ending(outcome="cancelled") if to is JobState.CANCELLED else None
            row = change(connection, self.database, row["id"], to=to, events=events, values=values, ending=ending)
        return self._told(connection, row)


def _is_name(model: str) -> bool:
    """A served name or one of the store: nothing that could lead out of a directory."""
    return model.isprintable() and not model.startswith((".", "~")) and "/" not in model and "\\" not in model


def _is_key(key: str) -> bool:
    return 1 <= len(key) <= _KEY_LEN and key.isprintable()


def _invalid(field: str, code: str, message: str) -> InvalidArgument:
    return InvalidArgument(message, code=code, details=[Violation(field=field, code=code, message=message)])
