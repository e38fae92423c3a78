"""The door to the job store of this machine: the server's own functions, without a server."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trilithon import _job_operations as ops
from trilithon._decode import decode
from trilithon._job_types import FINAL_STATES, Checkpoint, CheckpointPage, Deployed, Job, JobEvent, JobPage, MetricsRow
from trilithon._transport import Operation
from trilithon._types import DeletedAlias
from trilithon.cli import _finetune_local as local
from trilithon.cli._finetune_config import parsed, told
from trilithon.cli._finetune_doors import Checked
from trilithon_finetune.api import answers, history, results
from trilithon_finetune.jobs.clean import Removal, clean
from trilithon_finetune.jobs.records import Job as JobRecord
from trilithon_finetune.jobs.records import Page
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.jobs.states import JobState
from trilithon_finetune.paths import StorePaths
from trilithon_finetune.series import series_row
from trilithon_server.catalog import Catalog

POLL_S = 0.2
PAGE = 100
EVENTS_AT_ONCE = 1000


@contextlib.contextmanager
def open_store(root: Path, database: str | None) -> Iterator[StoreDoor]:
    """
    The store in `root`, made where missing.

    Raises:
        TrilithonError: it cannot be opened.
    """
    with told():
        jobs = Jobs(database, StorePaths(root.expanduser().resolve()))
    try:
        yield StoreDoor(jobs)
    finally:
        jobs.close()


class StoreDoor:
    """Jobs of a store, as the tenant that a server without keys takes its callers for."""

    merges = False

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs
        self.paths = jobs.paths
        self.catalog = Catalog(jobs.paths.models)

    def check(self, config: Mapping[str, Any], /, *, probe: bool = False) -> Checked:
        known = {name: self._file(config[name]) for name in ("training_file", "validation_file") if config.get(name)}
        passages = config.get("options", {}).get("passages")
        return local.check(
            config,
            known["training_file"],
            known.get("validation_file"),
            store=self.paths.root,
            passages=self._file(passages) if isinstance(passages, str) else None,
            probe=probe,
        )

    def create(
        self,
        config: Mapping[str, Any],
        /,
        *,
        idempotency_key: str | None = None,
        checked: Mapping[str, Any] | None = None,
    ) -> Job:
        with told():
            job_config = parsed(config)
        made = self.jobs.create(
            job_config, tenant=local.TENANT, idempotency_key=idempotency_key, local_paths=True, checked=checked
        )
        return _job(made)

    def upload(self, path: Path, /) -> str:
        with path.open("rb") as stream:
            return self.jobs.put_file(stream, tenant=local.TENANT, filename=path.name, purpose="fine-tune").id

    def forget(self, file_id: str, /) -> None:
        self.jobs.delete_file(file_id, tenant=local.TENANT)

    def get(self, job_id: str, /) -> Job:
        return _job(self.jobs.get(job_id, tenant=local.TENANT))

    def list(self, *, state: str | None = None) -> Sequence[Job]:
        states = () if state is None else (JobState(state),)
        found: list[Job] = []
        while True:
            after = found[-1].id if found else None
            page = self.jobs.list(tenant=local.TENANT, after=after, limit=PAGE, states=states)
            found += map(_job, page.data)
            if not page.has_more:
                return found

    def cancel(self, job_id: str, /) -> Job:
        return _job(self.jobs.cancel(job_id, tenant=local.TENANT))

    def pause(self, job_id: str, /) -> Job:
        return _job(self.jobs.pause(job_id, tenant=local.TENANT))

    def resume(self, job_id: str, /) -> Job:
        return _job(self.jobs.resume(job_id, tenant=local.TENANT))

    def events(self, job_id: str, /, *, follow: bool = False, after_seq: int = 0) -> Iterator[JobEvent]:
        seq = after_seq
        while True:
            page = self.jobs.events(job_id, tenant=local.TENANT, after_seq=seq, limit=EVENTS_AT_ONCE)
            for record in page:
                seq = record.seq
                yield decode(JobEvent, _read(ops.WATCH_JOB, answers.event(record)))
                if record.kind in FINAL_STATES:
                    return
            if not page:
                if not follow or self.jobs.get(job_id, tenant=local.TENANT).finished:
                    return
                time.sleep(POLL_S)

    def checkpoints(self, job_id: str, /) -> Sequence[Checkpoint]:
        found: list[Checkpoint] = []
        while True:
            after = found[-1].id if found else None
            page = self.jobs.checkpoints(job_id, tenant=local.TENANT, after=after, limit=PAGE)
            document = answers.page(page, answers.checkpoint)
            found += decode(CheckpointPage, _read(ops.LIST_CHECKPOINTS, document)).data
            if not page.has_more:
                return found

    def metrics(self, job_id: str, /) -> Sequence[MetricsRow]:
        rows = map(series_row, self.jobs.metrics(job_id, tenant=local.TENANT))
        return [
            MetricsRow(step=int(row["step"]), values={name: row[name] for name in row if name != "step"})
            for row in rows
        ]

    def logs(self, job_id: str, /, *, attempt: int | None, rank: int) -> str:
        return history.log_text(self.jobs, job_id, tenant=local.TENANT, attempt=attempt, rank=rank)

    def fetch(self, job_id: str, /, *, step: int | None, into: Path, merged: bool = False) -> None:
        assert not merged, "the command merges what the store has"
        for path in results.exported_files(self, job_id, tenant=local.TENANT, step=step):
            shutil.copyfile(path, into / path.name)

    def deploy(self, job_id: str, alias: str, /, *, step: int | None) -> Deployed:
        results.check_alias(alias)
        model, previous = results.deploy(self, job_id, tenant=local.TENANT, step=step, alias=alias)
        return Deployed(model=model, alias=alias, previous=previous)

    def undeploy(self, alias: str, /, *, expected: str | None) -> DeletedAlias:
        target = results.undeploy(self, alias, tenant=local.TENANT, expected=expected)
        return DeletedAlias(alias=alias, target=target)

    def clean(self, *, dry_run: bool) -> Sequence[Removal]:
        """What the store need not keep, taken away."""
        with told():
            return clean(self.jobs, dry_run=dry_run)

    def _file(self, file_id: str) -> local.DataFile:
        record = self.jobs.get_file(file_id, tenant=local.TENANT)
        return local.DataFile(self.jobs.file_path(file_id, tenant=local.TENANT), record.filename)


def _job(record: JobRecord) -> Job:
    page = answers.page(Page((record,), has_more=False), answers.job)
    return decode(JobPage, _read(ops.LIST_JOBS, page)).data[0]


def _read(operation: Operation, document: Mapping[str, Any]) -> Mapping[str, Any]:
    assert operation.read is not None
    fields: Mapping[str, Any] = operation.read(document)
    return fields
