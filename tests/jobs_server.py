"""What tests of the jobs' fronts work with: a server, clients with a key, and the store behind it, moved by hand."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
from front_server import MODEL
from served import Server

from trilithon_finetune.config import JobConfig
from trilithon_finetune.jobs.moves import NewEvent
from trilithon_finetune.jobs.queue import Claim, Move, NewCheckpoint, Queue
from trilithon_finetune.jobs.records import Job
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.jobs.states import JobState

ACME_TENANT = "acme"
DATA = b'good {"messages": []}\n'


@dataclass
class JobsServer:
    """A running server with jobs."""

    server: Server
    http: httpx.Client
    jobs: Jobs
    """The same store, opened by the test."""
    model_dir: Path
    """Of the served model."""

    def file(self, content: bytes = DATA, *, tenant: str = ACME_TENANT, name: str = "data.jsonl") -> str:
        """A file of the tenant."""
        return self.jobs.put_file(io.BytesIO(content), tenant=tenant, filename=name, purpose="fine-tune").id

    def job(self, *, tenant: str = ACME_TENANT, **config: Any) -> Job:
        """A job that waits for validation."""
        document = {"model": MODEL, "training_file": self.file(tenant=tenant), **config}
        return self.jobs.create(JobConfig.model_validate(document), tenant=tenant)

    def channel(self) -> grpc.Channel:
        """To the server's gRPC port."""
        return grpc.insecure_channel(f"127.0.0.1:{self.server.grpc_port}")


class Worker:
    """Moves a job as a worker does, without running anything."""

    def __init__(self, jobs: Jobs) -> None:
        self.queue = Queue(jobs.database)

    def claim(self, job_id: str, state: JobState) -> Claim:
        """Take that job; what stands before it in the queue is taken too and left alone."""
        while True:
            claim = self.queue.claim(state, owner="test", lease_s=600)
            assert claim is not None
            if claim.job.id == job_id:
                return claim

    def validated(self, job_id: str, **values: Any) -> Job:
        """Through validation into the queue."""
        claim = self.claim(job_id, JobState.VALIDATING)
        move = Move(JobState.QUEUED, (NewEvent(kind="validated", message="The job is valid."),))
        return self.queue.write(claim, move, values=values or None, release=True)

    def running(self, job_id: str) -> Claim:
        """From the queue into running."""
        claim = self.claim(job_id, JobState.QUEUED)
        self.queue.write(claim, Move(JobState.STARTING, (NewEvent(kind="gang_started", message="Started."),)))
        self.queue.write(claim, Move(JobState.RUNNING, (NewEvent(kind="running", message="Running."),)))
        return claim

    def step(self, claim: Claim, step: int, **data: Any) -> None:
        """An event of a step."""
        event = NewEvent(kind="step", message=f"Step {step}.", data={"step": step, **data}, step=step)
        self.queue.write(claim, Move(None, (event,)), offset=step)

    def checkpoint(self, claim: Claim, step: int, metrics: Mapping[str, float]) -> None:
        """A checkpoint and its event."""
        event = NewEvent(kind="checkpoint_saved", message=f"Checkpoint {step}.", data={"step": step})
        saved = NewCheckpoint(step=step, digest="d" * 64, bytes=10, metrics=metrics)
        self.queue.write(claim, Move(None, (event,)), offset=10_000 + step, saved=(saved,))

    def succeeded(self, claim: Claim, **values: Any) -> Job:
        """To the good end."""
        self.queue.write(claim, Move(JobState.EXPORTING, ()))
        self.queue.write(claim, Move(JobState.VERIFYING, ()))
        done = Move(JobState.SUCCEEDED, (NewEvent(kind="succeeded", message="The job has succeeded."),))
        return self.queue.write(claim, done, values=values or None, release=True)
