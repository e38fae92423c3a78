"""What a job has left to read: events backwards, numbers by pages, output of its ranks. Everything here blocks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from trilithon.errors import NotFound
from trilithon_finetune.jobs.records import Event, Job
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.plot import plot
from trilithon_finetune.series import series_row
from trilithon_server.validation import invalid

LOG_BYTES = 1 << 20
WINDOW = 1000
"""Events read at once; the most that the store hands out."""

_EVENT_ID = re.compile(r"ftevent-[a-z0-9]{20}-([0-9]{1,18})")


def events_back(jobs: Jobs, job_id: str, *, tenant: str, before: str | None, limit: int) -> tuple[list[Event], bool]:
    """
    Events, newest first, and whether there are older ones.

    Args:
        before: id of an event; only older ones are told.
    Raises:
        NotFound: there is no such job. InvalidArgument: `before` is no event of it.
    """
    job = jobs.get(job_id, tenant=tenant)
    top = job.last_seq + 1
    if before is not None:
        match = _EVENT_ID.fullmatch(before)
        if match is None or before[8:28] != job_id.removeprefix("ftjob-"):
            raise invalid("after", "must be the id of an event of this job", given=before)
        top = min(top, int(match[1]))
    found: list[Event] = []
    while top > 1 and len(found) <= limit:  # one more than asked for tells whether there are more
        low = max(0, top - 1 - min(WINDOW, limit + 1))
        window = jobs.events(job_id, tenant=tenant, after_seq=low, limit=WINDOW)
        found += [event for event in reversed(window) if event.seq < top]
        top = low + 1
    return found[:limit], len(found) > limit


def metrics_page(
    jobs: Jobs, job_id: str, *, tenant: str, after_step: int, limit: int
) -> tuple[list[Mapping[str, Any]], bool]:
    """Rows of later steps than `after_step`, in their order, and whether there are more."""
    series = jobs.metrics(job_id, tenant=tenant)
    rows: list[Mapping[str, Any]] = [series_row(row) for row in series if _step(row) > after_step]
    end = limit
    while end < len(rows) and _step(rows[end]) == _step(rows[end - 1]):  # a step's rows stay on one page
        end += 1
    return rows[:end], end < len(rows)


def log_text(jobs: Jobs, job_id: str, *, tenant: str, attempt: int | None, rank: int) -> str:
    """
    The end of what a rank printed, at most a MiB.

    Args:
        attempt: from 1; None: the newest.
    Raises:
        NotFound: the job, or that rank has printed nothing in that attempt.
    """
    job = jobs.get(job_id, tenant=tenant)
    number = job.attempt if attempt is None else attempt
    path = jobs.paths.job(job_id).attempt(number) / f"rank-{rank}.log"
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - LOG_BYTES))
            raw = file.read(LOG_BYTES)
    except FileNotFoundError:
        message = f"rank {rank} of attempt {number} of {job_id} has printed nothing. Attempts: {job.attempt}."
        raise NotFound(message, code="log_not_found") from None
    text = raw.decode("utf-8", "replace")
    return text.partition("\n")[2] if size > LOG_BYTES else text


def picture(jobs: Jobs, job_id: str, *, tenant: str) -> str:
    """The curves of a job as SVG. Raises NotFound."""
    job = jobs.get(job_id, tenant=tenant)
    steps: list[int] = []
    after: str | None = None
    while True:
        page = jobs.checkpoints(job_id, tenant=tenant, after=after, limit=100)
        steps += [item.step for item in page.data]
        if not page.has_more:
            break
        after = page.data[-1].id
    rows = [series_row(row) for row in jobs.metrics(job_id, tenant=tenant)]
    return plot(rows, title=job.name, attempts=attempt_starts(jobs, job, tenant=tenant), checkpoints=steps)


def attempt_starts(jobs: Jobs, job: Job, *, tenant: str) -> list[int]:
    """The first step that each attempt but the first has told of."""
    starts: dict[int, int] = {}
    seq = 0
    while job.attempt > 1 and seq < job.last_seq:
        window = jobs.events(job.id, tenant=tenant, after_seq=seq, limit=WINDOW)
        if not window:
            break
        for event in window:
            step = event.data.get("step")
            if event.kind == "step" and event.attempt > 1 and isinstance(step, int):
                starts.setdefault(event.attempt, step)
        seq = window[-1].seq
    return [starts[attempt] for attempt in sorted(starts)]


def _step(row: Mapping[str, Any]) -> int:
    step = row.get("step")
    return step if isinstance(step, int) else 0
