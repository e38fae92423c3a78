"""
What becomes of a job whose worker was lost: a worker that took it over puts it back in order, and into the queue.

Nothing of the old attempt may run on: its lease file goes first, so that nothing new starts; then whoever holds the
job's lock is killed; then what the attempt still said is read. Only then is there another attempt.
"""

from __future__ import annotations

import logging

from trilithon_finetune.errors import JobError
from trilithon_finetune.jobs.ends import give_up, rest
from trilithon_finetune.jobs.jobfile import LOCK_FILE, revoke_lease
from trilithon_finetune.jobs.launch import Launcher
from trilithon_finetune.jobs.leases import Lease
from trilithon_finetune.jobs.moves import LeaseLost
from trilithon_finetune.jobs.news import NewsDesk
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.jobs.settings import WorkerSettings
from trilithon_finetune.jobs.states import JobState

_log = logging.getLogger(__name__)
_CLEAR_S = 20.0


def recover(lease: Lease, *, jobs: Jobs, launcher: Launcher, settings: WorkerSettings) -> None:
    """Put a job that was taken over in order. A job whose processes cannot be ended from here is left alone."""
    job = lease.job
    job_paths = jobs.paths.job(job.id)
    directory = job_paths.attempt(job.attempt)
    try:
        revoke_lease(directory)
        if not launcher.clear(job_paths.root / LOCK_FILE, limit_s=_CLEAR_S, check=lease.beat):
            _log.error("job %s: processes of attempt %d cannot be ended from this host", job.id, job.attempt)
            return  # the lease runs out, and somebody looks again
        desk = NewsDesk(lease, jobs=jobs)
        while not lease.insist(desk.catch_up):
            lease.beat()
        if lease.job.state is JobState.PAUSING:
            rest(lease)
            return
        message = f"The worker of attempt {job.attempt} was lost while the job was {job.state}."
        give_up(lease, JobError(code="lease_lost", message=message), settings=settings)
    except LeaseLost as lost:
        _log.warning("%s", lost)
