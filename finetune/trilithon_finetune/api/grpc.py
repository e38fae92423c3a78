"""FinetuneService: each method a few lines over the door that HTTP calls too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from trilithon.api.v1 import finetune_pb2 as pb
from trilithon.api.v1 import finetune_pb2_grpc
from trilithon.errors import BodyTooLarge, InvalidArgument
from trilithon_finetune.api import convert, history, messages, results
from trilithon_finetune.api.checks import Checks
from trilithon_finetune.api.door import Door
from trilithon_finetune.api.exports import Exports
from trilithon_finetune.api.http_files import PIECE_BYTES
from trilithon_finetune.api.requests import (
    check_config,
    estimate_of,
    idempotency_key,
    in_range,
    purpose_of,
    report_of,
)
from trilithon_finetune.config import JobConfig
from trilithon_finetune.jobs.states import JobState
from trilithon_server.grpc.gate import current_call
from trilithon_server.validation import invalid


class Finetunes(finetune_pb2_grpc.FinetuneServiceServicer):
    """The servicer."""

    def __init__(self, door: Door, checks: Checks, exports: Exports) -> None:
        self._door = door
        self._checks = checks
        self._exports = exports

    # -- jobs -----------------------------------------------------------------------------------------------

    async def _config(self, request: pb.CreateJobRequest, tenant: str) -> JobConfig:
        document = convert.config_document(
            model=request.model,
            training_file=request.training_file,
            validation_file=request.validation_file,
            suffix=request.suffix,
            seed=request.seed if request.HasField("seed") else None,
            metadata=request.metadata,
            task=request.task,
            config_json=request.config_json,
            priority=request.priority,
        )
        config = convert.job_config(document, self._door.limits)
        await self._door.run(self._door.check_models, config, tenant=tenant)
        return config

    async def CreateJob(self, request: pb.CreateJobRequest, context: Any) -> pb.Job:
        """Queue a job."""
        tenant = _tenant()
        with self._door.working():
            key = idempotency_key(request.idempotency_key)
            config = await self._config(request, tenant)
            job = await self._door.run(self._door.jobs.create, config, tenant=tenant, idempotency_key=key)
            return messages.job(job)

    async def GetJob(self, request: pb.JobId, context: Any) -> pb.Job:
        """One job."""
        return messages.job(await self._door.run(self._door.jobs.get, request.id, tenant=_tenant()))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        """Jobs, newest first."""
        states: list[JobState] = []
        for i, number in enumerate(request.states):
            state = messages.state_of(number)
            if state is None:
                raise invalid(f"states[{i}]", "must be a state of a job", given=int(number))
            states.append(state)
        page = await self._door.run(
            self._door.jobs.list,
            tenant=_tenant(),
            after=request.after or None,
            limit=_limit(request.limit),
            states=states,
        )
        return pb.ListJobsResponse(data=[messages.job(item) for item in page.data], has_more=page.has_more)

    async def CancelJob(self, request: pb.JobId, context: Any) -> pb.Job:
        """End a job."""
        with self._door.working():
            return messages.job(await self._door.run(self._door.jobs.cancel, request.id, tenant=_tenant()))

    async def PauseJob(self, request: pb.JobId, context: Any) -> pb.Job:
        """Let a job rest."""
        with self._door.working():
            return messages.job(await self._door.run(self._door.jobs.pause, request.id, tenant=_tenant()))

    async def ResumeJob(self, request: pb.JobId, context: Any) -> pb.Job:
        """Let a job go on."""
        with self._door.working():
            return messages.job(await self._door.run(self._door.jobs.resume, request.id, tenant=_tenant()))

    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> AsyncIterator[pb.JobEvent]:
        """Events from the table, until the final one."""
        events = self._door.follow(
            request.id, tenant=_tenant(), after_seq=_seq(request.after_seq), wait=not request.no_wait
        )
        async with aclosing(events):
            async for event in events:
                yield messages.event(event)

    async def ListCheckpoints(self, request: pb.ListCheckpointsRequest, context: Any) -> pb.ListCheckpointsResponse:
        """Checkpoints, newest first."""
        page = await self._door.run(
            self._door.jobs.checkpoints,
            request.job_id,
            tenant=_tenant(),
            after=request.after or None,
            limit=_limit(request.limit),
        )
        data = [messages.checkpoint(item) for item in page.data]
        return pb.ListCheckpointsResponse(data=data, has_more=page.has_more)

    async def ListMetrics(self, request: pb.ListMetricsRequest, context: Any) -> pb.ListMetricsResponse:
        """Numbers of steps."""
        limit = in_range("limit", request.limit or 1000, low=1, high=10_000, given=request.limit)
        rows, more = await self._door.run(
            history.metrics_page,
            self._door.jobs,
            request.job_id,
            tenant=_tenant(),
            after_step=_seq(request.after_step, "after_step"),
            limit=limit,
        )
        return pb.ListMetricsResponse(data=[messages.metrics_row(row) for row in rows], has_more=more)

    async def ReadLogs(self, request: pb.ReadLogsRequest, context: Any) -> pb.ReadLogsResponse:
        """Output of a rank."""
        text = await self._door.run(
            history.log_text,
            self._door.jobs,
            request.job_id,
            tenant=_tenant(),
            attempt=request.attempt or None,
            rank=request.rank,
        )
        return pb.ReadLogsResponse(text=text)

    async def EstimateJob(self, request: pb.CreateJobRequest, context: Any) -> pb.Estimate:
        """What a job would take."""
        tenant = _tenant()
        with self._door.working():
            if request.idempotency_key:
                raise invalid("idempotency_key", "must be unset: an estimate makes nothing")
            config = await self._config(request, tenant)
            return messages.estimate(estimate_of(await self._checks.validate(config, tenant=tenant)))

    async def ExportCheckpoint(self, request: pb.ExportRequest, context: Any) -> pb.File:
        """A zip file of what a job made."""
        tenant = _tenant()
        if request.format not in ("", "peft", "model"):
            raise invalid("format", "must be peft or model", given=request.format)
        with self._door.working():
            step = _seq(request.step, "step") or None
            file = await self._exports.export(request.job_id, tenant=tenant, step=step, format=request.format or None)
            return messages.file(file)

    async def DeployCheckpoint(self, request: pb.DeployRequest, context: Any) -> pb.DeployResponse:
        """Move an alias."""
        tenant = _tenant()
        results.check_alias(request.alias)
        with self._door.working():
            model, previous = await self._door.run(
                results.deploy,
                self._door,
                request.job_id,
                tenant=tenant,
                step=_seq(request.step, "step") or None,
                alias=request.alias,
            )
            return pb.DeployResponse(model=model, alias=request.alias, previous=previous)

    # -- files ----------------------------------------------------------------------------------------------

    async def ValidateFile(self, request: pb.ValidateFileRequest, context: Any) -> pb.DatasetReport:
        """What is wrong with a data file."""
        tenant = _tenant()
        most = in_range("max_findings", request.max_findings or 20, low=1, high=1000, given=request.max_findings)
        config = check_config(request.model, request.task, request.file_id, self._door.limits)
        with self._door.working():
            data = await self._checks.validate(config, tenant=tenant, max_findings=most)
            return messages.report(report_of(data))

    async def UploadFile(self, requests: AsyncIterator[pb.UploadFileRequest], context: Any) -> pb.File:
        """A header, then chunks."""
        tenant = _tenant()
        with self._door.working():
            first = await anext(requests, None)
            if first is None or first.WhichOneof("part") != "header":
                raise invalid("header", "must come first", code="missing_parameter")
            header, most = first.header, self._door.limits.max_file_bytes
            if header.bytes > most:
                raise BodyTooLarge(f"a file may have at most {most} bytes. Given: {header.bytes}. Send less.")
            file = await self._door.jobs.receive_file(
                _chunks(requests, header.bytes),
                tenant=tenant,
                filename=header.filename,
                purpose=purpose_of(header.purpose),
                sha256=header.sha256 or None,
            )
            return messages.file(file)

    async def DownloadFile(self, request: pb.FileId, context: Any) -> AsyncIterator[pb.FileChunk]:
        """The bytes of a file."""
        source = await self._door.open_file(request.id, tenant=_tenant())
        with source:
            while piece := await self._door.run(source.read, PIECE_BYTES):
                yield pb.FileChunk(data=piece)

    async def GetFile(self, request: pb.FileId, context: Any) -> pb.File:
        """One file."""
        return messages.file(await self._door.run(self._door.jobs.get_file, request.id, tenant=_tenant()))

    async def ListFiles(self, request: pb.ListFilesRequest, context: Any) -> pb.ListFilesResponse:
        """Files, newest first."""
        page = await self._door.run(
            self._door.jobs.list_files,
            tenant=_tenant(),
            after=request.after or None,
            limit=_limit(request.limit),
            purpose=purpose_of(request.purpose, made=True) if request.purpose else None,
        )
        return pb.ListFilesResponse(data=[messages.file(item) for item in page.data], has_more=page.has_more)

    async def DeleteFile(self, request: pb.FileId, context: Any) -> pb.DeleteFileResponse:
        """Remove a file."""
        with self._door.working():
            await self._door.run(self._door.jobs.delete_file, request.id, tenant=_tenant())
            return pb.DeleteFileResponse(deleted=True)


async def _chunks(requests: AsyncIterator[pb.UploadFileRequest], declared: int) -> AsyncIterator[bytes]:
    size = 0
    async for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise invalid("chunk", "must follow the header: a header comes once")
        size += len(request.chunk)
        if declared and size > declared:
            break
        yield request.chunk
    if declared and size != declared:
        more = "more" if size > declared else str(size)
        raise InvalidArgument(
            f"the file must have the {declared} bytes that its header says. Given: {more}.", code="size_mismatch"
        )


def _tenant() -> str:
    return current_call().principal.tenant


def _limit(given: int) -> int:
    return in_range("limit", given or 20, low=1, high=100, given=given)


def _seq(given: int, name: str = "after_seq") -> int:
    return in_range(name, given, low=0, high=2**63 - 1, given=given)
