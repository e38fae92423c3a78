"""
The database under the job store: SQLite in the store's directory, or PostgreSQL, behind the same few calls.

Transactions are short and say whether they write. On SQLite a writing one begins by BEGIN IMMEDIATE: a reader that
turned writer in mid-transaction would fail with "database is locked" however long the busy timeout. Whatever makes the
database unreachable becomes one error, `Unavailable`, which callers may wait out.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import BigInteger, ColumnElement, Connection, Engine, cast, create_engine, event, func, literal, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from trilithon.errors import Unavailable
from trilithon_finetune.errors import refuse
from trilithon_finetune.jobs.filesystem import network_file_system
from trilithon_finetune.jobs.upgrade import upgrade

_BUSY_S = 5.0
_CONNECT_S = 5
# A statement that waits longer for a lock, or runs longer, gives up; so does a worker that vanished in a transaction.
_POSTGRES = "-c lock_timeout=5s -c statement_timeout=15s -c idle_in_transaction_session_timeout=30s"


class Database:
    """
    An open database with this version's schema.

    Args:
        url: `postgresql://...`; None: SQLite at `path`.
        path: of the SQLite file; its directory is made where missing.
        clock: Unix milliseconds, for tests; by default PostgreSQL's own clock, and the host's under SQLite, which
            only processes of one host can share.
    Raises:
        FinetuneError: `store_unavailable`: not a URL of PostgreSQL, a network file system under SQLite, a newer schema,
            or no database there.
    """

    def __init__(self, url: str | None, path: Path, *, clock: Callable[[], int] | None = None) -> None:
        self._clock = clock
        self.is_sqlite = url is None
        self._engine = self._sqlite(path) if url is None else self._postgresql(url)
        try:
            with self._opening(path), self.write() as connection:
                self.take_turns(connection, "upgrade")
                upgrade(connection)
        except Unavailable as error:
            self.close()
            raise refuse("store_unavailable", error.message, hint=error.hint) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release all connections."""
        self._engine.dispose()

    @property
    def now(self) -> ColumnElement[int]:
        """Unix milliseconds, as part of a statement."""
        if self._clock is not None:
            return literal(self._clock(), BigInteger)
        if self.is_sqlite:
            return literal(time.time_ns() // 1_000_000, BigInteger)
        return cast(func.extract("epoch", func.clock_timestamp()) * 1000, BigInteger)

    def read(self) -> contextlib.AbstractContextManager[Connection]:
        """A transaction that only reads. Raises Unavailable."""
        return self._transaction(write=False)

    def write(self) -> contextlib.AbstractContextManager[Connection]:
        """A transaction that writes, committed at the end of the block. Raises Unavailable."""
        return self._transaction(write=True)

    def take_turns(self, connection: Connection, key: str) -> None:
        """Until the transaction ends, whoever takes turns by the same key waits. SQLite's writers do so anyway."""
        if not self.is_sqlite:
            number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": number})

    @contextlib.contextmanager
    def _transaction(self, *, write: bool) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                connection = connection.execution_options(trilithon_write=write)
                with connection.begin():
                    yield connection
        except (OperationalError, InterfaceError, PoolTimeout, sqlite3.OperationalError) as error:
            raise _unavailable(error) from error
        except DBAPIError as error:
            if error.connection_invalidated:
                raise _unavailable(error) from error
            raise

    @contextlib.contextmanager
    def _opening(self, path: Path) -> Iterator[None]:
        """One process at a time turns a new SQLite file to its write-ahead log, which no busy timeout waits for."""
        if not self.is_sqlite:
            yield
            return
        with path.with_suffix(".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _sqlite(self, path: Path) -> Engine:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        kind = network_file_system(path.parent)
        if kind is not None:
            raise refuse(
                "store_unavailable",
                f"the job store {path.parent} is on a network file system ({kind}), where SQLite's locks do not hold.",
                hint="Move the store to a local disk, or give a PostgreSQL URL as the database.",
            )
        engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": _BUSY_S})
        event.listen(engine, "connect", _on_sqlite_connect)
        event.listen(engine, "begin", _on_sqlite_begin)
        return engine

    def _postgresql(self, url: str) -> Engine:
        try:
            parsed = make_url(url)
        except ArgumentError:
            raise refuse("store_unavailable", "the database must be a URL, postgresql://HOST/NAME.") from None
        if parsed.drivername not in ("postgresql", "postgresql+psycopg"):
            message = f"the database must be postgresql://... Given: {parsed.drivername}://..."
            raise refuse("store_unavailable", message, hint="Without one, SQLite in the store's directory is used.")
        return create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,
            connect_args={"connect_timeout": _CONNECT_S, "options": _POSTGRES, "application_name": "trilithon"},
        )


def _on_sqlite_connect(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; _on_sqlite_begin does
    cursor = connection.cursor()
    mode = cursor.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()
    if mode != "wal":
        raise refuse("store_unavailable", f"SQLite cannot use a write-ahead log here (it chose {mode!r}).")


def _on_sqlite_begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("trilithon_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _unavailable(error: Exception) -> Unavailable:
    cause = getattr(error, "orig", None) or error
    name = type(cause).__name__
    if isinstance(cause, psycopg.Error) and cause.sqlstate:
        name = f"{name}, SQLSTATE {cause.sqlstate}"
    elif not isinstance(cause, psycopg.Error):
        name = f"{name}: {cause}"  # SQLite's words hold no address
    return Unavailable(
        f"the job store's database does not answer ({name}).", code="store_unavailable", retry_after_s=1.0
    )
