"""
Files of tenants: streamed to disk while they come, stored once by their content, named by ids alone.

    files/.upload-*   what is still coming, or was cut off
    files/.lock       shared while a file is put in place, exclusive while one is taken away
    files/SHA256      the bytes; several rows, of several tenants even, may mean them

What a user calls a file is a label and never part of a path.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, func, insert, or_, select

from trilithon.errors import BodyTooLarge, Conflict, InvalidArgument, NotFound, Overloaded, Unavailable, Violation
from trilithon_finetune.config import PASSAGES
from trilithon_finetune.jobs.database import Database
from trilithon_finetune.jobs.ids import new_id
from trilithon_finetune.jobs.paging import page_of
from trilithon_finetune.jobs.records import PURPOSES, File, Page, Purpose
from trilithon_finetune.jobs.rows import file_of
from trilithon_finetune.jobs.schema import files, jobs
from trilithon_finetune.jobs.states import FINAL
from trilithon_finetune.paths import StorePaths

_NAME = re.compile(r"[A-Za-z0-9._ -]{1,128}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DAY_MS = 86_400_000
_UPLOAD = ".upload-"
_UPLOAD_S = 86_400.0  # an upload that has written nothing for so long was cut off
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """
    What a tenant may hold.

    Attributes:
        file_bytes: of one file that is sent; what a job made may be larger.
        tenant_bytes, tenant_files: of all its files. tenant_jobs: that are not final.
        file_days: after which an uploaded file goes, unless a live job uses it; None: never.
    """

    file_bytes: int = 512 << 20
    tenant_bytes: int = 10 << 30
    tenant_files: int = 1000
    tenant_jobs: int = 100
    file_days: int | None = None


class Upload:
    """A file on its way: `write` its pieces, then `commit`; leaving the block without that forgets it."""

    def __init__(self, store: Files, *, tenant: str, filename: str, purpose: Purpose, sha256: str | None) -> None:
        self._store, self._tenant, self._filename = store, tenant, filename
        self._purpose, self._wanted = purpose, sha256
        _check(filename, purpose, sha256)
        self._digest, self._bytes = hashlib.sha256(), 0

    def __enter__(self) -> Upload:
        self._store.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._store.directory, prefix=_UPLOAD)
        self._file, self._path = os.fdopen(handle, "wb"), Path(name)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk shows again when the rest of the buffer is written
            self._file.close()
        self._path.unlink(missing_ok=True)

    def write(self, piece: bytes) -> None:
        """Add bytes. Raises BodyTooLarge beyond the limit of one file, Unavailable where the disk is full."""
        self._bytes += len(piece)
        if self._purpose != "fine-tune-results" and self._bytes > self._store.limits.file_bytes:
            raise BodyTooLarge(f"a file must have at most {self._store.limits.file_bytes} bytes. Given: more.")
        self._digest.update(piece)
        with _disk():
            self._file.write(piece)

    def commit(self) -> File:
        """Put it in place. Raises InvalidArgument for no bytes or another digest, Overloaded for a quota."""
        digest = self._digest.hexdigest()
        if self._bytes == 0:
            raise _invalid("file", "empty", "a file must have at least 1 byte. Given: none.")
        if self._wanted not in (None, digest):
            message = f"sha256 must be that of the bytes, which is {digest}. Given: {self._wanted}."
            raise _invalid("sha256", "digest_mismatch", message)
        with _disk():
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._store.place(
            self._path, digest, self._bytes, tenant=self._tenant, filename=self._filename, purpose=self._purpose
        )


class Files:
    """The files of a store."""

    def __init__(self, database: Database, paths: StorePaths, limits: StoreLimits) -> None:
        self.database, self.paths, self.limits = database, paths, limits
        self.directory = paths.root / "files"

    def upload(self, *, tenant: str, filename: str, purpose: Purpose, sha256: str | None = None) -> Upload:
        """Begin a file. Raises InvalidArgument for the name, the purpose or the digest, Overloaded for a quota."""
        upload = Upload(self, tenant=tenant, filename=filename, purpose=purpose, sha256=sha256)
        with self.database.read() as connection:
            self._check_quota(connection, tenant, 0)
        return upload

    def put(self, stream: BinaryIO, *, tenant: str, filename: str, purpose: Purpose, sha256: str | None = None) -> File:
        """Store a stream. Raises as `Upload` does."""
        with self.upload(tenant=tenant, filename=filename, purpose=purpose, sha256=sha256) as upload:
            while piece := stream.read(_CHUNK_BYTES):
                upload.write(piece)
            return upload.commit()

    def get(self, file_id: str, *, tenant: str) -> File:
        """One file. Raises NotFound."""
        with self.database.read() as connection:
            return self.find(connection, file_id, tenant)

    def path(self, file_id: str, *, tenant: str) -> Path:
        """Where its bytes lie. Raises NotFound."""
        return self.paths.file(self.get(file_id, tenant=tenant).sha256)

    def list(self, *, tenant: str, after: str | None, limit: int, purpose: Purpose | None) -> Page[File]:
        """Newest first."""
        with self.database.read() as connection:
            query = select(files).where(files.c.tenant == tenant)
            if purpose is not None:
                query = query.where(files.c.purpose == purpose)
            return page_of(connection, query, files, after=after, limit=limit, tenant=tenant, record=file_of)

    def delete(self, file_id: str, *, tenant: str) -> None:
        """Forget a file. Raises NotFound, or Conflict while a live job reads it."""
        with self.database.write() as connection:
            self.database.take_turns(connection, f"tenant:{tenant}")
            file = self.find(connection, file_id, tenant)
            user = connection.execute(select(jobs.c.id).where(_used_by(file_id)).limit(1)).scalar_one_or_none()
            if user is not None:
                raise Conflict(
                    f"the file {file_id} is read by the job {user}, which has not ended.",
                    code="file_in_use",
                    hint="Cancel the job first, or wait for its end.",
                )
            connection.execute(delete(files).where(files.c.id == file_id))
        self._remove_content(file.sha256)

    def sweep(self) -> int:
        """Take away files beyond their time that no live job reads, and bytes that nobody means; how many went."""
        gone = 0
        for file in self.expired():
            with contextlib.suppress(Conflict, NotFound):
                self.delete(file.id, tenant=file.tenant)
                gone += 1
        with self._content_lock(fcntl.LOCK_EX):
            for path in self.leftovers():
                path.unlink(missing_ok=True)
        return gone

    def expired(self) -> Sequence[File]:
        """Files beyond their time that no live job reads."""
        unused = ~exists().where(_used_by(files.c.id))
        query = select(files).where(files.c.expires_at <= self.database.now, unused)
        with self.database.read() as connection:
            return [file_of(row) for row in connection.execute(query).mappings()]

    def leftovers(self) -> Sequence[Path]:
        """Bytes that nobody means, and uploads that were cut off. Only who holds the lock knows that they stay so."""
        with self.database.read() as connection:
            used = set(connection.execute(select(files.c.sha256).distinct()).scalars())
        found = []
        for path in sorted(self.directory.iterdir()) if self.directory.is_dir() else []:
            with contextlib.suppress(FileNotFoundError):
                is_old_upload = path.name.startswith(_UPLOAD) and time.time() - path.stat().st_mtime > _UPLOAD_S
                if is_old_upload or (_DIGEST.fullmatch(path.name) and path.name not in used):
                    found.append(path)
        return found

    def place(self, path: Path, digest: str, size: int, *, tenant: str, filename: str, purpose: Purpose) -> File:
        """Move written bytes to where their content belongs, and note whose they are."""
        try:
            return self._place(path, digest, size, tenant=tenant, filename=filename, purpose=purpose)
        except Overloaded:
            self._remove_content(digest)
            raise

    def _place(self, path: Path, digest: str, size: int, *, tenant: str, filename: str, purpose: Purpose) -> File:
        with self._content_lock(fcntl.LOCK_SH):
            with _disk():
                os.replace(path, self.paths.file(digest))
                _sync(self.directory)
            with self.database.write() as connection:
                self.database.take_turns(connection, f"tenant:{tenant}")
                self._check_quota(connection, tenant, size)
                days = self.limits.file_days
                values = {
                    "id": new_id("file"),
                    "tenant": tenant,
                    "sha256": digest,
                    "bytes": size,
                    "filename": filename,
                    "purpose": purpose,
                    "created_at": self.database.now,
                    "expires_at": None if days is None else self.database.now + days * _DAY_MS,
                }
                row = connection.execute(insert(files).values(values).returning(files)).mappings().one()
                return file_of(row)

    def find(self, connection: Connection, file_id: str, tenant: str) -> File:
        """One file, in a transaction that is open. Raises NotFound."""
        query = select(files).where(files.c.id == file_id, files.c.tenant == tenant)
        row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise NotFound(f"there is no file {file_id[:64]!r}.", code="file_not_found", hint="List your files.")
        return file_of(row)

    def _check_quota(self, connection: Connection, tenant: str, size: int) -> None:
        query = select(func.count(), func.coalesce(func.sum(files.c.bytes), 0)).where(files.c.tenant == tenant)
        count, total = connection.execute(query).one()
        limits = self.limits
        if count >= limits.tenant_files:
            raise _quota(f"at most {limits.tenant_files} files may be stored. Stored: {count}.")
        if total + size > limits.tenant_bytes:
            raise _quota(f"at most {limits.tenant_bytes} bytes may be stored. Stored: {total}, to add: {size}.")

    def _remove_content(self, digest: str) -> None:
        """Nobody puts the same content in place meanwhile, so no new row can mean what is taken away."""
        with self._content_lock(fcntl.LOCK_EX):
            with self.database.read() as connection:
                used = connection.execute(select(files.c.id).where(files.c.sha256 == digest).limit(1)).first()
            if used is None:
                self.paths.file(digest).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _content_lock(self, kind: int) -> Iterator[None]:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.directory / ".lock").open("a") as file:
            fcntl.flock(file, kind)
            yield


def _used_by(file_id: str | ColumnElement[str]) -> ColumnElement[bool]:
    live = jobs.c.state.not_in([str(state) for state in FINAL])
    passages = jobs.c.config["options"][PASSAGES].as_string()
    return and_(live, or_(jobs.c.training_file == file_id, jobs.c.validation_file == file_id, passages == file_id))


def _check(filename: str, purpose: str, sha256: str | None) -> None:
    wrong = []
    if not _NAME.fullmatch(filename):
        rule = "1 to 128 of letters, digits, dot, dash, underscore and space"
        wrong.append(_violation("filename", "invalid_filename", f"filename must be {rule}. Given: {filename[:128]!r}."))
    if purpose not in PURPOSES:
        message = f"purpose must be one of {', '.join(PURPOSES)}. Given: {purpose[:64]!r}."
        wrong.append(_violation("purpose", "invalid_purpose", message))
    if sha256 is not None and not _DIGEST.fullmatch(sha256):
        message = f"sha256 must be 64 hexadecimal digits in lower case. Given: {sha256[:80]!r}."
        wrong.append(_violation("sha256", "invalid_digest", message))
    if wrong:
        raise InvalidArgument(wrong[0].message, code=wrong[0].code, details=wrong)


def _violation(field: str, code: str, message: str) -> Violation:
    return Violation(field=field, code=code, message=message)


def _invalid(field: str, code: str, message: str) -> InvalidArgument:
    return InvalidArgument(message, code=code, details=[_violation(field, code, message)])


def _quota(message: str) -> Overloaded:
    return Overloaded(message, code="quota_exceeded", hint="Delete files that are not needed any more.")


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(f"the file cannot be stored: {error.strerror}.", code="disk_full") from None


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
