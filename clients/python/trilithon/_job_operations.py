"""
Operations on jobs and files, and how HTTP's JSON, which has OpenAI's shapes, becomes the fields that gRPC has.

    client.jobs, client.files -> fields by their proto names -> HTTP: `write` -> JSON -> `read` -> fields -> dataclass
                                                             -> gRPC: the message itself
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from trilithon._job_types import (
    CheckpointPage,
    DatasetReport,
    Deleted,
    Deployed,
    Estimate,
    File,
    FileChunk,
    FilePage,
    Job,
    JobEvent,
    JobPage,
    Logs,
    MetricsPage,
)
from trilithon._transport import Fields, Operation
from trilithon.errors import DataLoss

CHUNK_BYTES = 1 << 20
"""Of an upload over gRPC."""

OUTER = ("model", "training_file", "validation_file", "suffix", "seed", "metadata", "task", "priority")
"""Fields of a job's configuration that have their own place in the request."""

_SERVICE = "trilithon.api.v1.FinetuneService/"
_JOBS = "/v1/fine_tuning/jobs"
_SHARED = ("model", "training_file", "validation_file", "suffix", "seed", "metadata")


def job_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request from a configuration as its YAML file has it."""
    fields = {name: config[name] for name in OUTER if config.get(name) is not None}
    rest = {name: value for name, value in config.items() if name not in OUTER and value is not None}
    if rest:
        fields["config_json"] = json.dumps(rest)
    return fields


def _write_job(fields: Fields) -> dict[str, Any]:
    inner: dict[str, Any] = json.loads(fields.get("config_json") or "{}")
    inner |= {name: fields[name] for name in ("task", "priority") if name in fields}
    return {**{name: fields[name] for name in _SHARED if name in fields}, "trilithon": inner}


def _read_job(document: Mapping[str, Any]) -> dict[str, Any]:
    ours = document["trilithon"]
    same = ("id", "model", "fine_tuned_model", "training_file", "validation_file", "result_files", "seed", "created_at",
            "finished_at", "estimated_finish", "metadata", "organization_id")  # fmt: skip
    inner = ("state", "task", "started_at", "attempt", "base_digest", "data_digest", "template_digest", "last_seq",
             "error")  # fmt: skip
    return {
        **{name: document.get(name) for name in same},
        **{name: ours.get(name) for name in inner},
        "progress": {**ours["progress"], "queue_position": ours.get("queue_position") or 0},
        "config_json": _json(ours.get("resolved") or ours["config"]),
        "checkpoints": [{**item, "job_id": document["id"]} for item in ours.get("checkpoints") or ()],
        "estimate_json": _json(ours["estimate"]) if ours.get("estimate") is not None else "",
    }


def _read_event(document: Mapping[str, Any]) -> dict[str, Any]:
    same = ("seq", "created_at_ms", "level", "type", "kind", "message", "attempt")
    return {
        **{name: document.get(name) for name in same},
        "job_id": document["fine_tuning_job_id"],
        "data_json": _json(document["data"]),
    }


def _read_checkpoint(document: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **document["trilithon"],
        "id": document["id"],
        "job_id": document["fine_tuning_job_id"],
        "step": document["step_number"],
        "created_at": document["created_at"],
        "model": document["fine_tuned_model_checkpoint"],
    }


def _read_file(document: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in ("object", "status")}


def _read_row(document: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {name: float(value) for name, value in document.items() if _is_number(value) and name != "step"}
    return {"step": int(document.get("step", 0)), "values": numbers}


def _read_deleted(document: Mapping[str, Any]) -> dict[str, Any]:
    return {"deleted": document["deleted"]}


def _page(read: Any) -> Any:
    return lambda document: {"data": [read(item) for item in document["data"]], "has_more": document["has_more"]}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


_KEY = {"idempotency_key": "idempotency-key"}

CREATE_JOB = Operation(
    "create_job", f"POST {_JOBS}", f"{_SERVICE}CreateJob", Job, write=_write_job, read=_read_job, headers=_KEY
)
ESTIMATE_JOB = Operation(
    "estimate_job", "POST /v1/fine_tuning/estimate", f"{_SERVICE}EstimateJob", Estimate, write=_write_job
)
GET_JOB = Operation("get_job", f"GET {_JOBS}/{{id}}", f"{_SERVICE}GetJob", Job, read=_read_job)
LIST_JOBS = Operation("list_jobs", f"GET {_JOBS}", f"{_SERVICE}ListJobs", JobPage, read=_page(_read_job))
CANCEL_JOB = Operation("cancel_job", f"POST {_JOBS}/{{id}}/cancel", f"{_SERVICE}CancelJob", Job, read=_read_job)
PAUSE_JOB = Operation("pause_job", f"POST {_JOBS}/{{id}}/pause", f"{_SERVICE}PauseJob", Job, read=_read_job)
RESUME_JOB = Operation("resume_job", f"POST {_JOBS}/{{id}}/resume", f"{_SERVICE}ResumeJob", Job, read=_read_job)
WATCH_JOB = Operation(
    "watch_job",
    f"GET {_JOBS}/{{id}}/events",
    f"{_SERVICE}WatchJob",
    JobEvent,
    write=lambda fields: {
        "stream": "true",
        "after_seq": fields.get("after_seq", 0),
        "follow": "false" if fields.get("no_wait") else "true",
    },
    read=_read_event,
    silence_s=60.0,  # the server speaks every 15 s at least
)
LIST_CHECKPOINTS = Operation(
    "list_checkpoints",
    f"GET {_JOBS}/{{job_id}}/checkpoints",
    f"{_SERVICE}ListCheckpoints",
    CheckpointPage,
    read=_page(_read_checkpoint),
)
LIST_METRICS = Operation(
    "list_metrics", f"GET {_JOBS}/{{job_id}}/metrics", f"{_SERVICE}ListMetrics", MetricsPage, read=_page(_read_row)
)
READ_LOGS = Operation("read_logs", f"GET {_JOBS}/{{job_id}}/logs", f"{_SERVICE}ReadLogs", Logs, text=True)
EXPORT = Operation("export", f"POST {_JOBS}/{{job_id}}/export", f"{_SERVICE}ExportCheckpoint", File, read=_read_file)
DEPLOY = Operation("deploy", f"POST {_JOBS}/{{job_id}}/deploy", f"{_SERVICE}DeployCheckpoint", Deployed)
VALIDATE_FILE = Operation(
    "validate_file", "POST /v1/files/{file_id}/validate", f"{_SERVICE}ValidateFile", DatasetReport
)
UPLOAD_FILE = Operation("upload_file", "POST /v1/files", f"{_SERVICE}UploadFile", File, read=_read_file)
GET_FILE = Operation("get_file", "GET /v1/files/{id}", f"{_SERVICE}GetFile", File, read=_read_file)
LIST_FILES = Operation("list_files", "GET /v1/files", f"{_SERVICE}ListFiles", FilePage, read=_page(_read_file))
DOWNLOAD_FILE = Operation("download_file", "GET /v1/files/{id}/content", f"{_SERVICE}DownloadFile", FileChunk, raw=True)
DELETE_FILE = Operation("delete_file", "DELETE /v1/files/{id}", f"{_SERVICE}DeleteFile", Deleted, read=_read_deleted)
JOB_OPERATIONS = (
    CREATE_JOB, ESTIMATE_JOB, GET_JOB, LIST_JOBS, CANCEL_JOB, PAUSE_JOB, RESUME_JOB, WATCH_JOB, LIST_CHECKPOINTS,
    LIST_METRICS, READ_LOGS, EXPORT, DEPLOY, VALIDATE_FILE, UPLOAD_FILE, DOWNLOAD_FILE, GET_FILE, LIST_FILES,
    DELETE_FILE,
)  # fmt: skip


class Source:
    """What is uploaded: a file of this machine or bytes, opened anew for every attempt."""

    def __init__(self, given: str | Path | bytes, filename: str | None) -> None:
        if isinstance(given, bytes) and not filename:
            raise TypeError("upload() of bytes needs `filename`. Given: none.")
        self._given = given
        self.filename = filename or Path(str(given)).name

    def open(self) -> BinaryIO:
        """A readable stream from the first byte."""
        return io.BytesIO(self._given) if isinstance(self._given, bytes) else Path(self._given).open("rb")


class Sink:
    """
    What is downloaded: a file that is there whole, with the bytes that the server has, or not at all.

    Raises:
        DataLoss: at the end, other bytes have come.
    """

    def __init__(self, target: str | Path, sha256: str) -> None:
        self._target, self._sha256 = Path(target), sha256
        self._part = self._target.with_name(f".{self._target.name}.part")
        self._digest = hashlib.sha256()

    def __enter__(self) -> Sink:
        self._file = self._part.open("wb")
        return self

    def write(self, piece: bytes) -> None:
        """The next bytes."""
        self._file.write(piece)
        self._digest.update(piece)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None and self._digest.hexdigest() == self._sha256:
            self._part.replace(self._target)
            return
        self._part.unlink(missing_ok=True)
        if kind is None:
            message = f"{self._target.name} has other bytes than the server's. Download it again."
            raise DataLoss(message, code="digest_mismatch")


def chunks(stream: BinaryIO) -> Iterator[bytes]:
    """The stream's bytes in pieces."""
    while piece := stream.read(CHUNK_BYTES):
        yield piece
