"""
One HTTP request and its answer, on bare ASGI: no response object stands between a handler and the socket, so what a
handler opened is closed when the client leaves, whether it was streaming or not (bar R6).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, MutableMapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

from trilithon.errors import BodyTooLarge, Cancelled, DeadlineExceeded, InvalidArgument, TrilithonError
from trilithon_server.config import LimitsConfig
from trilithon_server.errors import Header, Headers, http_error
from trilithon_server.http.strict_json import parse_object
from trilithon_server.served import request_id
from trilithon_server.validation import invalid, shown

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]

_JSON = b"application/json"
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_NO_BODY = ("GET", "DELETE", "HEAD", "OPTIONS")


class ClientLeft(Cancelled):
    """The connection is gone; nothing can be answered."""

    default_code = "client_left"


class UnsupportedMediaType(InvalidArgument):
    """The body is not JSON by its own word."""

    http_status = 415
    default_code = "unsupported_media_type"


class Exchange:
    """
    Args:
        scope, receive, send: of ASGI.
        limits: of the server.
    """

    def __init__(self, scope: Scope, receive: Any, send: Any, limits: LimitsConfig) -> None:
        self.method: str = scope["method"]
        self.app: Any = scope.get("app")
        """The application that the request came to."""
        self.path_params: Mapping[str, str] = scope.get("path_params", {})
        self.arrived_s = time.monotonic()
        self._receive = receive
        self.send = send
        self.limits = limits
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        self._query: bytes = scope.get("query_string", b"")
        self.request_id = request_id(self.header(b"x-request-id"))
        self.started = False
        """Whether status and headers are out."""
        self.extra_headers: Headers = []

    def header(self, name: bytes) -> str | None:
        """A request header by its small-letter name; the first one counts."""
        for key, value in self._headers:
            if key == name:
                return value.decode("latin-1")
        return None

    def query(self, allowed: Iterable[str]) -> dict[str, str]:
        """
        The query parameters.

        Raises:
            InvalidArgument: one that is unknown or given twice.
        """
        known = tuple(allowed)
        out: dict[str, str] = {}
        for name, value in parse_qsl(self._query.decode("latin-1"), keep_blank_values=True):
            if name not in known or name in out:
                rule = "is given twice" if name in out else "is not a query parameter here"
                raise invalid(shown(name)[1:-1], rule, given=value, code="unknown_parameter")
            out[name] = value
        return out

    def check_headers(self) -> None:
        """
        Raises:
            BodyTooLarge: too many or too large headers.
            InvalidArgument: a body where none belongs.
        """
        limits = self.limits
        size = sum(len(key) + len(value) for key, value in self._headers)
        if len(self._headers) > limits.max_headers or size > limits.max_header_bytes:
            raise BodyTooLarge(
                f"a request may have at most {limits.max_headers} headers and {limits.max_header_bytes} bytes of them. "
                f"Given: {len(self._headers)} headers, {size} bytes.",
                code="headers_too_large",
            )
        length = self.header(b"content-length")
        has_body = self.header(b"transfer-encoding") is not None or (length not in (None, "0"))
        if self.method in _NO_BODY and has_body:
            raise InvalidArgument(f"a {self.method} request must have no body. Remove it.", code="unexpected_body")

    async def pieces(self, most: int) -> AsyncIterator[bytes]:
        """
        The request body as it arrives, at most `most` bytes; refused by its length before it is read. Each piece has
        the time that a whole small body has.

        Raises:
            BodyTooLarge, DeadlineExceeded, ClientLeft.
        """
        length = self.header(b"content-length")
        if length is not None and length.isdigit() and int(length) > most:
            raise _too_large(most, int(length))
        size, more = 0, True
        while more:
            try:
                async with asyncio.timeout(self.limits.body_timeout_s):
                    message = await self._receive()
            except TimeoutError:
                limit = f"{self.limits.body_timeout_s:g} s"
                raise DeadlineExceeded(
                    f"a piece of the body must arrive within {limit}.", code="body_timeout"
                ) from None
            if message["type"] == "http.disconnect":
                raise ClientLeft("the client left while it sent its request.")
            piece = message.get("body", b"")
            size += len(piece)
            if size > most:
                raise _too_large(most, size)
            yield piece
            more = message.get("more_body", False)

    async def body(self) -> bytes:
        """
        The request body, within the size and time that it may take; refused by its length before it is read.

        Raises:
            BodyTooLarge, DeadlineExceeded, ClientLeft.
        """
        most = self.limits.max_body_bytes
        length = self.header(b"content-length")
        if length is not None and length.isdigit() and int(length) > most:
            raise _too_large(most, int(length))
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft("the client left while it sent its request.")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > most:
                        raise _too_large(most, size)
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the request body must arrive within {self.limits.body_timeout_s:g} s.", code="body_timeout"
            ) from None

    async def json(self) -> dict[str, Any]:
        """
        The body as a JSON object.

        Raises:
            UnsupportedMediaType, InvalidArgument: it is not JSON, not an object, or has a key twice.
        """
        media = (self.header(b"content-type") or "").partition(";")[0].strip().lower()
        if media != _JSON.decode():
            raise UnsupportedMediaType(
                f"the content-type header must be application/json. Given: {shown(media)}.",
                code="unsupported_media_type",
            )
        return parse_object(await self.body())

    async def race(self, work: Coroutine[Any, Any, None]) -> None:
        """
        Run `work` until it is done or the client leaves; then it is cancelled, and its contexts abort what they hold.

        Frameworks do not do this: plain handlers are never cancelled, and streams only when a send fails.

        Raises:
            ClientLeft: the connection is gone.
        """
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientLeft("the client left.")
            if task.cancelled():
                raise ClientLeft("the client did not read its stream.")
            await task
        finally:
            for pending in (task, watch):
                if not pending.done():
                    pending.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)

    async def _gone(self) -> None:
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return

    async def respond(self, status: int, body: bytes, *, media: bytes = _JSON, headers: Sequence[Header] = ()) -> None:
        """Send the whole answer."""
        self.started = True
        all_headers = [
            (b"content-type", media),
            (b"content-length", str(len(body)).encode()),
            *self.common_headers(),
            *headers,
        ]
        await self.send({"type": "http.response.start", "status": status, "headers": all_headers})
        content = b"" if self.method == "HEAD" else body
        await self.send({"type": "http.response.body", "body": content})

    async def respond_json(self, document: Any, *, status: int = 200) -> None:
        """Send a JSON document."""
        await self.respond(status, _ENCODER.encode(document).encode("utf-8", "replace"))

    async def fail(self, error: TrilithonError) -> None:
        """Answer with an error, unless the answer has already begun or nobody is there."""
        if self.started or isinstance(error, ClientLeft):
            return
        status, headers, body = http_error(error)
        await self.respond(status, body, headers=headers)

    def common_headers(self) -> Headers:
        """Headers of every answer: the request's id, the time taken, and what the handler added."""
        elapsed_ms = int(1000 * (time.monotonic() - self.arrived_s))
        return [
            (b"x-request-id", self.request_id.encode()),
            (b"openai-processing-ms", str(elapsed_ms).encode()),
            *self.extra_headers,
        ]


def json_beside(document: Any) -> bytes:
    """A large document for `respond`, made in a thread: piece by piece, since one call would hold up the loop, too."""
    return "".join(_ENCODER.iterencode(document)).encode("utf-8", "replace")


def _too_large(most: int, given: int) -> BodyTooLarge:
    return BodyTooLarge(f"a request body may have at most {most} bytes. Given: {given}. Send less.")
