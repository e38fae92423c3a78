"""Stores on both databases, and workers whose phases are stand-ins."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from postgres import Cluster, cluster

from trilithon_finetune.config import JobConfig, parse_config
from trilithon_finetune.jobs.records import Event, Job
from trilithon_finetune.jobs.service import Jobs, StoreLimits
from trilithon_finetune.jobs.settings import WorkerSettings
from trilithon_finetune.jobs.states import FINAL, JobState
from trilithon_finetune.jobs.worker import Worker
from trilithon_finetune.paths import StorePaths

__all__ = ["Cluster", "cluster"]  # the fixture, where pytest looks for it

STAND_IN = str(Path(__file__).with_name("stand_in.py"))
TENANT = "acme"
LIMIT_S = 60.0
SETTINGS: dict[str, Any] = {
    "lease_s": 30.0,
    "renew_s": 0.2,
    "look_s": 0.02,
    "tick_s": 0.02,
    "backoff_s": 0.0,
    "grace_s": 10.0,
    "phase_command": (sys.executable, STAND_IN),
    "train_command": (sys.executable, STAND_IN, "train"),
}

_WORKER = """
import json, logging, sys
from pathlib import Path
from trilithon_finetune.jobs.settings import WorkerSettings
from trilithon_finetune.jobs.worker import run_worker
store, database, settings = json.loads(sys.argv[1])
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(process)d %(message)s")
settings["models"] = {name: Path(path) for name, path in settings["models"].items()}
for name in ("phase_command", "train_command"):
    settings[name] = tuple(settings[name])
sys.exit(run_worker(Path(store), database, WorkerSettings(**settings)))
"""


def wait_until(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    """Poll until `condition` holds; the test fails with `what` when it never does."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] in ("Z", "X")
    except OSError:
        return True


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """The database of a store: None for SQLite in its directory."""
    return None if request.param == "sqlite" else request.getfixturevalue("cluster").database()


# -- stores and workers -------------------------------------------------------------------------------------------


@dataclass
class Store:
    """A store with one uploaded file and a model directory, and what tests do with it."""

    jobs: Jobs
    url: str | None
    file_id: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        file = self.jobs.put_file(io.BytesIO(b"{}\n"), tenant=TENANT, filename="rows.jsonl", purpose="fine-tune")
        self.file_id = file.id
        (self.jobs.paths.root / "base").mkdir(exist_ok=True)

    def config(self, **fields: Any) -> JobConfig:
        """A job's configuration."""
        return parse_config({"model": "base", "training_file": self.file_id, **fields})

    def create(self, *, tenant: str = TENANT, **fields: Any) -> Job:
        """A new job; `fields` of its configuration."""
        return self.jobs.create(self.config(**fields), tenant=tenant)

    def get(self, job: Job) -> Job:
        """The job as it is now."""
        return self.jobs.get(job.id, tenant=job.tenant)

    def events(self, job: Job) -> list[Event]:
        """All its events."""
        found: list[Event] = []
        while page := self.jobs.events(job.id, tenant=job.tenant, after_seq=found[-1].seq if found else 0, limit=1000):
            found += page
        return found

    def kinds(self, job: Job) -> list[str]:
        """The kinds of its events."""
        return [event.kind for event in self.events(job)]

    def marks(self, job: Job) -> list[list[str]]:
        """What its processes marked: word, phase, attempt, rank, pid."""
        path = self.jobs.paths.job(job.id).root / "marks" / "log"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def go(self, job: Job) -> None:
        """Let what blocks go on."""
        (self.jobs.paths.job(job.id).root / "go").touch()

    def settings(self, **changes: Any) -> WorkerSettings:
        """Of a worker whose phases are stand-ins."""
        models = {"base": self.jobs.paths.root / "base"}
        return WorkerSettings(**{**SETTINGS, "models": models, **changes})

    def worker(self, **changes: Any) -> Worker:
        """A worker in this process."""
        return Worker(self.jobs, self.settings(**changes))

    def work(self, *, stop: threading.Event | None = None, **changes: Any) -> None:
        """Work here until there is nothing to do."""
        worker, stop = self.worker(**changes), stop or threading.Event()
        while any([worker.work_once(JobState.VALIDATING, stop), worker.work_once(JobState.QUEUED, stop)]):
            pass

    @contextlib.contextmanager
    def working(self, **changes: Any) -> Iterator[threading.Event]:
        """A worker in a thread while the block runs; the event stops it."""
        stop = threading.Event()
        thread = threading.Thread(target=self.worker(**changes).run, args=(stop,))
        thread.start()
        try:
            yield stop
        finally:
            stop.set()
            thread.join(LIMIT_S)
            assert not thread.is_alive()

    def spawn(self, **changes: Any) -> subprocess.Popen[bytes]:
        """A worker in a process of its own; the fixture ends it."""
        settings = {**SETTINGS, "models": {"base": str(self.jobs.paths.root / "base")}, **changes}
        arguments = json.dumps([str(self.jobs.paths.root), self.url, settings])
        with (self.jobs.paths.root / "worker.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-c", _WORKER, arguments], stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def wait(self, job: Job, *states: JobState) -> Job:
        """Until the job is in one of `states`, by default a final one."""
        wanted = states or tuple(FINAL)
        wait_until(lambda: self.get(job).state in wanted, f"{job.id} becomes {wanted}")
        return self.get(job)

    def close(self) -> None:
        """End what was started."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(LIMIT_S)
        self.jobs.close()


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """A function that opens a store on a database, with limits; closed at the end."""
    stores: list[Store] = []

    def make(url: str | None, limits: StoreLimits | None = None) -> Store:
        paths = StorePaths(tmp_path / f"store{len(stores)}")
        stores.append(Store(Jobs(url, paths, limits=limits), url))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(make_store: Callable[..., Store], database_url: str | None) -> Store:
    """A store, once on each database."""
    return make_store(database_url)


def check_history(store: Store, job: Job) -> None:
    """What holds of every job at any time: events count up without a gap, and an end comes once and last."""
    events = store.events(job)
    seqs = [event.seq for event in events]
    ends = [event.seq for event in events if event.kind in ("succeeded", "failed", "cancelled")]
    assert seqs == list(range(1, len(events) + 1))
    assert ends == ([seqs[-1]] if store.get(job).finished else [])
    assert not [mark for mark in store.marks(job) if mark[0] == "OVERLAP"]
