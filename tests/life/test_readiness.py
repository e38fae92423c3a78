"""R3 and R4: three health questions, never false-alive, never false-dead; and a queue that is bounded."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from served import Server, serving
from tiny import tiny_llama
from under_load import Load, Processes, readiness, wait_until

from trilithon import Client
from trilithon.api.v1 import generation_pb2, generation_pb2_grpc
from trilithon.errors import Overloaded, TrilithonError

FLAGS = ("--log-format", "json", "--set", "engines.0.kv_cache_bytes=16MiB")
SERVING = health_pb2.HealthCheckResponse.SERVING


def test_R3_alive_before_ready_and_ready_after_the_first_load(tiny_dir: Path, sockets: Path) -> None:
    """
    While the model loads the server lives, is neither started nor ready, and refuses work as `loading` on both
    protocols; the health service's Watch tells of the change.

    Inverse seen: with `/readyz` answering as `/livez` the first assertion fails.
    """
    env = {"XDG_RUNTIME_DIR": str(sockets)}
    with serving(tiny_dir, *FLAGS, env=env, wait=False) as server:
        wait_until(lambda: readiness(server) != 0, seconds=60)
        status = {path: httpx.get(f"{server.url}/{path}").status_code for path in ("livez", "readyz", "startupz")}
        codes = []
        for url in (server.url, server.grpc_target):
            with Client(url, max_retries=0) as client, pytest.raises(TrilithonError) as caught:
                client.generate("a", max_tokens=1)
            codes.append((caught.value.code, caught.value.retry_after_s is not None))
        seen: list[int] = []
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=120)
            for answer in watch:
                seen.append(answer.status)
                if answer.status == SERVING:
                    break
            watch.cancel()
        server.wait_ready()

        assert status == {"livez": 200, "readyz": 503, "startupz": 503}
        assert codes == [("loading", True)] * 2
        assert seen == [health_pb2.HealthCheckResponse.NOT_SERVING, SERVING]
        assert httpx.get(f"{server.url}/startupz").status_code == 200


def test_R3_a_long_prefill_is_not_called_dead(tmp_path: Path, sockets: Path) -> None:
    """
    A prompt whose one step takes seconds: readiness stays on, health answers in time, and no rank is called lost.

    Inverse seen: with OVERDUE judged by the time since the last beat (0.5 s) the rank is killed in the middle.
    """
    wide = tiny_llama(tmp_path / "wide", layers=16, hidden=256, heads=8, groups=8, ffn=1024, context=4096)
    flags = ("--max-batch-tokens", "3072", *FLAGS, "--set", "engines.0.kv_cache_bytes=64MiB")
    with serving(wide, *flags, env={"XDG_RUNTIME_DIR": str(sockets)}) as server:
        took: list[float] = []

        def ask() -> None:
            began = time.monotonic()
            with Client(server.url, max_retries=0, timeout=120) as client:
                client.generate([5] * 3000, max_tokens=1)
            took.append(time.monotonic() - began)

        thread = threading.Thread(target=ask)
        thread.start()
        answers, slowest_s = set(), 0.0
        while thread.is_alive():
            began = time.monotonic()
            answers.add(readiness(server))
            slowest_s = max(slowest_s, time.monotonic() - began)
            thread.join(0.05)

        assert answers == {200}
        assert took[0] > 1.0, "the step was too short to prove anything"
        assert slowest_s < 1.0
        assert '"rank_lost"' not in server.output()


def test_R3_readiness_goes_off_when_a_rank_hangs_without_any_work(tiny_dir: Path, sockets: Path) -> None:
    """An idle rank that is stopped cannot answer the next request: the server says so before one comes."""
    with serving(tiny_dir, "--tp", "2", *FLAGS, env={"XDG_RUNTIME_DIR": str(sockets)}) as server:
        Processes(server).rank(1).send_signal(signal.SIGSTOP)

        wait_until(lambda: readiness(server) == 503, seconds=4.0)
        assert httpx.get(f"{server.url}/livez").status_code == 200
        server.wait_ready()


def test_R4_a_full_queue_is_refused_with_a_time_to_retry(tiny_dir: Path, sockets: Path) -> None:
    """
    One sequence a step and a queue of one: of two requests one runs and one waits, and every further one is refused
    at once, with a time from 1 to 30 s. HTTP says 429 with Retry-After, gRPC RESOURCE_EXHAUSTED with RetryInfo. What
    was taken finishes, and then there is room again.

    Inverse seen: with `limits.max_queue_requests` at its default nothing is refused.
    """
    flags = ("--set", "engines.0.max_batch_sequences=1", "--set", "limits.max_queue_requests=1", *FLAGS)
    with serving(tiny_dir, *flags, env={"XDG_RUNTIME_DIR": str(sockets)}) as server:
        with Load(server, max_tokens=7000, plain=0, running=1) as load:
            refused: list[Overloaded] = []
            for url in (server.url, server.grpc_target):
                began = time.monotonic()
                with Client(url, max_retries=0, timeout=60) as client, pytest.raises(Overloaded) as caught:
                    client.generate("a", max_tokens=1)
                assert time.monotonic() - began < 2.0
                refused.append(caught.value)
            answer = httpx.post(f"{server.url}/v1/completions", json={"model": server.model, "prompt": "a"})
            status, details = _grpc_refusal(server)
            load.wait(seconds=120)
        with Client(server.url, max_retries=0, timeout=60) as client:
            client.generate("a", max_tokens=1)

        assert {"max_tokens"} == {outcome.ended for outcome in load.outcomes}
        assert {"queue_full"} == {error.code for error in refused}
        assert all(1 <= (error.retry_after_s or 0) <= 30 for error in refused)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in details)


def _grpc_refusal(server: Server) -> tuple[grpc.StatusCode, list[Any]]:
    """Status and details of one refused call, as any gRPC client sees them."""
    request = generation_pb2.GenerateRequest()
    request.prompt.text = "a"
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(request, timeout=10)
    call: Any = caught.value  # it is a grpc.Call too, which the stubs do not say
    return call.code(), list(rpc_status.from_call(call).details)
