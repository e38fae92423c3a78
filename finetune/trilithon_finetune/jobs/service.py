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

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trilithon_finetune.config import JobConfig
from trilithon_finetune.jobs.records import Checkpoint, Event, File, Job, Page, Purpose
from trilithon_finetune.jobs.states import JobState
from trilithon_finetune.paths import StorePaths


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """
    What a tenant may hold.

    Attributes:
        file_bytes: of one file. tenant_bytes, tenant_files: of all its files. tenant_jobs: that are not final.
        file_days: after which an uploaded file goes, unless a live job uses it; None: never.
    """

    file_bytes: int = 512 << 20
    tenant_bytes: int = 10 << 30
    tenant_files: int = 1000
    tenant_jobs: int = 100
    file_days: int | None = None


class Jobs:
    """
    The job store.

    Args:
        url: of the database, `postgresql://...`; None: SQLite in the store's directory.
        paths: the store's directory; made where missing.
    Raises:
        FinetuneError: `store_unavailable`: a network file system under SQLite, or a newer schema.
    """

    def __init__(self, url: str | None, paths: StorePaths, *, limits: StoreLimits | None = None) -> None:
        self.paths, self.limits = paths, limits or StoreLimits()

    def close(self) -> None:
        """Release the database's connections."""
        raise NotImplementedError

    def create(self, config: JobConfig, *, tenant: str, idempotency_key: str | None = None) -> Job:
        """
        A new job, in `validating`.

        Args:
            config: its files must be file ids of this tenant.
            idempotency_key: within 24 h the same key with the same configuration answers with the first job.
        Raises:
            InvalidArgument: a file is not this tenant's, or has another purpose.
            Conflict: `idempotency_mismatch`, the key came with another configuration.
            Overloaded: `quota_exceeded`, the tenant has too many live jobs.
        """
        raise NotImplementedError

    def get(self, job_id: str, *, tenant: str) -> Job:
        """One job. Raises NotFound."""
        raise NotImplementedError

    def list(
        self, *, tenant: str, after: str | None = None, limit: int = 20, states: Sequence[JobState] = ()
    ) -> Page[Job]:
        """Newest first, those behind the job `after`; `limit` from 1 to 100."""
        raise NotImplementedError

    def cancel(self, job_id: str, *, tenant: str) -> Job:
        """Ask for its end. Again is no error. Raises FailedPrecondition in a final state."""
        raise NotImplementedError

    def pause(self, job_id: str, *, tenant: str) -> Job:
        """Ask for a checkpoint and a rest. Again is no error. Raises FailedPrecondition in a final state."""
        raise NotImplementedError

    def resume(self, job_id: str, *, tenant: str) -> Job:
        """Go on from the last checkpoint, or withdraw a pause. Raises FailedPrecondition in a final state."""
        raise NotImplementedError

    def events(self, job_id: str, *, tenant: str, after_seq: int = 0, limit: int = 100) -> list[Event]:
        """Events with a larger seq, oldest first; `limit` from 1 to 1000."""
        raise NotImplementedError

    def checkpoints(self, job_id: str, *, tenant: str, after: str | None = None, limit: int = 20) -> Page[Checkpoint]:
        """Newest first, those behind the checkpoint `after`."""
        raise NotImplementedError

    def metrics(self, job_id: str, *, tenant: str) -> list[dict[str, Any]]:
        """The whole series, one object a step, as the trainer wrote it; empty before the first."""
        raise NotImplementedError

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
        raise NotImplementedError

    async def receive_file(
        self, stream: AsyncIterator[bytes], *, tenant: str, filename: str, purpose: Purpose, sha256: str | None = None
    ) -> File:
        """`put_file` for an event loop; the disk and the database are waited for in threads."""
        raise NotImplementedError

    def get_file(self, file_id: str, *, tenant: str) -> File:
        """One file. Raises NotFound."""
        raise NotImplementedError

    def list_files(
        self, *, tenant: str, after: str | None = None, limit: int = 20, purpose: Purpose | None = None
    ) -> Page[File]:
        """Newest first, those behind the file `after`."""
        raise NotImplementedError

    def delete_file(self, file_id: str, *, tenant: str) -> None:
        """Forget a file. Raises NotFound, or Conflict `file_in_use` while a live job reads it."""
        raise NotImplementedError

    def file_path(self, file_id: str, *, tenant: str) -> Path:
        """Where its bytes lie; never to be shown. Raises NotFound."""
        raise NotImplementedError
