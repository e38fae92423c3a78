"""
The lightest HTTP/1.1 client that can time a stream: it shares its cores with the server that it measures.

While a request runs, received bytes are kept with their time and nothing else is done to them; headers, chunks, events
and JSON are read when the pass is over.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

_CHUNKED_END = b"\r\n0\r\n\r\n"


@dataclass(slots=True)
class Exchange:
    """One request and what came back: pieces as received, each with its time. Seconds of `perf_counter`."""

    sent_s: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    error: str = ""

    @property
    def ended_s(self) -> float:
        """When the last byte came."""
        return self.pieces[-1][0] if self.pieces else self.sent_s


class Connection(asyncio.Protocol):
    """One connection, used for one exchange at a time and kept for the next."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[None] | None = None
        self._tail = b""
        self._head = b""
        self._in_body = False
        self._left: int | None = None  # body bytes still to come, with a content-length

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by the loop: note the time, keep the bytes, see whether they were the last."""
        exchange = self._exchange
        if exchange is None:
            return
        exchange.pieces.append((perf_counter(), data))
        if not self._in_body:
            data = self._read_head(data)
        if self._in_body:
            if self._left is not None:
                self._left -= len(data)
                ended = self._left <= 0
            else:
                self._tail = (self._tail + data)[-len(_CHUNKED_END) :]
                ended = self._tail == _CHUNKED_END
            if ended:
                self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the loop."""
        self._transport = None
        if self._exchange is not None and not self._exchange.error:
            self._exchange.error = f"connection lost: {error or 'closed by the server'}"
        self._finish()

    @property
    def usable(self) -> bool:
        """Whether another exchange can go over it."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, timeout_s: float) -> Exchange:
        """Send a whole request and wait for the whole answer."""
        assert self._transport is not None
        self._in_body, self._head, self._tail, self._left = False, b"", b"", None
        self._done = asyncio.get_running_loop().create_future()
        self._exchange = exchange = Exchange(perf_counter())
        self._transport.write(request)
        try:
            await asyncio.wait_for(self._done, timeout_s)
        except TimeoutError:
            exchange.error = f"no end within {timeout_s:g} s"
            self.close()
        self._exchange = None
        return exchange

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def _read_head(self, data: bytes) -> bytes:
        """Look for the end of the headers; returns the part of the data that belongs to the body."""
        self._head += data
        head, blank, rest = self._head.partition(b"\r\n\r\n")
        if not blank:
            return b""
        self._in_body = True
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.strip().lower() == b"content-length":
                self._left = int(value)
        # The blank line before the first chunk also begins the end of an empty chunked body.
        self._tail = b"\r\n"
        return rest

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and the headers that they carry."""

    host: str
    port: int
    path: str
    headers: Mapping[str, str]
    tls: ssl.SSLContext | None = None

    async def connect(self) -> Connection:
        """A new connection."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self.host, self.port, ssl=self.tls)
        return connection

    def request(self, body: bytes) -> bytes:
        """The bytes of one POST."""
        fields = {"host": f"{self.host}:{self.port}", "content-type": "application/json", **self.headers}
        lines = [f"POST {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One exchange, read: times in seconds of `perf_counter`, counts in tokens."""

    sent_s: float
    ended_s: float
    token_times_s: tuple[float, ...] = ()  # of each event that brought text
    text: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cached_tokens: int = 0
    fingerprint: str = ""
    error: str = ""


def read(exchange: Exchange) -> Answer:
    """Read what was kept: status, events with their times, usage."""
    bare = Answer(sent_s=exchange.sent_s, ended_s=exchange.ended_s)
    if exchange.error:
        return replace(bare, error=exchange.error)
    raw = b"".join(piece for _, piece in exchange.pieces)
    head, _, _ = raw.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1].decode("ascii", "replace") if head.count(b" ") >= 2 else "no status"
    if status != "200":
        return replace(bare, error=f"HTTP {status}: {raw[len(head) + 4 :][:200].decode('utf-8', 'replace')}")
    token_times: list[float] = []
    texts: list[str] = []
    usage: Mapping[str, Any] = {}
    fingerprint = ""
    try:
        for at_s, data in _events(exchange, raw, len(head) + 4, chunked=b"chunked" in head.lower()):
            if data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                return replace(bare, error=f"error event: {event['error']}"[:300])
            fingerprint = event.get("system_fingerprint") or fingerprint
            usage = event.get("usage") or usage
            text = "".join(choice.get("text") or "" for choice in event.get("choices") or ())
            if text:
                token_times.append(at_s)
                texts.append(text)
    except (ValueError, AttributeError, TypeError) as error:
        return replace(bare, error=f"answer not understood: {error}")
    details = usage.get("prompt_tokens_details") or {}
    return replace(
        bare,
        token_times_s=tuple(token_times),
        text="".join(texts),
        prompt_tokens=usage.get("prompt_tokens") or 0,
        answer_tokens=usage.get("completion_tokens") or len(token_times),
        cached_tokens=details.get("cached_tokens") or 0,
        fingerprint=fingerprint,
        error="" if token_times else "an answer without text",
    )


def _events(exchange: Exchange, raw: bytes, start: int, *, chunked: bool) -> Iterator[tuple[float, bytes]]:
    """Each `data:` line's value with the time at which its last byte came."""
    ends = []  # offset in raw at which each piece ends
    offset = 0
    for _, piece in exchange.pieces:
        offset += len(piece)
        ends.append(offset)
    body, offsets = _dechunk(raw, start) if chunked else (raw[start:], [(0, start)])
    position = 0
    while (newline := body.find(b"\n", position)) >= 0:
        line = body[position:newline].rstrip(b"\r")
        if line.startswith(b"data:"):
            # Where this line ends in the bytes as received, and hence when.
            index = bisect_left(offsets, (newline + 1, -1)) - 1
            received_at = offsets[index][1] + newline - offsets[index][0]
            yield exchange.pieces[bisect_left(ends, received_at + 1)][0], line[5:].strip()
        position = newline + 1


def _dechunk(raw: bytes, start: int) -> tuple[bytes, list[tuple[int, int]]]:
    """The body without chunk framing, and (offset in body, offset in raw) of each chunk."""
    parts: list[bytes] = []
    offsets: list[tuple[int, int]] = []
    done = 0
    while True:
        line_end = raw.index(b"\r\n", start)
        size = int(raw[start:line_end].partition(b";")[0], 16)
        begin = line_end + 2
        if size == 0:
            return b"".join(parts), offsets or [(0, begin)]
        parts.append(raw[begin : begin + size])
        offsets.append((done, begin))
        done += size
        start = begin + size + 2
