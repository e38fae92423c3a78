"""Streams of events: from any point, each once, over cuts, to the final one; and noticed when the client is gone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import pytest
from front_server import ACME, bearer
from jobs_server import JobsServer, Worker

from trilithon import Client, JobEvent
from trilithon.api.v1 import finetune_pb2 as pb
from trilithon.api.v1 import finetune_pb2_grpc


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, with a generous deadline."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


def stream(served_jobs: JobsServer, job_id: str, *, last: int | None = None, take: int | None = None) -> list[Any]:
    """Events of an SSE stream as (id, document); `take` cuts it after so many."""
    headers = bearer(ACME) | ({} if last is None else {"last-event-id": str(last)})
    url = f"{served_jobs.server.url}/v1/fine_tuning/jobs/{job_id}/events?stream=true"
    found: list[Any] = []
    with httpx.stream("GET", url, headers=headers, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        seq = None
        for line in answer.iter_lines():
            if line.startswith("id: "):
                seq = int(line[4:])
            elif line == "data: [DONE]":
                found.append("done")
            elif line.startswith("data: "):
                found.append((seq, json.loads(line[6:])))
            if take is not None and len(found) == take:
                break
    return found


def finished_job(served_jobs: JobsServer, steps: int = 5) -> tuple[str, int]:
    """A job that has succeeded after some steps, and its last event."""
    worker = Worker(served_jobs.jobs)
    job = served_jobs.job()
    worker.validated(job.id)
    claim = worker.running(job.id)
    for step in range(1, steps + 1):
        worker.step(claim, step, train_loss=1.0)
    return job.id, worker.succeeded(claim).last_seq


def test_last_event_id_after_a_cut_sees_each_event_once(served_jobs: JobsServer) -> None:
    """
    A stream that is cut and gone on with by `Last-Event-ID` tells each event once, then says that it is done.

    Inverse check: an `after_seq` that is one less makes it fail.
    """
    job_id, last = finished_job(served_jobs)

    first = stream(served_jobs, job_id, take=4)
    rest = stream(served_jobs, job_id, last=first[-1][0])

    assert rest[-1] == "done"
    events = [*first, *rest[:-1]]
    assert [seq for seq, _ in events] == list(range(1, last + 1))
    assert all(seq == document["seq"] for seq, document in events)
    assert events[-1][1]["kind"] == "succeeded"
    assert stream(served_jobs, job_id, last=last) == ["done"]


def test_events_come_while_they_happen(client: Client, served_jobs: JobsServer) -> None:
    """A follower hears of every event soon after it is written, and its stream ends with the job's final event."""
    worker = Worker(served_jobs.jobs)
    job = served_jobs.job()
    seen: list[JobEvent] = []

    def follow() -> None:
        seen.extend(client.jobs.events(job.id, follow=True))

    thread = threading.Thread(target=follow)
    thread.start()
    worker.validated(job.id)
    claim = worker.running(job.id)
    worker.step(claim, 1)
    done = worker.succeeded(claim)
    thread.join(60)

    assert not thread.is_alive()
    assert [event.seq for event in seen] == list(range(1, done.last_seq + 1))
    assert seen[-1].kind == "succeeded"


def test_a_page_goes_backwards_without_gaps(served_jobs: JobsServer) -> None:
    """Pages of events, newest first, join to all of them, whatever the page size."""
    job_id, last = finished_job(served_jobs, steps=12)
    url = f"/v1/fine_tuning/jobs/{job_id}/events"

    for size in (1, 3, 100):
        found: list[int] = []
        query: dict[str, Any] = {"limit": size}
        while True:
            page = served_jobs.http.get(url, params=query).json()
            found += [event["seq"] for event in page["data"]]
            assert page["first_id"] == page["data"][0]["id"]
            if not page["has_more"]:
                break
            query["after"] = page["last_id"]
        assert found == list(range(last, 0, -1))


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("after=ftevent-x-1", "after"),
        ("stream=yes", "stream"),
        ("stream=true&limit=3", "limit"),
        ("after_seq=3", "after_seq"),
        ("stream=true&after_seq=-1", "after_seq"),
        ("nonsense=1", "nonsense"),
    ],
)
def test_R11_bad_queries_are_told_why(served_jobs: JobsServer, query: str, param: str) -> None:
    """Each broken query parameter is named."""
    job = served_jobs.job()

    answer = served_jobs.http.get(f"/v1/fine_tuning/jobs/{job.id}/events?{query}")

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def streams_of_server(served_jobs: JobsServer) -> float:
    """Job-event streams that end show as finished requests in the metrics; this counts them."""
    text = served_jobs.http.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("trilithon_requests_total") and "/events" in line]
    lines += [line for line in text.splitlines() if line.startswith("trilithon_requests_total") and "WatchJob" in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_R6_a_client_that_leaves_is_noticed(served_jobs: JobsServer) -> None:
    """A stream whose client is gone ends on the server, though the job goes on."""
    job = served_jobs.job()
    before = streams_of_server(served_jobs)

    stream(served_jobs, job.id, take=1)
    with served_jobs.channel() as channel:
        stub = finetune_pb2_grpc.FinetuneServiceStub(channel)
        call = stub.WatchJob(pb.WatchJobRequest(id=job.id), metadata=(("x-api-key", ACME),), timeout=60)
        assert next(iter(call)).seq == 1
        call.cancel()

    until(lambda: streams_of_server(served_jobs) >= before + 2)


def test_a_deadline_ends_a_watch(served_jobs: JobsServer) -> None:
    """A gRPC deadline ends a stream that would go on."""
    job = served_jobs.job()
    with served_jobs.channel() as channel:
        stub = finetune_pb2_grpc.FinetuneServiceStub(channel)
        call = stub.WatchJob(pb.WatchJobRequest(id=job.id), metadata=(("x-api-key", ACME),), timeout=1.0)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)

    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]  # the stubs lack it
