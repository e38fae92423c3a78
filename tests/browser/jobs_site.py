"""What tests of the jobs page stand on: a server with jobs and keys, the store behind it, and a wire to cut."""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from browser.pages import Server, Watched
from jobs_server import Worker
from playwright.sync_api import Locator, Page

from trilithon_finetune.config import JobConfig
from trilithon_finetune.errors import JobError
from trilithon_finetune.jobs.moves import NewEvent
from trilithon_finetune.jobs.queue import Claim, Move, NewCheckpoint
from trilithon_finetune.jobs.records import Job, Level, Progress
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.jobs.settings import WorkerSettings
from trilithon_finetune.jobs.states import JobState
from trilithon_finetune.jobs.worker import Worker as RealWorker

TENANT = "acme"
KEY, SLOW_KEY = "sk-jobs-page", "sk-jobs-page-slow"
KEYS = f"{KEY} tenant={TENANT}\n{SLOW_KEY} tenant={TENANT} requests_per_minute=1\n"
STAND_IN = str(Path(__file__).parents[1] / "jobs" / "stand_in.py")
PATIENCE_MS = 60_000  # the machine may be busy


@dataclass
class Run:
    """A running job that a test moves by hand."""

    site: Site
    job: Job
    claim: Claim
    offset: int = 0

    def tell(
        self, kind: str, message: str = "", *, level: Level = "info", progress: Progress | None = None, **data: Any
    ) -> None:
        """An event, and what the job's progress is then."""
        self.offset += 1
        step = data.get("step") if kind == "step" else None
        event = NewEvent(kind=kind, level=level, message=message or kind, data=data, step=step)
        values = None if progress is None else {"progress": self.site.progress(progress)}
        self.site.worker.queue.write(self.claim, Move(None, (event,)), offset=self.offset, values=values)

    def step(self, step: int, loss: float | None, **data: Any) -> None:
        """An optimizer step of 100."""
        progress = Progress(step=step, total_steps=100, seconds_remaining=3 * (100 - step))
        self.tell("step", f"Step {step}.", progress=progress, step=step, total_steps=100, train_loss=loss, **data)

    def saved(self, step: int, **metrics: float) -> None:
        """A checkpoint."""
        self.offset += 1
        event = NewEvent(kind="checkpoint_saved", message=f"Checkpoint of step {step}.", data={"step": step})
        row = NewCheckpoint(step=step, digest="d" * 64, bytes=3 << 20, metrics=metrics)
        self.site.worker.queue.write(self.claim, Move(None, (event,)), offset=self.offset, saved=(row,))

    def failed(self, error: JobError) -> None:
        """The bad end."""
        event = NewEvent(kind="failed", level="error", message=error.message)
        values = {"error": error.to_json()}
        self.site.worker.queue.write(self.claim, Move(JobState.FAILED, (event,)), values=values, release=True)


@dataclass
class Site:
    """A server with jobs; `model`: the base model's directory."""

    server: Server
    jobs: Jobs
    model: Path
    worker: Worker = field(init=False)
    running: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.worker = Worker(self.jobs)

    def job(self, content: bytes = b"{}\n", *, name: str = "rows.jsonl", **config: Any) -> Job:
        """A job that waits for validation."""
        file = self.jobs.put_file(io.BytesIO(content), tenant=TENANT, filename=name, purpose="fine-tune")
        document = {"model": self.model.name, "training_file": file.id, **config}
        return self.jobs.create(JobConfig.model_validate(document), tenant=TENANT)

    def run(self, *, report: dict[str, Any] | None = None, **config: Any) -> Run:
        """A running job."""
        job = self.job(**config)
        resolved = {**job.config, "training": {**job.config["training"], "epochs": 3}}
        estimate = {"allowed": True, "steps": 100, "train_tokens": 5000, "supervised_tokens": 2000, "findings": [],
                    "peak_bytes_per_rank": 1 << 30, "available_bytes_per_rank": 4 << 30, "disk_bytes": 1 << 20,
                    "disk_free_bytes": 1 << 30, "seconds": 300.0, "seconds_low": 200.0, "seconds_high": 600.0,
                    "measured": False, "memory_parts": {"weights": 1 << 29}}  # fmt: skip
        self.worker.validated(job.id, resolved=resolved, report=report, estimate=estimate)
        self.running.append(Run(self, job, self.worker.running(job.id)))
        return self.running[-1]

    def again(self, run: Run) -> Run:
        """The next attempt of a run whose first one is lost."""
        lost = Move(JobState.QUEUED, (NewEvent(kind="attempt_failed", level="warn", message="A rank was lost."),))
        self.worker.queue.write(run.claim, lost, release=True, wait_s=0)
        self.running[self.running.index(run)] = Run(self, run.job, self.worker.running(run.job.id))
        return self.running[-1]

    def end(self) -> None:
        """End every run, so that no test finds another's jobs alive."""
        for run in self.running:
            if not self.get(run.job).finished:
                run.failed(JobError(code="time_limit", message="The test is over."))
        self.running.clear()

    def get(self, job: Job) -> Job:
        """The job as it is now."""
        return self.jobs.get(job.id, tenant=TENANT)

    def progress(self, progress: Progress) -> dict[str, Any]:
        """As the table has it."""
        return {name: getattr(progress, name) for name in Progress.__slots__}

    @contextlib.contextmanager
    def working(self, job_id: str) -> Iterator[None]:
        """A worker that takes this one job, with stand-ins for its phases."""
        settings = WorkerSettings(
            look_s=0.02, tick_s=0.02, renew_s=0.2, backoff_s=0.0, models={self.model.name: self.model},
            phase_command=(sys.executable, STAND_IN), train_command=(sys.executable, STAND_IN, "train"),
        )  # fmt: skip
        stop = threading.Event()
        thread = threading.Thread(target=RealWorker(self.jobs, settings, only=job_id).run, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(60)
            assert not thread.is_alive()


class Wire:
    """A TCP relay in front of a server: connections can be cut, new ones refused, and all of them fall silent."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._up = True
        self._flows = threading.Event()
        self._flows.set()
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.origin = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        """Break every connection, and refuse new ones until `mend`."""
        self._up = False
        self._flows.set()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def freeze(self) -> None:
        """Let nothing through any more, and tell nobody."""
        self._flows.clear()

    def mend(self) -> None:
        """Let connections through again."""
        self._up = True
        self._flows.set()

    def close(self) -> None:
        """Cut, and listen no more."""
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        for end in self._ends:
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._up:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._to))
            self._ends += [near, far]
            for a, b in ((near, far), (far, near)):
                self._threads.append(threading.Thread(target=self._pump, args=(a, b), daemon=True))
                self._threads[-1].start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._flows.wait()
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


def enter_key(page: Page, key: str = KEY) -> None:
    """Give the page the key that it asks for."""
    page.wait_for_selector("#key-form:not([hidden])")
    page.fill("#key", key)
    page.press("#key", "Enter")
    page.wait_for_selector("#ready[data-state=up]")


def posted(watched: Watched, path: str) -> list[dict[str, Any]]:
    """The bodies that the page has posted there."""
    return [body for where, body in watched.bodies if where == path]


def rows(*documents: Any) -> bytes:
    """A data file."""
    return "".join(json.dumps(document) + "\n" for document in documents).encode()


def row(page: Page, job: Job) -> Locator:
    """A job's row in the list."""
    return page.locator(f".job-row[href='#{job.id}']")


def points(page: Page, column: str) -> int:
    """Points of a curve's line."""
    d = page.locator(f"path.curve.{column}").last.get_attribute("d") or ""
    return len(re.findall(r"[ML]", d))
