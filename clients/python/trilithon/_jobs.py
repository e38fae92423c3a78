"""Finetuning jobs and files, for threads; reached as `client.jobs` and `client.files`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from trilithon import _job_operations as ops
from trilithon import _requests
from trilithon._decode import decode
from trilithon._following import Following, page_fields
from trilithon._job_types import (
    Checkpoint,
    CheckpointPage,
    DatasetReport,
    Deleted,
    Deployed,
    Estimate,
    File,
    FilePage,
    Job,
    JobEvent,
    JobPage,
    Logs,
    MetricsPage,
    MetricsRow,
)
from trilithon._parameters import CallOptions
from trilithon._transport import AttemptFailed

if TYPE_CHECKING:
    from trilithon._client import Client

Format = Literal["peft", "model"]


class Jobs:
    """
    Finetuning jobs.

        job = client.jobs.create(model="smollm2-135m-instruct", training_file=client.files.upload("chats.jsonl").id)
        job = client.jobs.wait(job.id, on_event=lambda event: print(event.message))
        print(client.chat([{"role": "user", "content": "Hi"}], model=job.fine_tuned_model).text)
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
        self, config: Mapping[str, Any] | None = None, *, idempotency_key: str | None = None, **fields: Any
    ) -> Job:
        """
        Queue a job.

        Args:
            config: the configuration as its YAML file has it: model, training_file, task, tuning, optimizer ...
            idempotency_key: the same key with the same configuration names the same job for 24 hours.
            fields: further fields of the configuration, which go before `config`'s.
        """
        request = {**ops.job_fields({**(config or {}), **fields}), "idempotency_key": idempotency_key}
        return self._client._call(ops.CREATE_JOB, _requests.given(request), {}, Job)

    def estimate(self, config: Mapping[str, Any] | None = None, **fields: Any) -> Estimate:
        """What such a job would take; nothing is queued."""
        request = ops.job_fields({**(config or {}), **fields})
        return self._client._call(ops.ESTIMATE_JOB, request, {}, Estimate)

    def get(self, id: str, **options: Unpack[CallOptions]) -> Job:
        """One job. Raises NotFound."""
        return self._client._call(ops.GET_JOB, {"id": id}, options, Job)

    def list(self, *, state: str | None = None, **options: Unpack[CallOptions]) -> tuple[Job, ...]:
        """Every job, newest first, or those in one state."""
        found: tuple[Job, ...] = ()
        while True:
            page = self._client._call(ops.LIST_JOBS, page_fields(found, state=state), options, JobPage)
            found += page.data
            if not page.has_more:
                return found

    def cancel(self, id: str, **options: Unpack[CallOptions]) -> Job:
        """End a job; its last good checkpoint stays. Raises FailedPrecondition when it is over."""
        return self._client._call(ops.CANCEL_JOB, {"id": id}, options, Job)

    def pause(self, id: str, **options: Unpack[CallOptions]) -> Job:
        """Write a checkpoint and let go of the machine. Raises FailedPrecondition when it is over."""
        return self._client._call(ops.PAUSE_JOB, {"id": id}, options, Job)

    def resume(self, id: str, **options: Unpack[CallOptions]) -> Job:
        """Go on from the last checkpoint. Raises FailedPrecondition when it is over."""
        return self._client._call(ops.RESUME_JOB, {"id": id}, options, Job)

    def events(
        self, id: str, *, follow: bool = False, after_seq: int = 0, timeout_s: float | None = None
    ) -> Iterator[JobEvent]:
        """
        Events in their order, each once.

        Args:
            follow: wait for more until the job is over; a cut connection is made anew, and nothing is lost.
            after_seq: start after that event.
            timeout_s: raise DeadlineExceeded after so long.
        """
        following = Following(id, after_seq=after_seq, follow=follow, timeout_s=timeout_s)
        while not following.ended:
            try:
                stream = self._client._transport.stream(following.fields, following.attempt(), ops.WATCH_JOB)
                try:
                    for _, fields in stream:
                        yield following.seen(decode(JobEvent, fields))
                finally:
                    stream.close()
                following.closed()
            except AttemptFailed as failed:
                time.sleep(following.pause_after(failed))

    def wait(
        self, id: str, *, timeout_s: float | None = None, on_event: Callable[[JobEvent], None] | None = None
    ) -> Job:
        """
        Wait until a job is over; the job as it is then, whether it has succeeded or not.

        Args:
            timeout_s: raise DeadlineExceeded after so long; the job goes on.
            on_event: told of every event, past ones first.
        """
        after = 0 if on_event is not None else max(0, self.get(id).last_seq - 1)
        for event in self.events(id, follow=True, after_seq=after, timeout_s=timeout_s):
            if on_event is not None:
                on_event(event)
        return self.get(id)

    def checkpoints(self, id: str, **options: Unpack[CallOptions]) -> tuple[Checkpoint, ...]:
        """Every checkpoint, newest first."""
        found: tuple[Checkpoint, ...] = ()
        while True:
            fields = page_fields(found, job_id=id)
            page = self._client._call(ops.LIST_CHECKPOINTS, fields, options, CheckpointPage)
            found += page.data
            if not page.has_more:
                return found

    def metrics(self, id: str, *, after_step: int = 0, **options: Unpack[CallOptions]) -> tuple[MetricsRow, ...]:
        """The numbers of every step and evaluation after `after_step`."""
        found: tuple[MetricsRow, ...] = ()
        while True:
            fields = {"job_id": id, "after_step": found[-1].step if found else after_step}
            page = self._client._call(ops.LIST_METRICS, fields, options, MetricsPage)
            found += page.data
            if not page.has_more:
                return found

    def logs(self, id: str, *, attempt: int | None = None, rank: int = 0, **options: Unpack[CallOptions]) -> str:
        """The end of what a rank printed, in the newest attempt unless `attempt` says else."""
        fields = _requests.given({"job_id": id, "attempt": attempt, "rank": rank})
        return self._client._call(ops.READ_LOGS, fields, options, Logs).text

    def export(
        self, id: str, *, step: int | None = None, format: Format | None = None, **options: Unpack[CallOptions]
    ) -> File:
        """What a job made, or a checkpoint of it, as a zip file on the server."""
        fields = _requests.given({"job_id": id, "step": step, "format": format})
        return self._client._call(ops.EXPORT, fields, options, File)

    def deploy(self, id: str, alias: str, *, step: int | None = None, **options: Unpack[CallOptions]) -> Deployed:
        """Point an alias at what a job made, or at a checkpoint of it."""
        fields = _requests.given({"job_id": id, "alias": alias, "step": step})
        return self._client._call(ops.DEPLOY, fields, options, Deployed)


class Files:
    """Files that jobs read and make."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def upload(
        self,
        source: str | Path | bytes,
        *,
        purpose: str = "fine-tune",
        filename: str | None = None,
        **options: Unpack[CallOptions],
    ) -> File:
        """
        Store a file, which is read as it is sent.

        Args:
            source: a path, or the bytes themselves.
            purpose: fine-tune, or evidence.
            filename: its name on the server; of bytes it must be given.
        """
        upload = ops.Source(source, filename)
        fields = {"purpose": purpose, "filename": upload.filename}
        retries = self._client._retries(options)
        while True:
            try:
                with upload.open() as stream:
                    answer = self._client._transport.upload(ops.UPLOAD_FILE, fields, stream, retries.attempt())
                return decode(File, answer)
            except AttemptFailed as failed:
                delay_s = retries.delay_after(failed)
            time.sleep(delay_s)

    def get(self, id: str, **options: Unpack[CallOptions]) -> File:
        """One file. Raises NotFound."""
        return self._client._call(ops.GET_FILE, {"id": id}, options, File)

    def list(self, *, purpose: str | None = None, **options: Unpack[CallOptions]) -> tuple[File, ...]:
        """Every file, newest first, or those of one purpose."""
        found: tuple[File, ...] = ()
        while True:
            page = self._client._call(ops.LIST_FILES, page_fields(found, purpose=purpose), options, FilePage)
            found += page.data
            if not page.has_more:
                return found

    def download(self, id: str, target: str | Path, **options: Unpack[CallOptions]) -> File:
        """Write a file's bytes to `target`, whole and compared with its SHA-256. Raises NotFound, DataLoss."""
        file = self.get(id, **options)
        retries = self._client._retries(options)
        while True:
            try:
                with ops.Sink(target, file.sha256) as sink:
                    stream = self._client._transport.stream({"id": id}, retries.attempt(), ops.DOWNLOAD_FILE)
                    try:
                        for _, fields in stream:
                            sink.write(fields["data"])
                    finally:
                        stream.close()
                return file
            except AttemptFailed as failed:
                delay_s = retries.delay_after(failed)
            time.sleep(delay_s)

    def delete(self, id: str, **options: Unpack[CallOptions]) -> bool:
        """Remove a file. Raises Conflict while a job that is not over reads it."""
        return self._client._call(ops.DELETE_FILE, {"id": id}, options, Deleted).deleted

    def validate(
        self,
        id: str,
        *,
        model: str,
        task: str = "sft",
        max_findings: int | None = None,
        timeout: float | None = None,
    ) -> DatasetReport:
        """Everything that is wrong with a data file for a task and a model."""
        fields = _requests.given({"file_id": id, "model": model, "task": task, "max_findings": max_findings})
        options: CallOptions = {} if timeout is None else {"timeout": timeout}
        return self._client._call(ops.VALIDATE_FILE, fields, options, DatasetReport)
