"""A PostgreSQL of the tests' own: its programs are found, a cluster is made in a temporary folder, and removed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

LIMIT_S = 60.0


@dataclass
class Cluster:
    """A PostgreSQL server that listens on loopback and on nothing else."""

    root: Path
    binaries: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until it answers."""
        options = ["-p", str(self.port), "-k", str(self.root), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        command = [*_as_user(), str(self.binaries / "postgres"), "-D", str(self.root / "data"), *options]
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.root)
        self._wait()

    def stop(self) -> None:
        """At once, as when it crashes: connections are cut, nothing is lost."""
        assert self.process is not None
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(LIMIT_S)

    def database(self) -> str:
        """The URL of an empty database: one for all tests, emptied for each."""
        url = self.url("postgres")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return url

    def url(self, name: str) -> str:
        """The URL of a database."""
        return f"postgresql://tests@127.0.0.1:{self.port}/{name}"

    def _wait(self) -> None:
        end = time.monotonic() + LIMIT_S
        while not self._answers():
            assert time.monotonic() < end, "PostgreSQL never answered"
            time.sleep(0.02)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.root / "log").read_text()
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(self.url("postgres"), connect_timeout=2).close()
            return True
        return False


def _as_user() -> list[str]:
    """PostgreSQL refuses to run as root: run it as somebody who owns nothing here."""
    if os.getuid() != 0:
        return []
    return ["setpriv", f"--reuid={_user().pw_uid}", f"--regid={_user().pw_gid}", "--clear-groups"]


def _user() -> pwd.struct_passwd:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return pwd.getpwnam("postgres" if "postgres" in names else "nobody")


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    candidates = [*([Path(found).resolve().parent] if found else []), *folders]
    return next((path for path in candidates if (path / "initdb").exists() and (path / "postgres").exists()), None)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL for the session; tests that need one are skipped where its programs are not installed."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("PostgreSQL's initdb and postgres are neither on PATH nor in /usr/lib/postgresql")
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL does not run as root, and setpriv is not here to run it as another user")
    root = Path(tempfile.mkdtemp(prefix="trilithon-postgres-"))
    if os.getuid() == 0:
        os.chown(root, _user().pw_uid, _user().pw_gid)
    initdb = [
        str(binaries / "initdb"),
        "-D",
        str(root / "data"),
        "-U",
        "tests",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "--no-sync",
    ]
    subprocess.run([*_as_user(), *initdb], check=True, cwd=root, stdout=subprocess.DEVNULL, timeout=LIMIT_S)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster = Cluster(root, binaries, port)
    try:
        cluster.start()
        yield cluster
    finally:
        if cluster.process is not None:
            cluster.stop()
        shutil.rmtree(root)
