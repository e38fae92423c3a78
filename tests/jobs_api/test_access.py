"""Nobody in without a key (S3), and nobody at another tenant's jobs and files."""

from __future__ import annotations

import re
from typing import Any

import grpc
import httpx
import pytest
from front_server import ACME, MODEL, OTHER, bearer
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from jobs_server import JobsServer, Worker

from trilithon import Client, Conflict, NotFound
from trilithon_finetune.api.extension import SERVICES, JobsExtension
from trilithon_server.config import EngineConfig, JobsConfig, ServeConfig

EXTENSION = JobsExtension(
    ServeConfig(engines=(EngineConfig(model="x"),), jobs=JobsConfig(store="unused"))  # made, never started
)
METHODS = [
    (f"/{name}/{method.name}", method) for name in SERVICES for method in
    descriptor_pool.Default().FindServiceByName(name).methods
]  # fmt: skip


@pytest.mark.parametrize("route", EXTENSION.routes, ids=lambda route: f"{route.method} {route.path}")
def test_S3_every_route_of_jobs_wants_a_key(served_jobs: JobsServer, route: Any) -> None:
    """
    Without a key, or with a strange one, every route is 401.

    Inverse check: `access="public"` on one route makes its case fail.
    """
    path = re.sub(r"{\w+}", "x", route.path)

    for headers in ({}, bearer("sk-unknown")):
        answer = httpx.request(route.method, f"{served_jobs.server.url}{path}", headers=headers, timeout=60)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    known = served_jobs.http.request(route.method, path)
    assert known.status_code not in (401, 403)


@pytest.mark.parametrize(("path", "method"), METHODS, ids=[path for path, _ in METHODS])
def test_S3_every_rpc_of_jobs_wants_a_key(served_jobs: JobsServer, path: str, method: Any) -> None:
    """
    Without a key, or with a strange one, every RPC is UNAUTHENTICATED.

    Inverse check: FinetuneService among `PUBLIC_SERVICES` makes every case fail.
    """

    def status(*metadata: tuple[str, str]) -> grpc.StatusCode:
        with served_jobs.channel() as channel:
            call = channel.stream_stream(path, lambda b: b, lambda b: b)
            try:
                list(call(iter([b""]), metadata=metadata, timeout=20))
            except grpc.RpcError as error:
                return error.code()  # type: ignore[no-any-return, attr-defined]  # the stubs do not say so
            return grpc.StatusCode.OK

    assert status() == grpc.StatusCode.UNAUTHENTICATED
    assert status(("x-api-key", "sk-unknown")) == grpc.StatusCode.UNAUTHENTICATED
    assert status(("x-api-key", ACME)) not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL)


def test_another_tenants_jobs_and_files_are_not_there(stranger: Client, served_jobs: JobsServer) -> None:
    """
    Every call that takes an id answers NotFound for another tenant's, and its lists are empty of them.

    Inverse check: `tenant="acme"` in the door's `get` makes it fail.
    """
    job = served_jobs.job()
    mine = served_jobs.file(tenant="other")
    calls = [
        lambda: stranger.jobs.get(job.id),
        lambda: stranger.jobs.cancel(job.id),
        lambda: stranger.jobs.pause(job.id),
        lambda: stranger.jobs.resume(job.id),
        lambda: list(stranger.jobs.events(job.id)),
        lambda: stranger.jobs.checkpoints(job.id),
        lambda: stranger.jobs.metrics(job.id),
        lambda: stranger.jobs.logs(job.id),
        lambda: stranger.jobs.export(job.id),
        lambda: stranger.jobs.deploy(job.id, "faq"),
        lambda: stranger.files.get(job.training_file),
        lambda: stranger.files.delete(job.training_file),
        lambda: stranger.files.validate(job.training_file, model=MODEL),
    ]

    for call in calls:
        with pytest.raises(NotFound) as caught:
            call()  # type: ignore[no-untyped-call]  # a list of lambdas
        assert caught.value.code in ("job_not_found", "file_not_found")
    assert job.id not in [item.id for item in stranger.jobs.list()]
    assert [item.id for item in stranger.files.list() if item.id == job.training_file] == []
    assert mine in [item.id for item in stranger.files.list()]
    for path in (f"/v1/fine_tuning/jobs/{job.id}/plot.svg", f"/v1/files/{job.training_file}/content"):
        answer = httpx.get(f"{served_jobs.server.url}{path}", headers=bearer(OTHER), timeout=60)
        assert answer.status_code == 404


def test_a_file_in_use_stays(client: Client, served_jobs: JobsServer) -> None:
    """A file that a job reads cannot be removed until the job is over."""
    job = served_jobs.job()

    with pytest.raises(Conflict) as caught:
        client.files.delete(job.training_file)

    assert caught.value.code == "file_in_use"
    Worker(served_jobs.jobs)
    client.jobs.cancel(job.id)
    assert client.files.delete(job.training_file)


def test_R3_health_names_the_service(served_jobs: JobsServer) -> None:
    """`grpc.health.v1` answers for FinetuneService too, without a key."""
    with served_jobs.channel() as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICES[0]), timeout=30
        )
        assert any(answer.status == health_pb2.HealthCheckResponse.SERVING for answer in watch)
        watch.cancel()


@pytest.mark.parametrize("given", ["nowhere", "/etc/passwd", "../store"])
@pytest.mark.parametrize(("option", "what"), [("concepts", "no concepts"), ("encoder", "no model")])
def test_S8_an_option_names_what_the_server_knows(
    client: Client, served_jobs: JobsServer, option: str, what: str, given: str
) -> None:
    """Over either protocol other names, and paths, are told at once, with those that there are; no job is made."""
    options = {"concepts": "village", "encoder": MODEL, option: given}
    if option == "encoder":
        options.pop("concepts")
    before = len(client.jobs.list())
    with pytest.raises(NotFound) as caught:
        client.jobs.create(model=MODEL, training_file=served_jobs.file(), task="story_generator", options=options)

    assert given in caught.value.message
    assert what in caught.value.message
    assert len(client.jobs.list()) == before
