"""What goes wrong on the wire comes back as the right class, and is tried again when that can help."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from scripted import CHOICE, GENERATED, STARTED, Reply, grpc_server, http_server, refusal

import trilithon
from trilithon import AsyncClient, Client, errors
from trilithon._retry import Retries
from trilithon._transport import AttemptFailed
from trilithon.errors import SERVER_ERRORS, TrilithonError, Violation

CODES = {
    errors.InvalidArgument: "context_length_exceeded",
    errors.FailedPrecondition: "constraint_dead_end",
    errors.NotFound: "model_not_found",
    errors.Unavailable: "draining",
    errors.DeadlineExceeded: "queue_timeout",
}


CODES_OF: dict[type[TrilithonError], str] = {
    errors.InvalidArgument: "adapter_not_found document_not_text index_invalid invalid_json knowledge_invalid "
    "no_chat_template passages_invalid prompt_too_long search_invalid size_mismatch triples_invalid unsupported_model",
    errors.BodyTooLarge: "body_too_large headers_too_large metadata_too_large",
    errors.Unauthenticated: "invalid_api_key",
    errors.PermissionDenied: "admin_scope_required user_scope_required",
    errors.NotFound: "adapter_not_found file_not_found index_not_found job_not_found model_not_found story_not_found",
    errors.AlreadyExists: "name_taken",
    errors.FailedPrecondition: "adapter_load_failed adapters_unsupported base_mismatch concepts_missing "
    "constraint_dead_end files_missing format_unavailable index_building index_encoder index_unsupported index_version "
    "job_cancelling job_finished job_not_succeeded model_load_failed no_catalog not_servable result_gone store_full "
    "store_missing task_invalid task_tokenizer template_mismatch unsupported_model",
    errors.Conflict: "file_in_use idempotency_mismatch index_building index_version version_conflict",
    errors.RateLimited: "rate_limit_exceeded",
    errors.Overloaded: "hosting_full queue_full quota_exceeded too_many_checks too_many_connections too_many_streams",
    errors.Unavailable: "disk_full draining engine_lost index_closed loading server_shutting_down store_unavailable",
    errors.DeadlineExceeded: "body_timeout queue_timeout timeout",
    errors.Cancelled: "request_cancelled slow_reader",
    errors.Unimplemented: "method_not_allowed not_implemented",
    errors.DataLoss: "checkpoint_corrupt index_corrupt stored_corrupt",
    errors.Internal: "export_failed internal_error numerical_failure",
}
"""Class -> codes that servers raise it with; a code may be of several classes."""


def _example(kind: type[TrilithonError]) -> TrilithonError:
    details = [
        Violation(field="max_tokens", code="invalid_value", message="`max_tokens` must be from 1 to 8. Given: 9."),
        Violation(field="top_p", code="invalid_value", message="`top_p` must be at most 1. Given: 2."),
    ]
    return kind(
        "what, where, given.",
        code=CODES.get(kind),
        request_id="req_7",
        details=details if kind is errors.InvalidArgument else (),
    )


@pytest.mark.parametrize("kind", SERVER_ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_survives_http(kind: type[TrilithonError]) -> None:
    """The server's own mapping to HTTP, parsed back, is the same class, code, message and details."""
    sent = _example(kind)
    with (
        http_server(refusal(sent)) as server,
        Client(server.url, max_retries=0) as client,
        pytest.raises(TrilithonError) as caught,
    ):
        client.generate("Once")

    got = caught.value
    assert type(got) is kind
    assert (got.code, got.message, got.request_id, got.details) == (sent.code, sent.message, "req_7", sent.details)


@pytest.mark.parametrize("kind", SERVER_ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_survives_grpc(kind: type[TrilithonError]) -> None:
    """The server's own mapping to gRPC, parsed back, is the same class, code, message and details."""
    sent = _example(kind)
    with grpc_server() as server, Client(server.url, max_retries=0) as client:
        server.failures = [sent]
        with pytest.raises(TrilithonError) as caught:
            client.generate("Once")

    got = caught.value
    assert type(got) is kind
    assert (got.code, got.message, got.request_id) == (sent.code, sent.message, "req_7")
    assert [(item.field, item.code, item.message) for item in got.details] == [
        (item.field, item.code, item.message) for item in sent.details
    ]


@pytest.mark.parametrize("kind", SERVER_ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_survives_a_stream(kind: type[TrilithonError]) -> None:
    """An error event after text has come raises the same class, and the request is not tried again."""
    body = refusal(_example(kind)).body
    reply = Reply(events=[("started", STARTED), ("delta", CHOICE), ("error", body)])
    texts: list[str] = []
    with http_server(reply) as server, Client(server.url) as client, pytest.raises(TrilithonError) as caught:
        texts.extend(delta.text for delta in client.generate("Once", stream=True))

    assert type(caught.value) is kind
    assert texts == [CHOICE["text"]]
    assert len(server.asked) == 1


def test_table_of_codes_has_every_class() -> None:
    """A class that is new has codes to be held."""
    assert list(CODES_OF) == list(SERVER_ERRORS)


@pytest.mark.parametrize("kind", SERVER_ERRORS, ids=lambda kind: kind.__name__)
def test_E3_a_refusal_is_one_class_by_every_way(kind: type[TrilithonError]) -> None:
    """
    Whatever its code, known to the client or not, a refusal is the same class over HTTP, gRPC and in a stream.

    Seen to fail for each code that the client was not told of, with the status taken out of the body. A code of those
    who share RESOURCE_EXHAUSTED tells them apart, so theirs must be known.
    """
    is_shared = kind.grpc_status == "RESOURCE_EXHAUSTED"
    wrong = []
    for code in [*CODES_OF[kind].split(), *([] if is_shared else ["a_code_of_tomorrow"])]:
        sent = kind("what, where, given.", code=code)
        with http_server(refusal(sent), Reply(events=[("error", refusal(sent).body)])) as server:
            by_http = _caught(server.url, stream=False)
            by_event = _caught(server.url, stream=True)
        with grpc_server() as rpc:
            rpc.failures = [sent]
            by_grpc = _caught(rpc.url, stream=False)
        wrong += [(got, code) for got in (by_http, by_event, by_grpc) if got != (kind, code)]

    assert wrong == []


def _caught(url: str, *, stream: bool) -> tuple[type[TrilithonError], str]:
    with Client(url, max_retries=0) as client, pytest.raises(TrilithonError) as caught:
        list(client.generate("Once", stream=True)) if stream else client.generate("Once")
    return type(caught.value), caught.value.code


def test_errors_of_foreign_servers_have_a_class() -> None:
    """A body that names no status, or none that is known, is told by HTTP's status; in a stream by its type."""
    found = []
    for status, error in (
        (400, {"code": "model_load_failed"}),
        (404, {"status": "WEATHER"}),
        (429, {"code": "slow_down", "status": 429}),
        (500, {"type": "server_error"}),
    ):
        with http_server(Reply(status, {"error": {"message": "no", **error}})) as server:
            found.append(_caught(server.url, stream=False)[0])
    with http_server(Reply(events=[("error", {"error": {"message": "no", "type": "rate_limit_error"}})])) as server:
        found.append(_caught(server.url, stream=True)[0])

    assert found == [
        errors.InvalidArgument,
        errors.NotFound,
        errors.RateLimited,
        errors.Internal,
        errors.RateLimited,
    ]


def _wait(seconds: float) -> TrilithonError:
    return errors.Overloaded("the queue is full.", retry_after_s=seconds)


def test_refusals_are_retried_as_the_server_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 429 with `retry-after-ms` is tried again after that time, with the same request id."""
    waits: list[float] = []
    monkeypatch.setattr("trilithon._client.time.sleep", waits.append)
    with http_server(refusal(_wait(0.05)), Reply(body=GENERATED)) as server, Client(server.url) as client:
        answer = client.generate("Once")

    assert answer.request_id == "req_1"
    assert waits == [0.05]  # neither the client's own first delay nor the whole seconds of `retry-after`
    assert len({asked.headers["x-request-id"] for asked in server.asked}) == 1
    assert len(server.asked) == 2


async def test_retry_info_is_obeyed() -> None:
    """RetryInfo is gRPC's Retry-After, for both clients."""
    with grpc_server() as server:
        server.failures = [_wait(0.02), _wait(0.02)]
        with Client(server.url) as client:
            client.generate("Once")
        server.failures = [_wait(0.02)]
        async with AsyncClient(server.url) as twin:
            stream = await twin.generate("Once", stream=True)
            texts = [delta.text async for delta in stream]

    assert len(server.asked) == 5
    assert texts == [CHOICE["text"]]


@pytest.mark.parametrize(
    ("reply", "asked"),
    [
        pytest.param(Reply(429, {}, {"x-should-retry": "false", "retry-after-ms": "1"}), 1, id="told-not-to"),
        pytest.param(Reply(500, {}, {"x-should-retry": "true", "retry-after-ms": "1"}), 3, id="told-to"),
        pytest.param(Reply(503, {}, {"retry-after-ms": "1"}), 3, id="503"),
        pytest.param(Reply(502, b"<html>bad gateway</html>", {"retry-after-ms": "1"}), 3, id="proxy-502"),
        pytest.param(Reply(400, {}, {"retry-after-ms": "1"}), 1, id="400"),
        pytest.param(Reply(409, {}, {"retry-after-ms": "1"}), 1, id="409"),
        pytest.param(Reply(503, {}, {"retry-after": "600"}), 1, id="too-long-a-wait"),
    ],
)
def test_what_is_retried(reply: Reply, asked: int) -> None:
    """Two retries at most, of what may pass, and never against the server's word."""
    with http_server(reply) as server, Client(server.url) as client, pytest.raises(TrilithonError):
        client.tokenize(["a"])

    assert len(server.asked) == asked


def test_a_stream_refused_before_its_first_event_is_retried() -> None:
    """An engine lost before anything was streamed is another try's business."""
    lost = refusal(errors.Unavailable("the engine was lost.", code="engine_lost")).body
    whole = Reply(events=[("started", STARTED), ("delta", CHOICE), ("finished", {})])
    with http_server(Reply(events=[("error", lost)]), whole) as server, Client(server.url) as client:
        texts = [delta.text for delta in client.generate("Once", stream=True)]

    assert texts == [CHOICE["text"]]
    assert len(server.asked) == 2


def test_grpc_stream_error_after_text_is_not_retried() -> None:
    """Never after the first streamed message."""
    with grpc_server() as server, Client(server.url) as client:
        server.fail_after_first = errors.Unavailable("the engine was lost.", code="engine_lost", retry_after_s=0.01)
        with pytest.raises(errors.Unavailable) as caught:
            list(client.generate("Once", stream=True))

    assert caught.value.code == "engine_lost"
    assert len(server.asked) == 1


@pytest.mark.parametrize("cut", [True, False], ids=["connection-cut", "ended-early"])
def test_a_stream_without_its_end_is_an_error(cut: bool) -> None:
    """A text that stops short is never passed off as finished. Seen to fail with the check for `finished` taken out."""
    reply = Reply(events=[("started", STARTED), ("delta", CHOICE)], cut=cut)
    with http_server(reply) as server, Client(server.url) as client, pytest.raises(errors.ConnectionFailed) as caught:
        list(client.generate("Once", stream=True))

    assert caught.value.code == "connection_lost"
    assert len(server.asked) == 1


def test_a_connection_that_breaks_after_the_end_takes_nothing_away() -> None:
    """What was told to be finished is: a server that goes down may close before it has closed the stream in order."""
    reply = Reply(events=[("started", STARTED), ("delta", CHOICE), ("finished", {})], cut=True)
    with http_server(reply) as server, Client(server.url) as client:
        texts = [delta.text for delta in client.generate("Once", stream=True)]

    assert texts == [CHOICE["text"]]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_nothing_answers(scheme: str, free_port: Any) -> None:
    """A refused connection is `ConnectionFailed`, after the retries."""
    with (
        Client(f"{scheme}://127.0.0.1:{free_port()}", max_retries=0) as client,
        pytest.raises(errors.ConnectionFailed, match="Nothing answered at"),
    ):
        client.models.list()


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(Reply(body=b"<html>hello</html>"), id="not-json"),
        pytest.param(Reply(body=["a"]), id="not-an-object"),
        pytest.param(Reply(body={"choices": [{"text": 3}]}), id="wrong-type"),
        pytest.param(Reply(body={"usage": {"prompt_tokens": "many"}}), id="not-a-number"),
    ],
)
def test_nonsense_is_a_protocol_error(reply: Reply) -> None:
    """Bytes that are not the contract's are one typed error that shows what came."""
    with (
        http_server(reply) as server,
        Client(server.url) as client,
        pytest.raises(errors.ProtocolError, match="Given: "),
    ):
        client.generate("Once")


def test_another_program_on_the_grpc_port() -> None:
    """Speaking gRPC to an HTTP/1.1 server ends in `ConnectionFailed`, not in a hang."""
    with http_server(Reply(body={})) as server:
        client = Client(server.url.replace("http", "grpc"), timeout=5, max_retries=0)
        with client, pytest.raises(errors.ConnectionFailed):
            client.models.list()


def test_bare_statuses_are_mapped() -> None:
    """A status without our details (a proxy, the library itself) still has its class."""
    statuses = {
        grpc.StatusCode.NOT_FOUND: errors.NotFound,
        grpc.StatusCode.UNIMPLEMENTED: errors.Unimplemented,
        grpc.StatusCode.UNKNOWN: TrilithonError,
    }
    with grpc_server() as server, Client(server.url, max_retries=0) as client:
        found = []
        for status in statuses:
            server.failures = [(status, "said so")]
            with pytest.raises(TrilithonError, match="said so") as caught:
                client.models.list()
            found.append(type(caught.value))

    assert found == list(statuses.values())


async def test_timeouts_are_totals_and_reach_the_server() -> None:
    """A hanging stream ends with DeadlineExceeded; HTTP sends a time limit below the total, gRPC its deadline."""
    hanging = Reply(events=[("started", STARTED), ("delta", CHOICE)], hang=True)
    with http_server(hanging) as http, Client(http.url, timeout=0.4) as client, pytest.raises(errors.DeadlineExceeded):
        list(client.generate("Once", stream=True))
    with grpc_server() as rpc:
        rpc.hang = True
        async with AsyncClient(rpc.url) as twin:
            with pytest.raises(errors.DeadlineExceeded):
                async for _ in await twin.generate("Once", stream=True, timeout=0.4):
                    pass

    assert 300 <= http.asked[0].body["time_limit_ms"] <= 400
    left_s = rpc.asked[0][2]
    assert left_s is not None
    assert left_s <= 0.41  # gRPC rounds deadlines to milliseconds


def test_no_time_limit_is_sent_unasked() -> None:
    """The default total is the client's own business: a server with a lower cap must not refuse for it."""
    with http_server(Reply(body=GENERATED)) as server, Client(server.url) as client:
        client.generate("Once")
        client.generate("Once", time_limit_ms=50)

    assert "time_limit_ms" not in server.asked[0].body
    assert server.asked[1].body["time_limit_ms"] == 50


@pytest.mark.parametrize("how", ["close", "block", "dropped", "error"])
def test_leaving_a_stream_ends_the_request(how: str) -> None:
    """The server sees the client leave: by close(), by leaving the block, by dropping the stream, by an exception."""
    hanging = Reply(events=[("started", STARTED), ("delta", CHOICE)], hang=True)
    with http_server(hanging) as server, Client(server.url) as client:
        _leave(client, how)
        assert server.left.wait(5)
    with grpc_server() as rpc, Client(rpc.url) as client:
        rpc.hang = True
        _leave(client, how)
        assert rpc.left.wait(5)


def _leave(client: Client, how: str) -> None:
    stream = client.generate("Once", stream=True)
    assert next(stream).text
    if how == "close":
        stream.close()
        assert list(stream) == []
    elif how == "block":
        with stream:
            pass
    elif how == "error":
        with pytest.raises(RuntimeError), stream:
            raise RuntimeError
    else:
        del stream


def test_delays_grow_and_end() -> None:
    """Exponential from 0.5 s to 8 s with jitter, and never past the total."""
    now = [0.0]
    retries = Retries(request_id="r", timeout_s=100, max_retries=8, clock=lambda: now[0], jitter=lambda: 1.0)
    failed = AttemptFailed(errors.Unavailable("x"), retry=True)

    delays = [retries.delay_after(failed) for _ in range(6)]

    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    now[0] = 95.0
    with pytest.raises(errors.Unavailable):
        retries.delay_after(failed)
    now[0] = 101.0
    with pytest.raises(errors.DeadlineExceeded):
        retries.attempt()


def test_secrets_stay_out_of_repr_and_errors(free_port: Any) -> None:
    """The key is in the header and in no text that the client makes."""
    with http_server(Reply(401, {"error": {"message": "no", "code": "invalid_api_key"}})) as server:
        with Client(server.url, api_key="sk-secret") as client, pytest.raises(errors.Unauthenticated) as caught:
            client.generate("Once")
        shown = repr(client) + repr(client._settings) + str(caught.value) + repr(caught.value)

    assert server.asked[0].headers["authorization"] == "Bearer sk-secret"
    assert "secret" not in shown


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("127.0.0.1:8000", "must start with one of"),
        ("ftp://a", "must start with one of"),
        ("http://", "must name a host"),
        ("http://a:99999", "must have a port"),
        ("grpc://a:1/path", "must have no path"),
        ("http://u:p@a", "must not hold a user name"),
        ("http+unix://socket", "must name a socket"),
    ],
)
def test_wrong_addresses(url: str, rule: str) -> None:
    """A wrong address is refused at once, with the rule, and without its secrets."""
    with pytest.raises(errors.InvalidArgument, match=rule) as caught:
        Client(url)

    assert "u:p" not in str(caught.value)


def test_unknown_options_name_the_nearest() -> None:
    """A misspelt option is a TypeError before anything is sent."""
    with (
        http_server(Reply(body=GENERATED)) as server,
        Client(server.url) as client,
        pytest.raises(TypeError, match=r"'temprature'\. Did you mean 'temperature'\?"),
    ):
        client.generate("Once", temprature=1)  # type: ignore[call-overload]  # the mistake under test

    assert server.asked == []


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_values_that_cannot_be_sent(scheme: str) -> None:
    """NaN and values that fit no field are refused before anything is sent, on both protocols."""
    value = {"temperature": float("nan")} if scheme == "http" else {"seed": -1}
    with Client(f"{scheme}://127.0.0.1:1") as client, pytest.raises(trilithon.InvalidArgument):
        client.generate("Once", **value)  # type: ignore[call-overload]  # not a constant
