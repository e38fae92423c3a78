"""Rows of the tables as records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import RowMapping

from trilithon_finetune.errors import JobError
from trilithon_finetune.jobs.records import Checkpoint, Event, File, Job, Progress
from trilithon_finetune.jobs.states import JobState


def result_name(job_id: str, config: Mapping[str, Any]) -> str:
    """
    What a job's result is served as.

    >>> result_name("ftjob-0k2j4h5g6f7d8s9a0q1w", {"model": "/models/gpt2", "suffix": "faq"})
    'ft:gpt2:faq:0k2j4h5g6f7d8s9a0q1w'

    A job that goes on from another's result is named after that one's base.
    """
    model = str(config["model"])
    base = model.split(":")[1] if model.startswith("ft:") else model.rstrip("/").rpartition("/")[2]
    return f"ft:{base}:{config.get('suffix') or ''}:{job_id.removeprefix('ftjob-')}"


def job_of(row: RowMapping, *, queue_position: int | None = None) -> Job:
    """A row of `jobs`."""
    config: dict[str, Any] = row["config"]
    return Job(
        id=row["id"],
        tenant=row["tenant"],
        state=JobState(row["state"]),
        desired=row["desired"],
        name=result_name(row["id"], config),
        config=config,
        resolved=row["resolved"],
        model=config["model"],
        task=config["task"],
        training_file=row["training_file"],
        validation_file=row["validation_file"],
        suffix=config.get("suffix"),
        seed=row["seed"],
        metadata=config.get("metadata") or {},
        priority=row["priority"],
        attempt=row["attempt"],
        failures=row["failures"],
        created_at=row["created_at"] // 1000,
        started_at=_seconds(row["started_at"]),
        finished_at=_seconds(row["finished_at"]),
        estimated_finish=_seconds(row["estimated_finish"]),
        progress=Progress(**(row["progress"] or {})),
        error=None if row["error"] is None else JobError.from_json(row["error"]),
        report=row["report"],
        estimate=row["estimate"],
        result=row["result"],
        base_digest=row["base_digest"],
        data_digest=row["data_digest"],
        template_digest=row["template_digest"],
        result_files=tuple(row["result_files"] or ()),
        last_seq=row["last_seq"],
        queue_position=queue_position,
    )


def event_of(row: RowMapping) -> Event:
    """A row of `job_events`."""
    names = ("job_id", "seq", "level", "kind", "message", "attempt", "data")
    return Event(created_at_ms=row["created_at"], **{name: row[name] for name in names})


def checkpoint_of(row: RowMapping, job: Job) -> Checkpoint:
    """A row of `checkpoints`."""
    names = ("job_id", "step", "metrics", "digest", "bytes", "servable", "verified")
    return Checkpoint(
        id=checkpoint_id(row["job_id"], row["step"]),
        created_at=row["created_at"] // 1000,
        model=checkpoint_name(job.name, row["step"]),
        **{name: row[name] for name in names},
    )


def checkpoint_name(name: str, step: int) -> str:
    """What a checkpoint is served as."""
    return f"{name}:step-{step}"


def checkpoint_id(job_id: str, step: int) -> str:
    """The id of a checkpoint."""
    return f"ftckpt-{job_id.removeprefix('ftjob-')}-{step}"


def file_of(row: RowMapping) -> File:
    """A row of `files`."""
    names = ("id", "tenant", "bytes", "filename", "purpose", "sha256")
    return File(
        created_at=row["created_at"] // 1000,
        expires_at=_seconds(row["expires_at"]),
        **{name: row[name] for name in names},
    )


def _seconds(milliseconds: int | None) -> int | None:
    return None if milliseconds is None else milliseconds // 1000
