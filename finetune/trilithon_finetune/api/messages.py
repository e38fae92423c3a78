"""Records of the store as messages of `trilithon.api.v1`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format

from trilithon.api.v1 import finetune_pb2 as pb
from trilithon_finetune.api.answers import seed
from trilithon_finetune.errors import JobError
from trilithon_finetune.jobs.records import Checkpoint, Event, File, Job, Progress
from trilithon_finetune.jobs.states import JobState

_KINDS = {"user": pb.JobError.KIND_USER, "infra": pb.JobError.KIND_INFRA, "internal": pb.JobError.KIND_INTERNAL}


def state_number(state: JobState) -> pb.JobState.ValueType:
    """Of the wire's enumeration."""
    return pb.JobState.Value(f"JOB_STATE_{state.name}")


def state_of(number: int) -> JobState | None:
    """The state that a request names; None for one that this version does not know."""
    name = pb.JobState.DESCRIPTOR.values_by_number.get(number)
    short = name.name.removeprefix("JOB_STATE_") if name is not None else ""
    return JobState[short] if short in JobState.__members__ else None


def job(record: Job) -> pb.Job:
    """One job."""
    config = record.resolved or record.config
    return pb.Job(
        id=record.id,
        state=state_number(record.state),
        model=record.model,
        fine_tuned_model=record.fine_tuned_model or "",
        training_file=record.training_file,
        validation_file=record.validation_file or "",
        result_files=record.result_files,
        seed=seed(record),
        created_at=record.created_at,
        started_at=record.started_at or 0,
        finished_at=record.finished_at or 0,
        estimated_finish=record.estimated_finish or 0,
        error=None if record.error is None else _error(record.error),
        progress=_progress(record.progress, record.queue_position),
        attempt=record.attempt,
        config_json=_json(config),
        metadata=dict(record.metadata),
        template_digest=record.template_digest,
        last_seq=record.last_seq,
        task=record.task,
        base_digest=record.base_digest,
        data_digest=record.data_digest,
        estimate_json="" if record.estimate is None else _json(record.estimate),
        organization_id=record.tenant,
        checkpoints=[checkpoint(item) for item in record.checkpoints],
    )


def _error(error: JobError) -> pb.JobError:
    return pb.JobError(
        code=error.code,
        message=error.message,
        param=error.param,
        kind=_KINDS[error.kind],
        retryable=error.retryable,
        hint=error.hint,
        attempt=error.attempt,
        rank=error.rank,
    )


def _progress(progress: Progress, queue_position: int | None) -> pb.Progress:
    return pb.Progress(
        step=progress.step,
        total_steps=progress.total_steps,
        epoch=progress.epoch,
        fraction=progress.fraction,
        seconds_remaining=progress.seconds_remaining,
        trained_tokens=progress.trained_tokens,
        supervised_tokens=progress.supervised_tokens,
        tokens_per_second=progress.tokens_per_second,
        queue_position=queue_position or 0,
        prepare_fraction=progress.prepare_fraction,
    )


def event(record: Event) -> pb.JobEvent:
    """One event."""
    return pb.JobEvent(
        job_id=record.job_id,
        seq=record.seq,
        created_at_ms=record.created_at_ms,
        level=record.level,
        type=record.type,
        message=record.message,
        data_json=_json(record.data),
        attempt=record.attempt,
        kind=record.kind,
    )


def checkpoint(record: Checkpoint) -> pb.Checkpoint:
    """One checkpoint."""
    return pb.Checkpoint(
        id=record.id,
        job_id=record.job_id,
        step=record.step,
        created_at=record.created_at,
        model=record.model,
        metrics=dict(record.metrics),
        digest=record.digest,
        bytes=record.bytes,
        servable=record.servable,
        verified=record.verified,
    )


def file(record: File) -> pb.File:
    """One file."""
    return pb.File(
        id=record.id,
        bytes=record.bytes,
        created_at=record.created_at,
        filename=record.filename,
        purpose=record.purpose,
        sha256=record.sha256,
        expires_at=record.expires_at or 0,
    )


def metrics_row(row: Mapping[str, Any]) -> pb.MetricsRow:
    """The numbers of one step."""
    values = {name: float(value) for name, value in row.items() if _is_number(value) and name != "step"}
    return pb.MetricsRow(step=int(row.get("step", 0)), values=values)


def estimate(document: Mapping[str, Any]) -> pb.Estimate:
    """What HTTP answers with, field by field; what the message does not know stays behind."""
    return json_format.ParseDict(dict(document), pb.Estimate(), ignore_unknown_fields=True)


def report(document: Mapping[str, Any]) -> pb.DatasetReport:
    """Likewise."""
    return json_format.ParseDict(dict(document), pb.DatasetReport(), ignore_unknown_fields=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
