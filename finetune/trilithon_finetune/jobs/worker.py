"""
The worker: takes jobs from the store and walks them to their end.

    python -m trilithon_finetune.jobs.worker --store DIR --slots 2

One thread a slot, one more for validations, so that a queue of long jobs does not keep new ones from being checked.
Several workers share a store, on several hosts where the database is PostgreSQL and the directory is shared. SIGTERM
and SIGINT end a worker in good order: its jobs write a checkpoint and go back into the queue.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from sqlalchemy.engine import make_url

from trilithon.errors import Unavailable
from trilithon_finetune.errors import FinetuneError
from trilithon_finetune.jobs.clean import clean
from trilithon_finetune.jobs.launch import Launcher, LocalLauncher
from trilithon_finetune.jobs.leases import Lease
from trilithon_finetune.jobs.queue import Claim, Queue
from trilithon_finetune.jobs.recover import recover
from trilithon_finetune.jobs.run import JobRun
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.jobs.settings import WorkerSettings
from trilithon_finetune.jobs.states import JobState
from trilithon_finetune.paths import StorePaths
from trilithon_server.catalog import CatalogError

_log = logging.getLogger(__name__)


class Worker:
    """
    A worker of the store behind `jobs`.

    Args:
        launcher: by default processes of this host.
        only: the one job that it takes; None: any.
    """

    def __init__(
        self, jobs: Jobs, settings: WorkerSettings, *, launcher: Launcher | None = None, only: str | None = None
    ) -> None:
        self.jobs, self.settings, self.launcher = jobs, settings, launcher or LocalLauncher()
        self.owner = f"{socket.gethostname()[:64]}:{os.getpid()}:{secrets.token_hex(4)}"
        self._queue, self._only = Queue(jobs.database), only

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set and every job is given back."""
        states = [JobState.VALIDATING, *[JobState.QUEUED] * self.settings.slots]
        threads = [threading.Thread(target=self._slot, args=(state, stop), name=f"slot-{state}") for state in states]
        for thread in threads:
            thread.start()
        swept = time.monotonic()
        while not stop.wait(self.settings.look_s):
            if time.monotonic() - swept > self.settings.sweep_s:
                swept = time.monotonic()
                self._clean()
        for thread in threads:
            thread.join()

    def work_once(self, state: JobState, stop: threading.Event) -> bool:
        """Look after one job that was left behind, or do one in `state`; False when there was neither."""
        since = time.monotonic()
        lost = self._queue.take_over(owner=self.owner, lease_s=self.settings.lease_s, only=self._only)
        if lost is not None:
            recover(self._lease(lost, since), jobs=self.jobs, launcher=self.launcher, settings=self.settings)
            return True
        since = time.monotonic()
        claim = self._queue.claim(state, owner=self.owner, lease_s=self.settings.lease_s, only=self._only)
        if claim is None:
            return False
        lease = self._lease(claim, since)
        JobRun(lease, jobs=self.jobs, launcher=self.launcher, settings=self.settings, stop=stop)()
        return True

    def _slot(self, state: JobState, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                worked = self.work_once(state, stop)
            except Unavailable as error:
                _log.warning("%s", error)
                worked = False
            except Exception:  # a bug of ours costs this job its lease, not the worker its slot
                _log.exception("a slot failed; the job is taken up again when its lease has run out")
                worked = False
            if not worked:
                stop.wait(self.settings.look_s)

    def _lease(self, claim: Claim, since: float) -> Lease:
        settings = self.settings
        return Lease(
            self._queue, claim, since=since, lease_s=settings.lease_s, renew_s=settings.renew_s, look_s=settings.look_s
        )

    def _clean(self) -> None:
        """Beside the jobs: nobody reads what goes."""
        try:
            gone = clean(self.jobs)
        except (Unavailable, OSError, CatalogError, FinetuneError) as error:
            _log.warning("the store is not cleaned for now: %s", error)
        else:
            _log.info("cleaned the store of %d things, %d bytes", len(gone), sum(item.bytes for item in gone))


def main(arguments: list[str] | None = None) -> int:
    """Run a worker until a signal comes; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trilithon_finetune.jobs.worker", description="Work on jobs.")
    parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="the job store's directory")
    parser.add_argument("--database", metavar="URL", help="postgresql://HOST/NAME [SQLite in the store]")
    parser.add_argument("--slots", type=int, default=1, metavar="N", help="jobs at a time [1]")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR", help="a base model's directory")
    parser.add_argument("--concepts", type=Path, metavar="PATH", help="facts that rows may be labelled by")
    options = parser.parse_args(arguments)
    if options.slots < 1:
        parser.error(f"--slots must be at least 1. Given: {options.slots}.")
    if options.database and "://" in options.database and make_url(options.database).password:
        parser.error("--database must hold no password: others can read it there. Put it into ~/.pgpass.")
    models = dict(item.split("=", 1) for item in options.model if "=" in item)
    if len(models) != len(options.model):
        parser.error("--model takes NAME=DIR, each name once.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    settings = WorkerSettings(
        slots=options.slots,
        models={name: Path(path) for name, path in models.items()},
        concepts={} if options.concepts is None else {options.concepts.stem: options.concepts},
    )
    return run_worker(options.store, options.database, settings)


def run_worker(store: Path, database: str | None, settings: WorkerSettings) -> int:
    """Open the store and work until SIGTERM or SIGINT; from the main thread. Returns 0, or 2 where it cannot open."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        jobs = Jobs(database, StorePaths(store.resolve()))
    except FinetuneError as error:
        _log.error("%s", error)
        return 2
    try:
        Worker(jobs, settings).run(stop)
    finally:
        jobs.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
