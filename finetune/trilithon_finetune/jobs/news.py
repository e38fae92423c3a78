"""Store what the phases of an attempt say, and serve the checkpoints that they tell of where the job asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from trilithon_finetune.jobs.deploy import deploy
from trilithon_finetune.jobs.leases import Lease
from trilithon_finetune.jobs.moves import NewEvent
from trilithon_finetune.jobs.queue import Move
from trilithon_finetune.jobs.records import Progress
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.jobs.states import JobState
from trilithon_finetune.jobs.tailing import MOVE_KINDS, News, Tail
from trilithon_server.catalog import Catalog, CatalogConflict

_EVENTS_FILE = "events.jsonl"


class NewsDesk:
    """Reads the events of the attempt that `lease` is of."""

    def __init__(self, lease: Lease, *, jobs: Jobs) -> None:
        self._lease, self._jobs = lease, jobs
        self._paths = jobs.paths.job(lease.job.id)
        self._catalog = Catalog(jobs.paths.models)
        progress = replace(lease.job.progress, seconds_remaining=None)
        path = self._paths.attempt(lease.job.attempt) / _EVENTS_FILE
        self._tail = Tail(path, lease.claim.events_offset, progress)
        self._words: dict[str, NewEvent] = {}

    def catch_up(self) -> bool:
        """
        Store the next piece; True when there is nothing more for now.

        Raises:
            LeaseLost: the job is somebody else's. Unavailable: the database is away; the piece comes again.
        """
        news = self._tail.read()
        if news is None:
            return True
        starts = news.running and self._lease.job.state is JobState.STARTING
        self._words |= {event.kind: event for event in news.events if event.kind in MOVE_KINDS}
        events = tuple(event for event in news.events if event.kind not in MOVE_KINDS)
        if starts and not any(event.kind == "running" for event in events):
            events = (NewEvent(kind="running", message="Training runs."), *events)
        self._lease.write_news(
            Move(JobState.RUNNING if starts else None, (*events, *self._serve(news))),
            values=self._values(news.progress),
            offset=news.offset,
            saved=news.saved,
        )
        self._tail.accept(news)
        return False

    def told(self, kind: str, message: str, data: Mapping[str, Any] | None = None) -> NewEvent:
        """The event of a move, in the words of the phase where it had some."""
        return self._words.get(kind) or NewEvent(kind=kind, message=message, data=data or {})

    def serve(
        self, path: Path, *, kind: Literal["adapter", "model"], digest: str, step: int, checkpoint: bool
    ) -> NewEvent:
        """`deploy` of this job. Raises CatalogConflict, CatalogError, LeaseLost."""
        return deploy(
            self._catalog,
            self._lease.job,
            path=path,
            kind=kind,
            digest=digest,
            step=step,
            checkpoint=checkpoint,
            check=self._lease.look,
        )

    def _serve(self, news: News) -> tuple[NewEvent, ...]:
        config = self._lease.job.resolved or self._lease.job.config
        if config["deploy"]["on"] != "checkpoint":
            return ()
        kind: Literal["adapter", "model"] = "adapter" if config["tuning"]["kind"] == "lora" else "model"
        events = []
        for saved in news.saved:
            if saved.servable:
                path = self._paths.run / f"step_{saved.step:08d}"
                try:
                    events.append(self.serve(path, kind=kind, digest=saved.digest, step=saved.step, checkpoint=True))
                except (CatalogConflict, ValueError) as error:
                    message = f"The checkpoint of step {saved.step} is not served: {error}"
                    events.append(NewEvent(kind="warning", level="warn", message=message))
        return tuple(events)

    def _values(self, progress: Progress) -> dict[str, Any]:
        left = progress.seconds_remaining
        finish = None if left is None else self._jobs.database.now + left * 1000
        return {"progress": asdict(progress), "estimated_finish": finish}
