"""What comes back about finetuning jobs and files; the same over both protocols."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trilithon._types import _Answer

FINAL_STATES = ("succeeded", "failed", "cancelled")
"""States that no job leaves; also the kinds of the last event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFailure(_Answer):
    """
    Why a job failed.

    `kind` is user (fix the request or the data), infra (it was tried again) or internal (a bug); `rank` -1: no rank.
    """

    code: str = ""
    message: str = ""
    param: str = ""
    kind: str = ""
    retryable: bool = False
    hint: str = ""
    attempt: int = 0
    rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress(_Answer):
    """How far a job is; `fraction` counts tokens, `seconds_remaining` is None while nobody knows."""

    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    fraction: float = 0.0
    seconds_remaining: int | None = None
    trained_tokens: int = 0
    supervised_tokens: int = 0
    tokens_per_second: float = 0.0
    queue_position: int = 0
    prepare_fraction: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(_Answer):
    """A state of a job that can be gone on from; `model` is its name where it is served."""

    id: str
    job_id: str = ""
    step: int = 0
    created_at: int = 0
    model: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    digest: str = ""
    bytes: int = 0
    servable: bool = False
    verified: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(_Answer):
    """
    A finetuning job.

    `state` is validating, queued, preparing, starting, running, pausing, paused, exporting, verifying, cancelling,
    succeeded, failed or cancelled. Times are seconds since 1970 UTC, 0 for not yet. `fine_tuned_model` is the name to
    ask the server for, once it has succeeded. `checkpoints` are the newest 20, the newest first; `jobs.checkpoints`
    has all.
    """

    id: str
    state: str = ""
    model: str = ""
    task: str = ""
    fine_tuned_model: str = ""
    training_file: str = ""
    validation_file: str = ""
    result_files: tuple[str, ...] = ()
    seed: int = 0
    created_at: int = 0
    started_at: int = 0
    finished_at: int = 0
    estimated_finish: int = 0
    error: JobFailure | None = None
    progress: JobProgress = field(default_factory=JobProgress)
    attempt: int = 0
    config_json: str = "{}"
    metadata: Mapping[str, str] = field(default_factory=dict)
    base_digest: str = ""
    data_digest: str = ""
    template_digest: str = ""
    estimate_json: str = ""
    last_seq: int = 0
    organization_id: str = ""
    checkpoints: tuple[Checkpoint, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether it is over."""
        return self.state in FINAL_STATES

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, with every default once it is validated."""
        document: dict[str, Any] = json.loads(self.config_json)
        return document


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent(_Answer):
    """One thing that happened; `seq` counts a job's events from 1."""

    job_id: str = ""
    seq: int = 0
    created_at_ms: int = 0
    level: str = ""
    type: str = ""
    kind: str = ""
    message: str = ""
    data_json: str = "{}"
    attempt: int = 0

    @property
    def data(self) -> dict[str, Any]:
        """Its numbers and details."""
        document: dict[str, Any] = json.loads(self.data_json)
        return document


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsRow(_Answer):
    """The numbers of one step or one evaluation, by name."""

    step: int = 0
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding(_Answer):
    """One thing that is wrong with a data file; `line` counts from 1, 0 means the file."""

    code: str = ""
    severity: str = ""
    file: str = ""
    line: int = 0
    path: str = ""
    message: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetReport(_Answer):
    """What was found in a data file; `length_histogram` counts rows of 2^n to 2^(n+1) - 1 tokens."""

    ok: bool = False
    rows: int = 0
    errors: int = 0
    warnings: int = 0
    findings: tuple[Finding, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    length_histogram: tuple[int, ...] = ()
    format: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate(_Answer):
    """What a job would take, in tokens, bytes and seconds; where it is not allowed, `findings` say what would fit."""

    train_tokens: int = 0
    supervised_tokens: int = 0
    steps: int = 0
    peak_bytes_per_rank: int = 0
    disk_bytes: int = 0
    disk_free_bytes: int = 0
    seconds: float = 0.0
    seconds_low: float = 0.0
    seconds_high: float = 0.0
    cost: float | None = None
    allowed: bool = False
    findings: tuple[Finding, ...] = ()
    memory_parts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed(_Answer):
    """Where an alias points now, and where it pointed before (empty: nowhere)."""

    model: str = ""
    alias: str = ""
    previous: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class File(_Answer):
    """A file on the server; `expires_at` 0: never."""

    id: str
    bytes: int = 0
    created_at: int = 0
    filename: str = ""
    purpose: str = ""
    sha256: str = ""
    expires_at: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPage(_Answer):
    """A part of a list."""

    data: tuple[Job, ...] = ()
    has_more: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPage(_Answer):
    """A part of a list."""

    data: tuple[Checkpoint, ...] = ()
    has_more: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsPage(_Answer):
    """A part of a list."""

    data: tuple[MetricsRow, ...] = ()
    has_more: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePage(_Answer):
    """A part of a list."""

    data: tuple[File, ...] = ()
    has_more: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted(_Answer):
    """Whether something is gone."""

    deleted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChunk(_Answer):
    """The next bytes of a file."""

    data: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logs(_Answer):
    """What a rank printed."""

    text: str = ""
