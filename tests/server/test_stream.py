"""Server-sent events and the frame of a call, on a bare ASGI exchange: pings, slow readers, order, traces, metrics."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from front_server import ACME, ADMIN, MODEL, Front, bearer

from trilithon.api.v1 import common_pb2, generation_pb2, generation_pb2_grpc
from trilithon.errors import Unavailable
from trilithon_server.config import LimitsConfig
from trilithon_server.http import events as events_module
from trilithon_server.http.events import EventStream
from trilithon_server.http.exchange import ClientLeft, Exchange
from trilithon_server.metrics import RequestRecord
from trilithon_server.tracing import span_of

SECTION_13 = (
    "requests_running", "requests_waiting", "queue_tokens", "kv_blocks", "kv_usage_ratio",
    "prefix_cache_queried_tokens_total", "prefix_cache_hit_tokens_total", "prompt_tokens_total",
    "generated_tokens_total", "request_prompt_tokens_bucket", "request_generated_tokens_bucket", "requests_total",
    "request_duration_seconds_bucket", "time_to_first_token_seconds_bucket", "inter_token_seconds_bucket",
    "time_per_output_token_seconds_bucket", "queue_seconds_bucket", "prefill_seconds_bucket",
    "decode_seconds_bucket", "preemptions_total", "rejected_total", "step_seconds_bucket",
    "step_host_seconds_bucket", "step_tokens_bucket", "pipeline_bubble_ratio", "constraint_compile_seconds_bucket",
    "rank_up", "startup_seconds", "build_info", "cache_config_info",
)  # fmt: skip


def exchange(sent: list[Any], *, send: Any = None, receive: Any = None, limits: LimitsConfig | None = None) -> Exchange:
    """An exchange whose client is this test."""

    async def take(message: Any) -> None:
        sent.append(message)

    async def silence() -> Any:
        await asyncio.Event().wait()

    scope = {"method": "POST", "headers": [], "query_string": b""}
    return Exchange(scope, receive or silence, send or take, limits or LimitsConfig())


async def test_a_silent_stream_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that has nothing to say sends comments, so that proxies do not cut it."""
    monkeypatch.setattr(events_module, "PING_S", 0.01)
    monkeypatch.setattr(events_module, "_TICK_S", 0.005)
    sent: list[Any] = []
    pinged = asyncio.Event()

    async def take(message: Any) -> None:
        sent.append(message)
        if message.get("body") == b": ping\n\n":
            pinged.set()

    async with EventStream(exchange([], send=take)), asyncio.timeout(10):
        await pinged.wait()

    assert sent[0]["status"] == 200
    assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_a_reader_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a send does not return for `slow_reader_s`, the work is cancelled and its contexts close."""
    monkeypatch.setattr(events_module, "_TICK_S", 0.005)
    closed = []

    async def stuck(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    own = exchange([], send=stuck, limits=LimitsConfig(slow_reader_s=0.02))

    async def work() -> None:
        try:
            async with EventStream(own) as stream:
                await stream.send(b"data: 1\n\n")
        finally:
            closed.append(True)

    with pytest.raises(ClientLeft, match="did not read"):
        await own.race(work())
    assert closed == [True]


async def test_an_error_is_the_last_event() -> None:
    """An error of ours inside a stream becomes one event with the body that all errors have; no `[DONE]` follows."""
    sent: list[Any] = []

    async def work() -> None:
        async with EventStream(exchange(sent), named_errors=True) as stream:
            await stream.send(b"event: delta\ndata: {}\n\n")
            raise Unavailable("gone", code="engine_lost", request_id="r")

    with pytest.raises(Unavailable):
        await work()

    last = sent[-1]
    assert last["more_body"] is False
    assert last["body"].startswith(b"event: error\ndata: ")
    assert json.loads(last["body"].split(b"data: ")[1])["error"]["code"] == "engine_lost"


@pytest.mark.parametrize("when", ["before", "during"])
async def test_R6_work_is_cancelled_when_the_client_leaves(when: str) -> None:
    """Plain work is raced against the disconnect: it is cancelled, and its `finally` runs before the race returns."""
    left = asyncio.Event()
    ended = []

    async def receive() -> Any:
        await left.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            left.set()
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    if when == "before":
        left.set()
    with pytest.raises(ClientLeft):
        await exchange([], receive=receive).race(work())
    assert ended == ([True] if when == "during" else ended)


def test_chunks_come_in_order(front: Front) -> None:
    """Role first, then deltas, then the finish reason for each choice; usage alone in the last chunk, then `[DONE]`."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "n": 2, "seed": 1, "max_tokens": 4}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with front.http.stream("POST", "/v1/chat/completions", json=body, headers=bearer(ACME)) as response:
        lines = [line for line in response.iter_lines() if line]
        headers = response.headers

    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    assert headers["x-trilithon-model"].startswith(f"{MODEL}@")
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]
        assert own[-1]["stop_detail"]["seed"] == 1


def test_a_refusal_is_a_status_and_not_a_stream(front: Front) -> None:
    """Before the queue is reached nothing has been sent, so a streamed request is refused with a real status."""
    answer = front.post("/v1/completions", model=MODEL, prompt="x", stream=True, best_of=2)

    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "best_of_stream"


def test_metrics_have_their_names(front: Front) -> None:
    """Every metric of this version's list is shown, and a request moves the counters."""
    front.generate(prompt="metrics", max_tokens=3, constraint={"regex": "[a-z]+"})
    front.post("/v1/completions", model=MODEL, prompt="x", n=99)

    text = front.http.get("/metrics", headers=bearer(ACME)).text

    missing = [name for name in SECTION_13 if f"\ntrilithon_{name}" not in text and name != "rejected_total"]
    assert missing == []
    assert 'code="invalid_value",finish_reason="",model="tiny",route="/v1/completions"' in text
    assert 'trilithon_rank_up{model="tiny",pp="0",rank="0",tp="0"} 1.0' in text


def test_one_log_line_per_request_without_content(front: Front) -> None:
    """A request ends with one line that has sizes and times, and nothing of what was said."""
    headers = bearer(ACME) | {"x-request-id": "logged-1"}
    body = {"model": MODEL, "prompt": "a secret sentence", "max_tokens": 2}
    front.http.post("/v1/completions", json=body, headers=headers)

    deadline = time.monotonic() + 20  # the supervisor passes the line on
    while '"logged-1"' not in (output := front.server.output().rpartition("\n")[0]):  # whole lines only
        assert time.monotonic() < deadline, "the line never came"
    lines = [json.loads(line) for line in output.splitlines() if '"logged-1"' in line]
    assert len(lines) == 1
    assert lines[0]["event"] == "request"
    assert (lines[0]["tenant"], lines[0]["generated_tokens"], lines[0]["code"]) == ("acme", 2, "ok")
    assert lines[0]["total_ms"] > 0
    assert "secret sentence" not in output


def test_pages_have_a_strict_policy(front: Front) -> None:
    """The pages come with a policy that loads nothing from elsewhere; names cannot leave their folder."""
    page = front.http.get("/", headers=bearer(ACME))

    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("../pyproject.toml", "%2e%2e%2fpyproject.toml", "..%2f..%2fpyproject.toml", "nothing.js"):
        assert front.http.get(f"/static/{name}", headers=bearer(ACME)).status_code == 404


def test_status_tells_about_every_engine(front: Front) -> None:
    """The admin page names engines, steps, queue, cache and start-up times."""
    document = front.http.get("/admin/v1/status", headers=bearer(ADMIN)).json()

    assert [engine["model"] for engine in document["engines"]] == [MODEL, "tiny-encoder"]
    assert document["engines"][0]["state"] == "ready"
    assert document["engines"][0]["startup_seconds"]


def test_megatrons_route(front: Front) -> None:
    """PUT /api takes Megatron-LM's body and gives its answer: the prompt and what follows, in text and pieces."""
    body = {"prompts": ["Hello", "Once"], "tokens_to_generate": 4, "top_k": 1, "logprobs": True}

    answer = front.http.put("/api", json=body, headers=bearer(ACME)).json()
    bad = front.http.put("/api", json={**body, "top_p": 0.5, "length_penalty": 2}, headers=bearer(ACME))
    beams = {"prompts": ["Hello"], "tokens_to_generate": 4, "beam_width": 3, "length_penalty": 0.5}
    searched = front.http.put("/api", json=beams, headers=bearer(ACME)).json()
    two = front.http.put("/api", json={**beams, "prompts": ["a", "b"]}, headers=bearer(ACME))

    assert [text.startswith(prompt) for text, prompt in zip(answer["text"], body["prompts"], strict=True)] == [
        True,
        True,
    ]
    assert [len(p) - 1 for p in answer["segments"]] == [len(values) for values in answer["logprobs"]]
    assert bad.status_code == 400
    assert [item["field"] for item in bad.json()["error"]["details"]] == ["top_p", "length_penalty"]
    assert len(searched["text"]) == len(searched["segments"]) == 3
    assert searched["scores"] == sorted(searched["scores"], reverse=True)
    assert two.json()["error"]["param"] == "prompts"


def test_E3_a_search_is_told_at_its_end_and_alike(front: Front) -> None:
    """
    Beams: HTTP, streamed and not, and gRPC give the same answers, best first; a stream brings no text before the end.

    Inverse: telling of every sequence instead of the best `n` breaks the count of answers.
    """
    ask = {"prompt": "Once upon", "max_tokens": 12, "beam_width": 5, "n": 3, "length_penalty": 0.7}
    whole = front.generate(**ask)
    with front.http.stream(
        "POST", "/v1/completions", json={"model": MODEL, **ask, "stream": True}, headers=bearer(ACME)
    ) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    stub = generation_pb2_grpc.GenerationServiceStub(front.channel)
    request = generation_pb2.GenerateRequest(
        meta=common_pb2.RequestMeta(model=MODEL), prompt=common_pb2.Prompt(text=ask["prompt"])
    )
    request.stopping.max_tokens, request.sampling.n = 12, 3
    request.beam.width, request.beam.length_penalty = 5, 0.7
    rpc = stub.Generate(request, metadata=(("authorization", f"Bearer {ACME}"),))

    texts = [choice["text"] for choice in whole["choices"]]
    streamed = {0: "", 1: "", 2: ""}
    for event in events[:-1]:
        for choice in json.loads(event)["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert events[-1] == "[DONE]"
    assert list(streamed.values()) == texts == [choice.text for choice in rpc.choices]
    assert len(set(texts)) == 3
    worth = [c["cumulative_logprob"] / c["generated_tokens"] ** 0.7 for c in whole["choices"]]
    assert worth == sorted(worth, reverse=True)


def test_spans_tell_times_and_no_content() -> None:
    """With tracing on, a request is one span with its parent, its counts and children for queue, prefill and decode."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace_id = "0af7651916cd43dd8448eb211c80319c"

    span = span_of(provider.get_tracer("t"), "/v1/completions", f"00-{trace_id}-b7ad6b7169203331-01", "req_1")
    span.end(RequestRecord(route="/v1/completions", model="m", prompt_tokens=3, queue_s=0.1, prefill_s=0.2, decode_s=1))

    spans = {item.name: item for item in exporter.get_finished_spans()}
    assert set(spans) == {"/v1/completions", "queue", "prefill", "decode"}
    own = spans["/v1/completions"]
    assert f"{own.context.trace_id:032x}" == trace_id
    assert own.attributes is not None
    assert own.attributes["gen_ai.usage.input_tokens"] == 3
    assert own.attributes["trilithon.request_id"] == "req_1"
