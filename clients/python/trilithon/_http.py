"""Operations over HTTP: JSON, and server-sent events for streams."""

from __future__ import annotations

import base64
import json
import ssl
import sys
from array import array
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode

import httpx

from trilithon._sse import SSEDecoder
from trilithon._transport import GENERATE, Attempt, AttemptFailed, Event, Fields, Operation, Settings
from trilithon._version import __version__
from trilithon._wire_errors import cut_off, from_event, from_http, not_understood, timed_out, unreachable
from trilithon.errors import InvalidArgument

_AGENT = f"trilithon-python/{__version__}"


class HttpTransport:
    """HTTP from threads; connections are kept and shared."""

    def __init__(self, settings: Settings, transport: httpx.BaseTransport | None = None) -> None:
        self._settings = settings
        verify = _verify(settings)
        if transport is None and settings.uds:
            transport = httpx.HTTPTransport(uds=settings.uds)
        self._client = httpx.Client(base_url=settings.target, verify=verify, transport=transport)

    def call(self, operation: Operation, fields: Fields, attempt: Attempt) -> Mapping[str, Any]:
        """One attempt; the answer, JSON-shaped."""
        deadline = monotonic() + attempt.timeout_s
        with _mapped(self._settings, attempt):
            response = self._send(operation, fields, attempt, stream=False)
            try:
                pieces = []
                for piece in response.iter_bytes():
                    pieces.append(piece)
                    if monotonic() > deadline:
                        raise timed_out(attempt.timeout_s)
            finally:
                response.close()
        return answer(operation, response.status_code, response.headers, b"".join(pieces))

    def stream(self, fields: Fields, attempt: Attempt, operation: Operation = GENERATE) -> HttpEvents:
        """One attempt at a stream."""
        deadline = monotonic() + attempt.timeout_s
        with _mapped(self._settings, attempt):
            response = self._send(operation, fields, attempt, stream=True)
            if not _is_stream(response, operation):
                try:
                    body = response.read()
                finally:
                    response.close()
                raise refused_stream(response, body)
        return HttpEvents(response, self._settings, attempt, deadline, operation)

    def upload(self, operation: Operation, fields: Fields, stream: BinaryIO, attempt: Attempt) -> Mapping[str, Any]:
        """One attempt at an upload, a multipart form that is read as it is sent."""
        with _mapped(self._settings, attempt):
            response = self._client.send(_form(self._client, self._settings, operation, fields, stream, attempt))
        return answer(operation, response.status_code, response.headers, response.content)

    def close(self) -> None:
        """Let go of all connections."""
        self._client.close()

    def _send(self, operation: Operation, fields: Fields, attempt: Attempt, *, stream: bool) -> httpx.Response:
        request = _request(self._client, self._settings, operation, fields, attempt, stream=stream)
        sent_at = monotonic()
        response = self._client.send(request, stream=True)
        # httpx limits each read; what the headers took is no longer there for the body.
        request.extensions["timeout"]["read"] = _read_limit_s(operation, attempt, monotonic() - sent_at)
        return response


class HttpEvents:
    """Events of one response; closing it closes the connection, which ends the request."""

    def __init__(
        self, response: httpx.Response, settings: Settings, attempt: Attempt, deadline: float, operation: Operation
    ) -> None:
        self._response = response
        self._operation = operation
        self._settings = settings
        self._attempt = attempt
        self._deadline = deadline

    def __iter__(self) -> Iterator[Event]:
        decoder = SSEDecoder()
        with _mapped(self._settings, self._attempt):
            for received in self._response.iter_bytes():
                yield from events(decoder, received, self._operation)
                if monotonic() > self._deadline:
                    raise timed_out(self._attempt.timeout_s)

    def close(self) -> None:
        """End the request."""
        self._response.close()


class AsyncHttpTransport:
    """HTTP from an event loop; connections are kept and shared."""

    def __init__(self, settings: Settings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._settings = settings
        verify = _verify(settings)
        if transport is None and settings.uds:
            transport = httpx.AsyncHTTPTransport(uds=settings.uds)
        self._client = httpx.AsyncClient(base_url=settings.target, verify=verify, transport=transport)

    async def call(self, operation: Operation, fields: Fields, attempt: Attempt) -> Mapping[str, Any]:
        """One attempt; the answer, JSON-shaped."""
        deadline = monotonic() + attempt.timeout_s
        with _mapped(self._settings, attempt):
            response = await self._send(operation, fields, attempt, stream=False)
            try:
                pieces = []
                async for piece in response.aiter_bytes():
                    pieces.append(piece)
                    if monotonic() > deadline:
                        raise timed_out(attempt.timeout_s)
            finally:
                await response.aclose()
        return answer(operation, response.status_code, response.headers, b"".join(pieces))

    async def stream(self, fields: Fields, attempt: Attempt, operation: Operation = GENERATE) -> AsyncHttpEvents:
        """One attempt at a stream."""
        deadline = monotonic() + attempt.timeout_s
        with _mapped(self._settings, attempt):
            response = await self._send(operation, fields, attempt, stream=True)
            if not _is_stream(response, operation):
                try:
                    body = await response.aread()
                finally:
                    await response.aclose()
                raise refused_stream(response, body)
        return AsyncHttpEvents(response, self._settings, attempt, deadline, operation)

    async def upload(
        self, operation: Operation, fields: Fields, stream: BinaryIO, attempt: Attempt
    ) -> Mapping[str, Any]:
        """One attempt at an upload, a multipart form that is read as it is sent."""
        with _mapped(self._settings, attempt):
            response = await self._client.send(_form(self._client, self._settings, operation, fields, stream, attempt))
        return answer(operation, response.status_code, response.headers, response.content)

    async def aclose(self) -> None:
        """Let go of all connections."""
        await self._client.aclose()

    async def _send(self, operation: Operation, fields: Fields, attempt: Attempt, *, stream: bool) -> httpx.Response:
        request = _request(self._client, self._settings, operation, fields, attempt, stream=stream)
        sent_at = monotonic()
        response = await self._client.send(request, stream=True)
        request.extensions["timeout"]["read"] = _read_limit_s(operation, attempt, monotonic() - sent_at)
        return response


class AsyncHttpEvents:
    """Events of one response; closing it closes the connection, which ends the request."""

    def __init__(
        self, response: httpx.Response, settings: Settings, attempt: Attempt, deadline: float, operation: Operation
    ) -> None:
        self._response = response
        self._operation = operation
        self._settings = settings
        self._attempt = attempt
        self._deadline = deadline

    async def __aiter__(self) -> AsyncIterator[Event]:
        decoder = SSEDecoder()
        with _mapped(self._settings, self._attempt):
            async for received in self._response.aiter_bytes():
                for event in events(decoder, received, self._operation):
                    yield event
                if monotonic() > self._deadline:
                    raise timed_out(self._attempt.timeout_s)

    async def aclose(self) -> None:
        """End the request."""
        await self._response.aclose()


# What both share: requests out, answers in, without a socket ------------------------------------------------


def body(operation: Operation, fields: Fields, attempt: Attempt, *, stream: bool) -> Mapping[str, Any]:
    """The JSON body of an operation."""
    if operation.name == "embed":
        # Base64 of little-endian float32: a third of the size of decimal digits, and exact.
        rest = {name: value for name, value in fields.items() if name != "inputs"}
        return {"input": fields["inputs"], "encoding_format": "base64", **rest}
    content = dict(fields)
    if operation.takes_time_limit and attempt.tell_server:
        # HTTP has no deadline: the server's own limit ends the work a little earlier, so that the answer still arrives.
        left_ms = attempt.timeout_s * 1000
        limit_ms = max(1, int(left_ms - min(200.0, 0.1 * left_ms)))
        content["time_limit_ms"] = min(limit_ms, fields.get("time_limit_ms") or limit_ms)
    if stream:
        content["stream"] = True
    return content


def answer(operation: Operation, status: int, headers: Mapping[str, str], content: bytes) -> Mapping[str, Any]:
    """The answer's fields. Raises AttemptFailed when it is an error, or not JSON."""
    if operation.name == "health" and status in (200, 503):
        return {"ready": status == 200, **_json_object(content)}
    if not 200 <= status < 300:
        raise from_http(status, headers, content)
    if operation.text:
        return {"text": content.decode("utf-8", "replace")}
    parsed = _json_object(content)
    return _embeddings(parsed) if operation.name == "embed" else _read(operation, parsed)


def events(decoder: SSEDecoder, received: bytes, operation: Operation = GENERATE) -> list[Event]:
    """The events that these bytes complete. Raises AttemptFailed for an error event."""
    found: list[Event] = []
    if operation.raw:
        return [("", {"data": received})]
    for name, data in decoder.feed(received):
        if data == "[DONE]":
            continue
        try:
            fields = json.loads(data)
        except ValueError:
            raise not_understood("a JSON event", data) from None
        if not isinstance(fields, dict):
            raise not_understood("a JSON object in each event", data)
        if name == "error" or (not name and "error" in fields):
            raise from_event(fields)
        found.append((name, _read(operation, fields)))
    return found


def refused_stream(response: httpx.Response, content: bytes) -> AttemptFailed:
    """Why there is no stream in this response."""
    if 200 <= response.status_code < 300:
        return not_understood("text/event-stream", response.headers.get("content-type", ""))
    return from_http(response.status_code, response.headers, content)


def _read_limit_s(operation: Operation, attempt: Attempt, used_s: float) -> float:
    """How long one read may take."""
    return max(0.001, min(operation.silence_s, attempt.timeout_s - used_s))


def _is_stream(response: httpx.Response, operation: Operation) -> bool:
    kind = response.headers.get("content-type", "")
    return response.status_code == 200 and (operation.raw or kind.startswith("text/event-stream"))


def _request(
    client: httpx.Client | httpx.AsyncClient,
    settings: Settings,
    operation: Operation,
    fields: Fields,
    attempt: Attempt,
    *,
    stream: bool,
) -> httpx.Request:
    method, _, path = operation.http.partition(" ")
    names = [piece.partition("}")[0] for piece in path.split("{")[1:]]
    path = path.format_map({name: quote(str(fields[name]), safe="") for name in names})
    headers = {"user-agent": _AGENT, **settings.metadata(attempt)}
    headers |= {header: str(fields[name]) for name, header in operation.headers.items() if name in fields}
    content: bytes | None = None
    fields = {name: value for name, value in fields.items() if name not in (*names, *operation.headers)}
    fields = operation.write(fields) if operation.write is not None else fields
    if method in ("POST", "PUT"):
        headers["content-type"] = "application/json"
        try:
            content = json.dumps(body(operation, fields, attempt, stream=stream), allow_nan=False).encode()
        except ValueError:
            raise InvalidArgument("The request must not hold NaN or infinity.", code="invalid_value") from None
    elif fields:
        path = f"{path}?{urlencode(fields, doseq=True)}"
    return client.build_request(method, path, headers=headers, content=content, timeout=attempt.timeout_s)


def _form(
    client: httpx.Client | httpx.AsyncClient,
    settings: Settings,
    operation: Operation,
    fields: Fields,
    stream: BinaryIO,
    attempt: Attempt,
) -> httpx.Request:
    """A multipart form: the fields first, then the file."""
    method, _, path = operation.http.partition(" ")
    data = {name: str(value) for name, value in fields.items() if name != "filename"}
    headers = {"user-agent": _AGENT, **settings.metadata(attempt)}
    files = {"file": (str(fields["filename"]), stream)}
    return client.build_request(method, path, headers=headers, data=data, files=files, timeout=attempt.timeout_s)


def _read(operation: Operation, parsed: Mapping[str, Any]) -> Mapping[str, Any]:
    """The answer's fields from HTTP's shape of them."""
    if operation.read is None:
        return parsed
    try:
        return operation.read(parsed)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise not_understood(f"what {operation.name} answers", str(parsed)) from None


@contextmanager
def _mapped(settings: Settings, attempt: Attempt) -> Iterator[None]:
    """Turn the HTTP library's errors into ours."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise unreachable(settings.url, str(error) or type(error).__name__) from None
    except httpx.TimeoutException:
        raise timed_out(attempt.timeout_s) from None
    except httpx.DecodingError as error:
        raise not_understood("decodable", str(error)) from None
    except httpx.TransportError as error:
        raise cut_off(settings.url, str(error) or type(error).__name__) from None


def _verify(settings: Settings) -> ssl.SSLContext | bool:
    if not settings.tls or not (settings.tls_ca or settings.tls_cert):
        return True
    context = ssl.create_default_context(cafile=settings.tls_ca)
    if settings.tls_cert:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    return context


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError:
        raise not_understood("JSON", content) from None
    if not isinstance(parsed, dict):
        raise not_understood("a JSON object", content)
    return parsed


def _embeddings(parsed: Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenAI's shape to ours."""
    try:
        data = [
            {
                **{name: value for name, value in item.items() if name != "embedding"},
                "values": _floats(item["embedding"]),
            }
            for item in parsed["data"]
        ]
    except (KeyError, TypeError, ValueError):
        raise not_understood("a list of embeddings", str(parsed)) from None
    return {**parsed, "data": data}


def _floats(given: str | list[float]) -> list[float]:
    if isinstance(given, list):
        return given
    values = array("f", base64.b64decode(given, validate=True))
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()
