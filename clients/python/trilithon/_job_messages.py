"""Messages of the operations on jobs and files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, BinaryIO

from google.protobuf.message import Message

from trilithon._job_operations import chunks
from trilithon._transport import Fields
from trilithon.api.v1 import finetune_pb2 as pb


def upload_messages(fields: Fields, stream: BinaryIO) -> Iterator[pb.UploadFileRequest]:
    """The header and the chunks of an upload."""
    yield pb.UploadFileRequest(header=pb.FileHeader(**fields))
    for piece in chunks(stream):
        yield pb.UploadFileRequest(chunk=piece)


def _list_jobs(fields: Fields) -> pb.ListJobsRequest:
    """A page of jobs; the state by its short name."""
    state = fields.get("state")
    rest = {name: value for name, value in fields.items() if name != "state"}
    states = [] if state is None else [pb.JobState.Value(f"JOB_STATE_{state.upper()}")]
    return pb.ListJobsRequest(states=states, **rest)


def _plain(kind: Callable[..., Message], fields: Fields) -> Message:
    return kind(**fields)


_ONE_JOB = ("get_job", "cancel_job", "pause_job", "resume_job")

REQUESTS: Mapping[str, Callable[[Fields], Message]] = {
    "list_jobs": _list_jobs,
    **{
        name: partial(_plain, kind)
        for name, kind in {
            **dict.fromkeys(_ONE_JOB, pb.JobId),
            **dict.fromkeys(("get_file", "delete_file", "download_file"), pb.FileId),
            **dict.fromkeys(("create_job", "estimate_job"), pb.CreateJobRequest),
            "watch_job": pb.WatchJobRequest,
            "list_checkpoints": pb.ListCheckpointsRequest,
            "list_metrics": pb.ListMetricsRequest,
            "read_logs": pb.ReadLogsRequest,
            "export": pb.ExportRequest,
            "deploy": pb.DeployRequest,
            "validate_file": pb.ValidateFileRequest,
            "list_files": pb.ListFilesRequest,
        }.items()
    },
}
"""Operation name -> its request message from field values."""

RESPONSES: Mapping[str, type[Any]] = {
    **dict.fromkeys(("create_job", *_ONE_JOB), pb.Job),
    **dict.fromkeys(("get_file", "export", "upload_file"), pb.File),
    "estimate_job": pb.Estimate,
    "list_jobs": pb.ListJobsResponse,
    "watch_job": pb.JobEvent,
    "list_checkpoints": pb.ListCheckpointsResponse,
    "list_metrics": pb.ListMetricsResponse,
    "read_logs": pb.ReadLogsResponse,
    "deploy": pb.DeployResponse,
    "validate_file": pb.DatasetReport,
    "list_files": pb.ListFilesResponse,
    "delete_file": pb.DeleteFileResponse,
    "download_file": pb.FileChunk,
}
"""Operation name -> its answer's message."""
