"""What ends a request before its time: time limits, deadlines, aborts, clients that leave, a full queue."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Iterator

import grpc
import httpx
import pytest
from crashing import assert_blocks_are_free, crashing_client, poll, total_blocks
from front_server import ACME, ADMIN, CONTEXT, MODEL, OTHER, Front, bearer, fronted

from trilithon.api.v1 import common_pb2, generation_pb2, generation_pb2_grpc

LONG = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True}
ENDLESS = {**LONG, "max_tokens": CONTEXT - 100}  # seconds of work on the fastest machine: only for what is ended early
JSON = {"content-type": "application/json"}
METADATA = (("authorization", f"Bearer {ACME}"),)


def test_R7_time_limit_ends_with_what_is_there(front: Front) -> None:
    """A time limit ends generation with its own reason and the text so far, as OpenAI's `length`."""
    answer = front.generate(**ENDLESS, time_limit_ms=300)
    chat = front.post(
        "/v1/chat/completions", model=MODEL, messages=[{"role": "user", "content": "x"}], ignore_eos=True,
        max_tokens=ENDLESS["max_tokens"], time_limit_ms=300,
    ).json()  # fmt: skip

    choice = answer["choices"][0]
    assert choice["finish_reason"] == "time_limit"
    assert 0 < choice["generated_tokens"] < ENDLESS["max_tokens"]
    assert choice["text"]
    assert chat["choices"][0]["finish_reason"] == "length"
    assert chat["choices"][0]["stop_detail"]["reason"] == "time_limit"


def test_R7_grpc_deadline_still_brings_the_answer(front: Front) -> None:
    """The RPC deadline is a time limit: generation stops just before it, so the answer arrives."""
    stub = generation_pb2_grpc.GenerationServiceStub(front.channel)
    request = generation_pb2.GenerateRequest(
        meta=common_pb2.RequestMeta(model=MODEL), prompt=common_pb2.Prompt(text="Once")
    )
    request.stopping.max_tokens, request.stopping.ignore_eos = ENDLESS["max_tokens"], True

    answer = stub.Generate(request, metadata=METADATA, timeout=0.8)

    assert answer.choices[0].finish_reason == common_pb2.FINISH_REASON_TIME_LIMIT
    assert 0 < answer.choices[0].generated_tokens < ENDLESS["max_tokens"]


def test_R6_abort_by_id(front: Front) -> None:
    """DELETE ends a stream of the same key with one last error event; another tenant's key does not find it."""
    events: list[str] = []
    with front.http.stream(
        "POST", "/v1/generate", json={**ENDLESS, "stream": True}, headers={**bearer(ACME), "x-request-id": "abort-me"}
    ) as response:
        lines = response.iter_lines()
        next(lines)
        foreign = httpx.delete(f"{front.server.url}/v1/requests/abort-me", headers=bearer(OTHER)).json()
        own = httpx.delete(f"{front.server.url}/v1/requests/abort-me", headers=bearer(ACME)).json()
        events = [line for line in lines if line]

    assert foreign == {"was_running": False}
    assert own == {"was_running": True}
    assert events[-2] == "event: error"
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "request_cancelled"
    assert_blocks_are_free(front)


def test_R6_abort_of_a_plain_request(front: Front) -> None:
    """A request that is not streamed ends with 499 when it is aborted."""
    answers: list[httpx.Response] = []
    headers = {**bearer(ACME), "x-request-id": "abort-plain"}
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{front.server.url}/v1/generate", json=ENDLESS, headers=headers))
    )
    thread.start()
    poll(lambda: front.http.delete("/v1/requests/abort-plain", headers=bearer(ACME)).json()["was_running"], "not there")
    thread.join()

    assert answers[0].status_code == 499
    assert answers[0].json()["error"]["code"] == "request_cancelled"


@pytest.mark.parametrize("rounds", [1000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_R6_clients_that_leave_take_their_blocks_along(front: Front, rounds: int) -> None:
    """
    Streamed and plain, several prompts, n > 1, constrained: whenever the client vanishes, all blocks come back.

    Inverse check: without the race against `http.disconnect` plain requests run to their end and the wait times out.
    """
    front.generate(prompt="x", max_tokens=1)  # the first step brings the first statistics
    total = total_blocks(front)
    seeds = range(rounds)
    threads = [
        threading.Thread(target=lambda part=seeds[i::4]: [crashing_client(front, random.Random(s)) for s in part])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert_blocks_are_free(front)
    assert total_blocks(front) == total
    text = front.http.get("/metrics", headers=bearer(ACME)).text
    assert 'trilithon_aborts_total{cause="disconnect"' in text


def test_R6_a_left_plain_request_stops_at_once(front: Front) -> None:
    """A plain request whose client has gone is dropped within a step or two, not run to its end."""
    raw_body = json.dumps(ENDLESS | {"n": 2}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"authorization: Bearer {ACME}\r\ncontent-length: {len(raw_body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", front.server.http_port)) as connection:
        connection.sendall(head.encode() + raw_body)
        poll(lambda: front.engine()["running"] == 1, "the request never ran")
    left_s = time.monotonic()

    poll(lambda: "cause=\"disconnect\",model=\"tiny\",phase=\"decode\"" in
         front.http.get("/metrics", headers=bearer(ACME)).text, "no abort was counted")  # fmt: skip
    assert time.monotonic() - left_s < 5
    assert_blocks_are_free(front)


def test_R6_cancelled_rpcs_take_their_blocks_along(front: Front) -> None:
    """Cancelling an RPC, streamed or not, ends the work."""
    stub = generation_pb2_grpc.GenerationServiceStub(front.channel)
    request = generation_pb2.GenerateRequest(
        meta=common_pb2.RequestMeta(model=MODEL), prompt=common_pb2.Prompt(text="Once")
    )
    request.stopping.max_tokens, request.stopping.ignore_eos = ENDLESS["max_tokens"], True
    request.sampling.n = 2

    stream = stub.GenerateStream(request, metadata=METADATA)
    next(iter(stream))
    stream.cancel()
    plain = stub.Generate.future(request, metadata=METADATA)
    poll(lambda: front.engine()["running"] > 0, "the plain RPC never ran")
    plain.cancel()

    assert_blocks_are_free(front)
    with pytest.raises(grpc.FutureCancelledError):
        plain.result()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A server with room for one running sequence and two waiting requests, and small limits."""
    flags = ["engines.0.max_batch_sequences=1", "limits.max_queue_requests=2", "limits.max_requests_per_key=5"]
    flags += ["limits.max_body_bytes=20000", "limits.body_timeout_s=1"]
    with fronted(tmp_path_factory.mktemp("narrow"), *(x for flag in flags for x in ("--set", flag))) as running:
        yield running


def test_R4_a_full_queue_refuses_with_a_time_to_come_back(narrow: Front) -> None:
    """
    Beyond the bound requests are refused at once: 429 with Retry-After, RESOURCE_EXHAUSTED with RetryInfo.

    Inverse check: with `limits.max_queue_requests=200` nothing is refused and the test fails.
    """

    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=narrow.server.url, timeout=60) as client:
            keys = [ACME, OTHER, ADMIN] * 2
            posts = [client.post("/v1/completions", json=LONG, headers=bearer(key)) for key in keys]
            return await asyncio.gather(*posts)

    answers = asyncio.run(flood())

    refused = [answer for answer in answers if answer.status_code == 429]
    assert [answer.status_code for answer in answers].count(200) >= 2
    assert refused
    error = refused[0].json()["error"]
    assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
    assert 1 <= int(refused[0].headers["retry-after"]) <= 30
    assert refused[0].headers["x-should-retry"] == "true"


@pytest.mark.parametrize(
    ("limit", "code"), [({"queue_timeout_ms": 50}, "queue_timeout"), ({"time_limit_ms": 80}, "timeout")], ids=str
)
def test_R7_time_that_runs_out_in_the_queue_is_an_error(narrow: Front, limit: dict[str, int], code: str) -> None:
    """A request that never began has no answer to give: 504 with its reason, DEADLINE_EXCEEDED over gRPC."""
    hold = threading.Thread(target=lambda: narrow.post("/v1/generate", OTHER, **LONG))
    hold.start()
    poll(lambda: narrow.engine()["running"] == 1, "the engine is not busy")

    answer = narrow.post("/v1/generate", model=MODEL, prompt="x", max_tokens=1, **limit)

    hold.join()
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, code)


def test_S5_requests_in_flight_per_key_are_bounded(narrow: Front) -> None:
    """One key cannot hold more than its share, whatever the queue has room for; another key is not affected."""

    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=narrow.server.url, timeout=60) as client:
            posts = [client.post("/v1/completions", json=LONG, headers=bearer(ACME)) for _ in range(9)]
            return await asyncio.gather(*posts)

    answers = asyncio.run(flood())

    codes = [answer.json()["error"]["code"] for answer in answers if answer.status_code == 429]
    assert "rate_limit_exceeded" in codes


def test_S5_bodies_are_refused_by_their_length(narrow: Front) -> None:
    """A large body is refused by its announced length, or as soon as it has grown too large when none is announced."""
    announced = narrow.http.post("/v1/completions", content=b" " * 30000, headers=bearer(ACME) | JSON)
    chunked = narrow.http.post("/v1/completions", content=(b" " * 1000 for _ in range(30)), headers=bearer(ACME) | JSON)

    for answer in (announced, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


def test_S5_a_body_that_never_arrives_is_given_up(narrow: Front) -> None:
    """A client that announces a body and stays silent gets an answer after the time for bodies has passed."""
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"authorization: Bearer {ACME}\r\ncontent-length: 100\r\n\r\n{{"
    with socket.create_connection(("127.0.0.1", narrow.server.http_port), timeout=20) as connection:
        connection.sendall(head.encode())
        answer = b""
        while b"}}" not in answer:
            answer += connection.recv(65536)

    assert b" 504 " in answer.split(b"\r\n", 1)[0]
    assert b"body_timeout" in answer
