"""
The states of a job and every legal move between them: one table, which the store enforces in the move's own statement.

    validating --> queued --> preparing --> starting --> running --> exporting --> verifying --> succeeded
                     ^  |          |____________|___________|____________|____________|--> failed
                     |  +--> paused <-- pausing <-- (any of these, asked by `pause`)
                     +------ a lost attempt goes back, paused resumes    cancelling --> cancelled (asked by `cancel`)

Validating and the phases from preparing on belong to a worker's lease; queued, paused and the final states to nobody.
"""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """Where a job is; the values are those of the wire and the table."""

    VALIDATING = "validating"
    QUEUED = "queued"
    PREPARING = "preparing"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    EXPORTING = "exporting"
    VERIFYING = "verifying"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


S = JobState

FINAL = frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED})
"""States that no job leaves."""

WORKING = (S.PREPARING, S.STARTING, S.RUNNING, S.EXPORTING, S.VERIFYING)
"""States in which a worker's processes run for the job."""

_OUT_OF_WORK = {S.QUEUED, S.FAILED, S.PAUSING, S.PAUSED, S.CANCELLING}

MOVES: dict[JobState, frozenset[JobState]] = {
    S.VALIDATING: frozenset({S.QUEUED, S.FAILED, S.CANCELLING, S.CANCELLED}),
    S.QUEUED: frozenset({S.PREPARING, S.PAUSED, S.CANCELLED}),
    S.PREPARING: frozenset({S.STARTING, *_OUT_OF_WORK}),
    S.STARTING: frozenset({S.RUNNING, *_OUT_OF_WORK}),
    S.RUNNING: frozenset({S.EXPORTING, *_OUT_OF_WORK}),
    S.EXPORTING: frozenset({S.VERIFYING, *_OUT_OF_WORK}),
    S.VERIFYING: frozenset({S.SUCCEEDED, *_OUT_OF_WORK}),
    S.PAUSING: frozenset({S.PAUSED, S.FAILED, S.CANCELLING}),
    S.PAUSED: frozenset({S.QUEUED, S.CANCELLED}),
    S.CANCELLING: frozenset({S.CANCELLED}),
    S.SUCCEEDED: frozenset(),
    S.FAILED: frozenset(),
    S.CANCELLED: frozenset(),
}
"""Where each state may go."""

_OPENAI = {
    S.VALIDATING: "validating_files",
    S.QUEUED: "queued",
    S.PAUSED: "paused",
    S.PAUSING: "pausing",
    S.SUCCEEDED: "succeeded",
    S.FAILED: "failed",
    S.CANCELLED: "cancelled",
}


def openai_status(state: JobState) -> str:
    """
    The `status` that OpenAI's clients know.

    >>> openai_status(JobState.EXPORTING), openai_status(JobState.VALIDATING)
    ('running', 'validating_files')
    """
    return _OPENAI.get(state, "running")


def sources(target: JobState) -> tuple[JobState, ...]:
    """The states that may move to `target`, in the order of the table."""
    return tuple(state for state, targets in MOVES.items() if target in targets)
