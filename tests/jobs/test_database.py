"""Opening a store: the schema's steps, and what is refused with a reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from trilithon.errors import Unavailable
from trilithon_finetune.errors import FinetuneError
from trilithon_finetune.jobs.database import Database
from trilithon_finetune.jobs.filesystem import network_file_system
from trilithon_finetune.jobs.schema import metadata
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.jobs.worker import main
from trilithon_finetune.paths import StorePaths


def test_migrations_build_the_schema(database_url: str | None, tmp_path: Path) -> None:
    """What the steps build is what the tables say, to the type; opening again changes nothing."""
    for _ in range(2):
        database = Database(database_url, tmp_path / "jobs.db")
        with database.read() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            differences = compare_metadata(context, metadata)
        database.close()

        assert differences == []


def test_newer_schema_is_refused(database_url: str | None, tmp_path: Path) -> None:
    """A store that a newer version has changed is left alone, with a sentence."""
    database = Database(database_url, tmp_path / "jobs.db")
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    database.close()

    with pytest.raises(FinetuneError, match=r"schema is '9999', which this version .* does not know") as caught:
        Database(database_url, tmp_path / "jobs.db")
    assert caught.value.error.code == "store_unavailable"


def test_several_processes_open_a_new_store_at_once(database_url: str | None, tmp_path: Path) -> None:
    """One builds the schema, the others wait for it; none fails."""
    code = (
        "import sys; from pathlib import Path; from trilithon_finetune.jobs.database import Database;"
        "Database(sys.argv[2] or None, Path(sys.argv[1])).close()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "new" / "jobs.db"), database_url or ""]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    ends = [(process.communicate(timeout=60)[1], process.returncode) for process in processes]

    assert ends == [(b"", 0)] * 4


def test_sqlite_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the file system, the reason and what to do."""
    assert network_file_system(tmp_path) is None
    monkeypatch.setattr("trilithon_finetune.jobs.filesystem._magic", lambda path: 0x6969)

    with pytest.raises(
        FinetuneError, match=r"network file system \(nfs\), where SQLite's locks do not hold.*PostgreSQL"
    ):
        Jobs(None, StorePaths(tmp_path / "store"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://host/name", r"must be postgresql://\.\.\. Given: mysql"),
        ("nonsense", "must be a URL"),
        ("postgresql://tests:secret@127.0.0.1:1/none", "does not answer"),
    ],
    ids=["other", "no url", "nobody there"],
)
def test_unusable_database_is_a_sentence_without_its_password(tmp_path: Path, url: str, message: str) -> None:
    """What is wrong with the database, and no secret."""
    with pytest.raises(FinetuneError, match=message) as caught:
        Database(url, tmp_path / "jobs.db")

    assert "secret" not in str(caught.value)


def test_transaction_that_fails_leaves_nothing(database_url: str | None, tmp_path: Path) -> None:
    """An error in the block undoes what was written in it."""
    database = Database(database_url, tmp_path / "jobs.db")
    with pytest.raises(ZeroDivisionError), database.write() as connection:  # noqa: PT012  # the block is the point
        connection.exec_driver_sql("DELETE FROM alembic_version")
        raise ZeroDivisionError
    with database.read() as connection:
        left = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one()
    database.close()

    assert left == "0001"


def test_sqlite_that_stays_locked_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that waits longer than the busy timeout gets the error that callers wait out."""
    monkeypatch.setattr("trilithon_finetune.jobs.database._BUSY_S", 0.05)
    database = Database(None, tmp_path / "jobs.db")
    with database.write(), pytest.raises(Unavailable, match="database is locked"), database.write():
        pass
    database.close()


def test_worker_refuses_a_password_on_its_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every process of the host could read it."""
    with pytest.raises(SystemExit):
        main(["--store", str(tmp_path), "--database", "postgresql://me:secret@host/name"])

    assert "must hold no password" in capsys.readouterr().err
