"""The Python client's jobs and files, over both protocols and from both kinds of code."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from front_server import ACME, MODEL
from jobs_server import ACME_TENANT, DATA, JobsServer, Worker

from trilithon import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    Job,
    JobEvent,
    NotFound,
)


def test_a_job_is_run_by_the_client(client: Client, served_jobs: JobsServer, tmp_path: Path) -> None:
    """Upload, create, pause, resume, watch, read and cancel work alike over HTTP and gRPC."""
    path = tmp_path / "chats.jsonl"
    path.write_bytes(DATA)
    file = client.files.upload(path)
    config = {"model": MODEL, "task": "sft", "tuning": {"rank": 4}, "metadata": {"a": "b"}, "priority": 3}
    job = client.jobs.create(config, training_file=file.id, suffix="faq", seed=0)
    worker = Worker(served_jobs.jobs)
    worker.validated(job.id)
    queued = client.jobs.get(job.id)
    paused = client.jobs.pause(job.id)
    client.jobs.resume(job.id)
    claim = worker.running(job.id)
    for step in range(1, 4):
        worker.step(claim, step, train_loss=3.0 - step)
    worker.checkpoint(claim, 3, {"train_loss": 0.0})
    (served_jobs.jobs.paths.job(job.id).run).mkdir(parents=True)
    rows = "".join(f'{{"step": {step}, "loss": {3.0 - step}, "validation": null}}\n' for step in range(1, 4))
    (served_jobs.jobs.paths.job(job.id).run / "metrics.jsonl").write_text(rows)
    events = list(client.jobs.events(job.id))
    worker.succeeded(claim)
    seen: list[JobEvent] = []
    done = client.jobs.wait(job.id, timeout_s=60, on_event=seen.append)

    assert (file.bytes, file.filename, file.purpose) == (len(DATA), "chats.jsonl", "fine-tune")
    assert (job.state, job.model, job.seed, job.metadata) == ("validating", MODEL, 0, {"a": "b"})
    assert job.config["tuning"]["rank"] == 4
    assert job.config["priority"] == 3
    assert (queued.state, queued.progress.queue_position >= 1) == ("queued", True)
    assert paused.state == "paused"
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.data["step"] for event in events if event.kind == "step"] == [1, 2, 3]
    assert [event.seq for event in seen] == list(range(1, done.last_seq + 1))
    assert seen[-1].kind == "succeeded"
    assert (done.state, done.finished, done.fine_tuned_model) == ("succeeded", True, f"ft:{MODEL}:faq:{job.id[6:]}")
    assert [item.step for item in client.jobs.checkpoints(job.id)] == [3]
    assert (job.checkpoints, done.checkpoints) == ((), client.jobs.checkpoints(job.id))
    assert [(row.step, row.values) for row in client.jobs.metrics(job.id, after_step=1)] == [
        (2, {"train_loss": 1.0}),
        (3, {"train_loss": 0.0}),
    ]
    assert job.id in [item.id for item in client.jobs.list(state="succeeded")]
    with pytest.raises(FailedPrecondition):
        client.jobs.cancel(job.id)


def test_both_protocols_tell_the_same(served_jobs: JobsServer) -> None:
    """The same job, events, checkpoints and files come back over HTTP and gRPC, field by field."""
    job = served_jobs.job(suffix="same", tuning={"kind": "lora", "rank": 4}, seed=9)
    worker = Worker(served_jobs.jobs)
    estimate = {"steps": 5, "allowed": True}
    worker.validated(job.id, estimate=estimate, base_digest="b" * 64, data_digest="c" * 64)
    claim = worker.running(job.id)
    worker.step(claim, 1, train_loss=2.5)
    worker.checkpoint(claim, 1, {"train_loss": 2.5, "own": 0.25})
    server = served_jobs.server

    def everything(client: Client) -> list[Any]:
        return [
            client.jobs.get(job.id),
            list(client.jobs.events(job.id)),
            client.jobs.checkpoints(job.id),
            client.files.get(job.training_file),
            client.files.list(purpose="fine-tune"),
            client.jobs.list(),
        ]

    with Client(server.url, api_key=ACME) as http, Client(server.grpc_target, api_key=ACME) as rpc:
        over_http, over_grpc = everything(http), everything(rpc)

    assert over_http == over_grpc
    assert over_http[0].estimate_json
    assert [item.metrics for item in over_http[0].checkpoints] == [{"train_loss": 2.5, "own": 0.25}]


def test_checks_are_answered_alike(client: Client, served_jobs: JobsServer) -> None:
    """A report with its findings, an estimate, and a refusal that names the field come over both protocols."""
    good, bad = served_jobs.file(b"good row\n"), served_jobs.file(b"bad row\n")
    refused = served_jobs.file(b"refuse row\n")

    report = client.files.validate(good, model=MODEL, max_findings=7)
    broken = client.files.validate(bad, model=MODEL)
    estimate = client.jobs.estimate(model=MODEL, training_file=good, training={"epochs": 3})

    assert (report.ok, report.rows, report.length_histogram, report.counts["max_findings"]) == (True, 20, (0, 3, 17), 7)
    assert (broken.ok, broken.errors, broken.findings[0].line) == (False, 1, 17)
    assert (estimate.steps, estimate.memory_parts["weights"], estimate.allowed) == (15, 5, True)
    with pytest.raises(InvalidArgument, match="asistant") as caught:
        client.jobs.estimate(model=MODEL, training_file=bad)
    assert caught.value.code == "invalid_training_file"
    with pytest.raises(InvalidArgument, match=r"data\.max_tokens"):
        client.jobs.estimate(model=MODEL, training_file=refused)


def test_waiting_has_an_end(client: Client, served_jobs: JobsServer) -> None:
    """`wait` gives up after `timeout_s` and leaves the job alone."""
    job = served_jobs.job()

    with pytest.raises(DeadlineExceeded):
        client.jobs.wait(job.id, timeout_s=0.6)

    assert client.jobs.get(job.id).state == "validating"


def test_strange_names_are_not_found(client: Client) -> None:
    """An id that is nobody's is NotFound, for every call that takes one."""
    with pytest.raises(NotFound):
        client.jobs.get("ftjob-nobody")
    with pytest.raises(NotFound):
        list(client.jobs.events("../../etc", follow=True))
    with pytest.raises(NotFound):
        client.files.get("file-../x")
    with pytest.raises(NotFound) as model:
        client.jobs.create(model="../store", training_file="file-x")
    assert model.value.code == "model_not_found"


@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_the_asynchronous_client_is_the_same(protocol: str, served_jobs: JobsServer) -> None:
    """Jobs and files of `AsyncClient` answer like those of `Client`."""
    server = served_jobs.server
    url = server.url if protocol == "http" else server.grpc_target
    worker = Worker(served_jobs.jobs)

    async with AsyncClient(url, api_key=ACME) as client:
        file = await client.files.upload(DATA, filename="a.jsonl")
        job = await client.jobs.create(model=MODEL, training_file=file.id)
        seen: list[JobEvent] = []
        waiting = asyncio.create_task(client.jobs.wait(job.id, timeout_s=60, on_event=seen.append))
        await asyncio.to_thread(worker.validated, job.id)
        claim = await asyncio.to_thread(worker.running, job.id)
        await asyncio.to_thread(worker.succeeded, claim)
        done = await waiting
        listed = await client.jobs.list(state="succeeded")
        with Client(url, api_key=ACME) as other:
            same = await asyncio.to_thread(other.jobs.get, job.id)

    assert isinstance(done, Job)
    assert done == same
    assert done.id in [item.id for item in listed]
    assert [event.seq for event in seen] == list(range(1, done.last_seq + 1))
    assert served_jobs.jobs.get(job.id, tenant=ACME_TENANT).finished
