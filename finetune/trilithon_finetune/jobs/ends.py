"""The ways in which a worker gives a job back before it is done: at rest, given up for now, or for good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trilithon_finetune.errors import JobError
from trilithon_finetune.jobs.leases import Lease
from trilithon_finetune.jobs.moves import Ending, NewEvent
from trilithon_finetune.jobs.queue import Move
from trilithon_finetune.jobs.settings import WorkerSettings
from trilithon_finetune.jobs.states import JobState

S = JobState


def release(lease: Lease) -> None:
    """The worker ends, the job goes on: back to where the next worker takes it."""
    event = NewEvent(kind="queued", message="The worker was stopped; the job waits for the next.")
    to = None if lease.job.state is S.VALIDATING else S.QUEUED
    lease.write(Move(to, (event,)), release=True, wait_s=0, ending=Ending(outcome="released"))


def rest(lease: Lease, *, error: JobError | None = None) -> None:
    """
    The processes have ended as the owner asked: cancelled or paused, or in the queue when a pause was withdrawn.

    Args:
        error: why the job rests though nobody asked for it.
    """
    if lease.look() == "cancel":
        moves = [] if lease.job.state is S.CANCELLING else [Move(S.CANCELLING, (_CANCELLING,))]
        moves.append(Move(S.CANCELLED, (_CANCELLED,)))
        lease.write(*moves, release=True, ending=Ending(outcome="cancelled"))
        return
    if error is None:
        event = NewEvent(kind="paused", message="The job rests until it is resumed; its last checkpoint stays.")
        moves = [Move(S.PAUSED, (event,))]
        if lease.desired == "run":
            moves.append(Move(S.QUEUED, (NewEvent(kind="resumed", message="The job is in the queue again."),)))
        lease.write(*moves, release=True, wait_s=0, ending=Ending(outcome="paused"))
        return
    event = NewEvent(kind="paused", level="error", message=error.message, data=error.to_json())
    ending = Ending(outcome="paused", cause=error.message, rank=error.rank)
    values = {"error": error.to_json(), "desired": "pause"}
    lease.write(Move(S.PAUSED, (event,)), values=values, release=True, wait_s=0, ending=ending)


def give_up(lease: Lease, error: JobError, *, settings: WorkerSettings, found: Mapping[str, Any] | None = None) -> None:
    """
    The attempt could not go on: another one later where that can help, a rest where room is needed, else the end.

    A job that its owner wants cancelled ends so, whatever happened.

    Args:
        found: columns that the failed phase has filled, for the job's end.
    """
    job = lease.job
    error = replace(error, attempt=job.attempt)
    wish = lease.look()
    validating = job.state is S.VALIDATING
    if wish == "cancel" or job.state is S.CANCELLING:
        rest(lease)
    elif error.code == "disk_full" and not validating:
        rest(lease, error=error)
    elif job.state is S.PAUSING and error.retryable:
        rest(lease)
    elif (error.retryable or error.code == "disk_full") and job.failures + 1 < settings.max_attempts:
        wait_s = settings.backoff_s * 2**job.failures
        failed = NewEvent(kind="attempt_failed", level="warn", message=error.message, data=error.to_json())
        again = NewEvent(kind="retry_scheduled", message=f"The next attempt may start in {wait_s:g} s.")
        moves = [Move(None if validating else S.QUEUED, (failed, again))]
        if wish == "pause" and not validating:
            moves.append(Move(S.PAUSED, (NewEvent(kind="paused", message="The job rests until it is resumed."),)))
        ending = Ending(outcome="lost", cause=error.message, rank=error.rank)
        values = {"failures": job.failures + 1}
        lease.write(*moves, values=values, release=True, wait_s=wait_s, ending=ending)
    else:
        event = NewEvent(kind="failed", level="error", message=error.message, data=error.to_json())
        ending = Ending(outcome="failed", cause=error.message, rank=error.rank)
        final = {**(found or {}), "error": error.to_json(), "failures": job.failures + 1}
        lease.write(Move(S.FAILED, (event,)), values=final, release=True, ending=ending)


_CANCELLING = NewEvent(kind="cancelling", message="The job is being cancelled.")
_CANCELLED = NewEvent(kind="cancelled", message="The job was cancelled; its last checkpoint stays.")
