"""One server with jobs for all tests of this folder; no worker: tests move jobs with the store's own functions."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import served
from front_server import ACME, KEYS, MODEL, OTHER, bearer
from jobs_server import JobsServer
from postgres import cluster
from served import serving
from tiny import tiny_llama

from trilithon import Client
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.paths import StorePaths

__all__ = ["cluster"]  # a fixture, where pytest looks for it

HERE = Path(__file__).parent
LIMITS = ("--set", "limits.max_file_bytes=1MiB", "--set", "limits.body_timeout_s=5")


@contextlib.contextmanager
def serving_jobs(folder: Path, *flags: str, database: str | None = None, **env: str) -> Iterator[JobsServer]:
    """Serve a tiny model and jobs, with keys; `database`: PostgreSQL's URL in place of SQLite."""
    keys, store = folder / "keys", folder / "store"
    flags = (*flags, "--jobs-database", database) if database is not None else flags
    keys.write_text(KEYS)
    keys.chmod(0o600)
    store.mkdir()
    catalog = f"server.catalog={StorePaths(store).models}"
    jobs_flags = ("--dtype", "fp32", "--kv-cache-bytes", "16MiB", "--jobs", str(store), "--set", catalog)
    flags = ("--api-keys-file", str(keys), *jobs_flags, *flags)
    variables = {"PYTHONPATH": os.pathsep.join((str(HERE), os.environ.get("PYTHONPATH", ""))), **env}
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # for the start alone: other folders serve in the same session
            patch.setattr(served, "COMMAND", [sys.executable, str(HERE / "serve_with_jobs.py")])
            server = stack.enter_context(serving(tiny_llama(folder / MODEL), *flags, env=variables))
        http = stack.enter_context(httpx.Client(base_url=server.url, timeout=60, headers=bearer(ACME)))
        jobs = Jobs(database, StorePaths(store))
        stack.callback(jobs.close)
        yield JobsServer(server, http, jobs, folder / MODEL)


@pytest.fixture(scope="session")
def served_jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobsServer]:
    """The server of the folder, on SQLite; a module that wants another database has a fixture of this name."""
    with serving_jobs(tmp_path_factory.mktemp("jobs"), *LIMITS) as running:
        yield running


@pytest.fixture
def start_jobs(tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[JobsServer]]:
    """A function that starts a server with jobs for one test alone."""
    return functools.partial(serving_jobs, tmp_path)


@pytest.fixture(params=["http", "grpc"])
def client(request: Any, served_jobs: JobsServer) -> Iterator[Client]:
    """A client of tenant acme, over each protocol."""
    server = served_jobs.server
    url = server.url if request.param == "http" else server.grpc_target
    with Client(url, api_key=ACME) as made:
        yield made


@pytest.fixture(params=["http", "grpc"])
def stranger(request: Any, served_jobs: JobsServer) -> Iterator[Client]:
    """A client of another tenant, over each protocol."""
    server = served_jobs.server
    url = server.url if request.param == "http" else server.grpc_target
    with Client(url, api_key=OTHER) as made:
        yield made
