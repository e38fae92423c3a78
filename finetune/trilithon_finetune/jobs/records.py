"""
What the job store answers with: frozen records, the same for routes, the command and the worker. No SQL here.

Times are Unix seconds, but for an event's, which is in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args

from trilithon_finetune.errors import JobError
from trilithon_finetune.jobs.states import FINAL, JobState, openai_status

Desired = Literal["run", "pause", "cancel"]
"""What a job's owner wants of it; a worker obeys at the next boundary."""

Level = Literal["info", "warn", "error"]

Purpose = Literal["fine-tune", "fine-tune-results", "evidence"]
SHOWN_CHECKPOINTS = 20
"""That a job carries with it; the others are asked for by pages."""

PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """
    How far a job is.

    Attributes:
        step, total_steps: optimizer steps done, and of the whole run; 0 before it is known.
        epoch: passes over the data done.
        fraction: of the work, by tokens where the trainer says so, else by steps; from 0 to 1.
        seconds_remaining: steps and evaluations left, by what those before took; None before ten steps were timed.
        trained_tokens, supervised_tokens: so far.
        tokens_per_second: of the newest step.
        prepare_fraction: of the data, while it is being prepared.
    """

    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    fraction: float = 0.0
    seconds_remaining: int | None = None
    trained_tokens: int = 0
    supervised_tokens: int = 0
    tokens_per_second: float = 0.0
    prepare_fraction: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """
    A job.

    Attributes:
        name: `ft:<base>:<suffix>:<id>`, under which the result is served; the suffix may be empty.
        config: as it was given, with its defaults; `resolved`: after validation, when nothing is left open.
        desired: what its owner asked for last; obeyed at the next boundary.
        attempt: the newest one, from 1; 0 before a worker has taken the job.
        failures: attempts that were lost so far.
        report, estimate: of validation; None before.
        result: of the phases by name (`export`, `verify`), once it has succeeded.
        result_files: ids of files of numbers.
        queue_position: from 1 while it is queued, else None.
        last_seq: number of its newest event.
        seed: None until validation has chosen one.
        checkpoints: the newest first, at most `SHOWN_CHECKPOINTS`, as the store's readers are told; empty for a worker.
    """

    id: str
    tenant: str
    state: JobState
    desired: Desired
    name: str
    config: Mapping[str, Any]
    resolved: Mapping[str, Any] | None
    model: str
    task: str
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int | None
    metadata: Mapping[str, str]
    priority: int
    attempt: int
    failures: int
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    progress: Progress
    error: JobError | None
    report: Mapping[str, Any] | None
    estimate: Mapping[str, Any] | None
    result: Mapping[str, Any] | None
    base_digest: str
    data_digest: str
    template_digest: str
    result_files: tuple[str, ...]
    last_seq: int
    queue_position: int | None
    checkpoints: tuple[Checkpoint, ...] = ()

    @property
    def status(self) -> str:
        """The state in OpenAI's words."""
        return openai_status(self.state)

    @property
    def finished(self) -> bool:
        """Whether the state is final."""
        return self.state in FINAL

    @property
    def fine_tuned_model(self) -> str | None:
        """The name of the result, once it is served."""
        return self.name if self.state is JobState.SUCCEEDED else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened to a job; `seq` counts them from 1 without a gap."""

    job_id: str
    seq: int
    created_at_ms: int
    level: Level
    kind: str
    message: str
    attempt: int
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """A name for OpenAI's clients, to page with."""
        return f"ftevent-{self.job_id.removeprefix('ftjob-')}-{self.seq}"

    @property
    def type(self) -> Literal["message", "metrics"]:
        """OpenAI's two kinds: numbers, and everything else."""
        return "metrics" if self.kind in ("step", "eval") else "message"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """
    A state of the run that can be continued from.

    Attributes:
        model: `ft:...:step-N`, under which it is served where the job deploys checkpoints.
        metrics: numbers at that step, by name.
        digest: of its weights.
        servable: whether its directory is still there.
        verified: whether its export was compared with the trainer's own numbers.
    """

    id: str
    job_id: str
    step: int
    created_at: int
    model: str
    metrics: Mapping[str, float]
    digest: str
    bytes: int
    servable: bool
    verified: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """An uploaded file, or one that a job wrote for its owner."""

    id: str
    tenant: str
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    sha256: str
    expires_at: int | None


@dataclass(frozen=True, slots=True)
class Page(Generic[T_co]):
    """A part of a list, newest first; `has_more` says whether there is anything behind it."""

    data: tuple[T_co, ...]
    has_more: bool
