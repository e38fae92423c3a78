"""
Records of the store as JSON: OpenAI's fields on top, exactly, and ours in one object `trilithon` beside them.

The command shows the same documents, so a job looks alike wherever it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from trilithon_finetune.config import BASE_LR, seed_of
from trilithon_finetune.jobs.records import Checkpoint, Event, File, Job, Page

T = TypeVar("T")

OPENAI_METRICS = (
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
)


def job(record: Job) -> dict[str, Any]:
    """`fine_tuning.job`."""
    hyperparameters = _hyperparameters(record)
    kind = "dpo" if record.task == "dpo" else "supervised"
    error = record.error
    return {
        "object": "fine_tuning.job",
        "id": record.id,
        "created_at": record.created_at,
        "finished_at": record.finished_at,
        "estimated_finish": record.estimated_finish,
        "status": record.status,
        "model": record.model,
        "fine_tuned_model": record.fine_tuned_model,
        "training_file": record.training_file,
        "validation_file": record.validation_file,
        "result_files": list(record.result_files),
        "trained_tokens": record.progress.trained_tokens if record.finished else None,
        "seed": seed(record),
        "hyperparameters": hyperparameters,
        "method": {"type": kind, kind: {"hyperparameters": hyperparameters}},
        "metadata": dict(record.metadata),
        "integrations": list(record.config.get("integrations") or ()),
        "organization_id": record.tenant,
        "error": None
        if error is None
        else {"code": error.code, "message": error.message, "param": error.param or None},
        "trilithon": {
            "state": record.state.value,
            "task": record.task,
            "name": record.name,
            "attempt": record.attempt,
            "started_at": record.started_at,
            "queue_position": record.queue_position,
            "progress": asdict(record.progress),
            "config": dict(record.config),
            "resolved": None if record.resolved is None else dict(record.resolved),
            "parallel": (record.resolved or record.config).get("parallel"),
            "estimate": None if record.estimate is None else dict(record.estimate),
            "base_digest": record.base_digest,
            "template_digest": record.template_digest,
            "data_digest": record.data_digest,
            "checkpoints": [_saved(item) for item in record.checkpoints],
            "last_seq": record.last_seq,
            "error": None if error is None else error.to_json(),
        },
    }


def _saved(record: Checkpoint) -> dict[str, Any]:
    """A checkpoint within its job, which has at most the newest 20: pages of all are at `.../checkpoints`."""
    names = ("id", "step", "created_at", "model", "digest", "bytes", "servable", "verified")
    return {**{name: getattr(record, name) for name in names}, "metrics": dict(record.metrics)}


def seed(record: Job) -> int:
    """Of a job: given, or the one that it gets when it is validated."""
    given = record.seed if record.seed is not None else record.config.get("seed")
    return seed_of(record.id) if given is None else int(given)


def _hyperparameters(record: Job) -> dict[str, Any]:
    """OpenAI's three; `auto` until validation has chosen."""
    config = record.resolved or record.config
    training, optimizer, tuning = (config.get(name) or {} for name in ("training", "optimizer", "tuning"))
    rate, kind = optimizer.get("lr"), tuning.get("kind")
    return {
        "n_epochs": training.get("epochs") or "auto",
        "batch_size": training.get("batch_size") or "auto",
        "learning_rate_multiplier": "auto" if rate is None or kind not in BASE_LR else rate / BASE_LR[kind],
    }


def event(record: Event) -> dict[str, Any]:
    """`fine_tuning.job.event`."""
    return {
        "object": "fine_tuning.job.event",
        "id": record.id,
        "created_at": record.created_at_ms // 1000,
        "level": record.level,
        "message": record.message,
        "type": record.type,
        "data": dict(record.data),
        "seq": record.seq,
        "attempt": record.attempt,
        "kind": record.kind,
        "created_at_ms": record.created_at_ms,
        "fine_tuning_job_id": record.job_id,
    }


def checkpoint(record: Checkpoint) -> dict[str, Any]:
    """`fine_tuning.job.checkpoint`."""
    known = {name: record.metrics[name] for name in OPENAI_METRICS if name in record.metrics}
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": record.id,
        "created_at": record.created_at,
        "fine_tuned_model_checkpoint": record.model,
        "fine_tuning_job_id": record.job_id,
        "step_number": record.step,
        "metrics": {"step": record.step, **known},
        "trilithon": {
            "metrics": dict(record.metrics),
            "digest": record.digest,
            "bytes": record.bytes,
            "servable": record.servable,
            "verified": record.verified,
        },
    }


def file(record: File) -> dict[str, Any]:
    """`file`."""
    return {
        "object": "file",
        "id": record.id,
        "bytes": record.bytes,
        "created_at": record.created_at,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
        "expires_at": record.expires_at,
        "sha256": record.sha256,
    }


def listed(items: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """A list, as every route answers with one."""
    return {
        "object": "list",
        "data": list(items),
        "has_more": has_more,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
    }


def page(records: Page[T], shape: Callable[[T], dict[str, Any]]) -> dict[str, Any]:
    """A page of records as a list."""
    return listed([shape(item) for item in records.data], has_more=records.has_more)


# Schemas ------------------------------------------------------------------------------------------------------

_STR: dict[str, Any] = {"type": "string"}
_INT: dict[str, Any] = {"type": "integer"}
_NUM: dict[str, Any] = {"type": "number"}
_BOOL: dict[str, Any] = {"type": "boolean"}
_ANY: dict[str, Any] = {"type": "object"}


def _maybe(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _page(name: str) -> dict[str, Any]:
    items = {"type": "array", "items": {"$ref": f"#/components/schemas/{name}"}}
    ids = {"first_id": _maybe(_STR), "last_id": _maybe(_STR)}
    return _object({"object": {"const": "list"}, "data": items, "has_more": _BOOL, **ids})


_AUTO = {"anyOf": [{"const": "auto"}, _NUM]}
_HYPERPARAMETERS = _object(dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier"), _AUTO))

SCHEMAS: dict[str, Any] = {
    "FineTuningJob": _object(
        {
            "object": {"const": "fine_tuning.job"},
            "id": _STR,
            "created_at": _INT,
            "finished_at": _maybe(_INT),
            "estimated_finish": _maybe(_INT),
            "status": {
                "enum": ["validating_files", "queued", "running", "pausing", "paused", "succeeded", "failed",
                         "cancelled"]
            },
            "model": _STR,
            "fine_tuned_model": _maybe(_STR),
            "training_file": _STR,
            "validation_file": _maybe(_STR),
            "result_files": {"type": "array", "items": _STR},
            "trained_tokens": _maybe(_INT),
            "seed": _INT,
            "hyperparameters": _HYPERPARAMETERS,
            "method": _ANY,
            "metadata": {"type": "object", "additionalProperties": _STR},
            "integrations": {"type": "array"},
            "organization_id": _STR,
            "error": _maybe(_object({"code": _STR, "message": _STR, "param": _maybe(_STR)})),
            "trilithon": _ANY,
        }
    ),
    "FineTuningEvent": _object(
        {
            "object": {"const": "fine_tuning.job.event"},
            "id": _STR,
            "created_at": _INT,
            "level": {"enum": ["info", "warn", "error"]},
            "message": _STR,
            "type": {"enum": ["message", "metrics"]},
            "data": _ANY,
            "seq": _INT,
            "attempt": _INT,
            "kind": _STR,
        }
    ),
    "FineTuningCheckpoint": _object(
        {
            "object": {"const": "fine_tuning.job.checkpoint"},
            "id": _STR,
            "created_at": _INT,
            "fine_tuned_model_checkpoint": _STR,
            "fine_tuning_job_id": _STR,
            "step_number": _INT,
            "metrics": _ANY,
            "trilithon": _ANY,
        }
    ),
    "File": _object(
        {
            "object": {"const": "file"},
            "id": _STR,
            "bytes": _INT,
            "created_at": _INT,
            "filename": _STR,
            "purpose": _STR,
            "status": {"const": "processed"},
            "expires_at": _maybe(_INT),
            "sha256": _STR,
        }
    ),
    "FileDeleted": _object({"object": {"const": "file"}, "id": _STR, "deleted": _BOOL}),
    "JobMetrics": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _ANY}, "has_more": _BOOL}),
    "Deployed": _object({"model": _STR, "alias": _STR, "previous": _STR}),
    "FineTuningJobs": _page("FineTuningJob"),
    "FineTuningEvents": _page("FineTuningEvent"),
    "FineTuningCheckpoints": _page("FineTuningCheckpoint"),
    "Files": _page("File"),
    "Estimate": _ANY,
    "DatasetReport": _ANY,
}  # fmt: skip
"""JSON schemas of the answers, for the OpenAPI document."""
