"""The newest checkpoints of jobs, read with the jobs themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Connection, func, select

from trilithon_finetune.jobs.records import SHOWN_CHECKPOINTS, Checkpoint, Job
from trilithon_finetune.jobs.rows import checkpoint_of
from trilithon_finetune.jobs.schema import checkpoints


def with_checkpoints(connection: Connection, found: Sequence[Job]) -> tuple[Job, ...]:
    """The same jobs with `checkpoints` filled in, by one query for all of them."""
    place = func.row_number().over(partition_by=checkpoints.c.job_id, order_by=checkpoints.c.step.desc())
    jobs = {job.id: job for job in found}
    ranked = select(checkpoints, place.label("place")).where(checkpoints.c.job_id.in_(list(jobs))).subquery()
    query = select(ranked).where(ranked.c.place <= SHOWN_CHECKPOINTS).order_by(ranked.c.step.desc())
    saved: dict[str, list[Checkpoint]] = {}
    for row in connection.execute(query).mappings():
        saved.setdefault(row["job_id"], []).append(checkpoint_of(row, jobs[row["job_id"]]))
    return tuple(replace(job, checkpoints=tuple(saved.get(job.id, ()))) for job in found)
