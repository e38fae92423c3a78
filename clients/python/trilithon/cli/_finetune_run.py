"""`trilithon finetune run`: a job in the foreground, in the store of this machine, by a worker of this process."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from trilithon._job_types import Job
from trilithon.cli._finetune_follow import Follow
from trilithon.cli._finetune_store import StoreDoor
from trilithon_finetune.jobs.settings import WorkerSettings
from trilithon_finetune.jobs.worker import Worker, run_worker


def work(store: Path, database: str | None, *, slots: int) -> int:
    """A worker until SIGTERM or Ctrl-C; its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    return run_worker(store, database, WorkerSettings(slots=slots))


def in_foreground(
    door: StoreDoor, job: Job, *, after_seq: int = 0, settings: WorkerSettings | None = None
) -> tuple[Job, bool]:
    """
    Work on a job until it is over or at rest, and show how it goes.

    Ctrl-C, or SIGTERM, lets it write a checkpoint and rest.

    Args:
        after_seq: the last event that is known already.
    Returns:
        The job as it is then, and whether it was interrupted.
    """
    interrupted = False
    with _working(door, job.id, settings or WorkerSettings(look_s=0.2)), Follow() as follow:
        seen = after_seq
        while True:
            try:
                for event in door.events(job.id, follow=True, after_seq=seen):
                    seen = event.seq
                    follow(event)
                    if event.kind == "paused" and door.get(job.id).state == "paused":
                        break
                break
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                follow.say("interrupted: the job writes a checkpoint and rests. Ctrl-C again leaves at once.")
                if not door.get(job.id).finished:
                    door.pause(job.id)
    return door.get(job.id), interrupted


@contextlib.contextmanager
def _working(door: StoreDoor, job_id: str, settings: WorkerSettings) -> Iterator[None]:
    """A worker for this job alone in a thread, and SIGTERM as Ctrl-C; at the end the worker ends in good order."""
    stop = threading.Event()
    worker = Worker(door.jobs, settings, only=job_id)
    thread = threading.Thread(target=worker.run, args=(stop,), name="worker")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)
