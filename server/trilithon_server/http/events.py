"""Server-sent events as the answer of an exchange."""

from __future__ import annotations

import asyncio
import json
import time
from types import TracebackType
from typing import Any

from trilithon_server.errors import as_error, error_body
from trilithon_server.http.exchange import Exchange

PING_S = 15.0
"""Silence after which a stream sends a comment, so that proxies keep it open."""

_TICK_S = 1.0


class EventStream:
    """
    Server-sent events as the answer of one exchange; an asynchronous context manager.

    Args:
        exchange: whose answer it is.
        named_errors: whether the error event has a name (routes of our own).

    Entering sends status and headers. An error of ours inside becomes one last `error` event; the stream then ends
    without `[DONE]`. Comments keep a silent stream alive, and a reader that takes nothing is cut off.
    """

    def __init__(self, exchange: Exchange, *, named_errors: bool = False) -> None:
        self._exchange = exchange
        self._send = exchange.send
        self._patience_s = exchange.limits.slow_reader_s
        self._last_s = 0.0
        self._sending_since_s: float | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None
        self._pings: set[asyncio.Task[None]] = set()
        self._named_errors = named_errors

    async def __aenter__(self) -> EventStream:
        self._exchange.started = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            *self._exchange.common_headers(),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self._task = asyncio.current_task()
        self._last_s = time.monotonic()
        self._ticker = asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        return self

    async def send(self, data: bytes) -> None:
        """Send whole events, each closed by its empty line."""
        self._sending_since_s = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._last_s = self._sending_since_s
        self._sending_since_s = None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        for ping in self._pings:
            ping.cancel()
        if error is None or isinstance(error, Exception):
            last = b"" if error is None else self._error_event(error)
            await self._send({"type": "http.response.body", "body": last, "more_body": False})

    def _error_event(self, error: BaseException) -> bytes:
        body = json.dumps(error_body(as_error(error, self._exchange.request_id))).encode()
        return (b"event: error\n" if self._named_errors else b"") + b"data: " + body + b"\n\n"

    def _tick(self) -> None:
        now = time.monotonic()
        if self._sending_since_s is not None:
            if now - self._sending_since_s > self._patience_s and self._task is not None:
                self._task.cancel("slow_reader")
        elif now - self._last_s > PING_S:
            self._last_s = now
            ping = asyncio.ensure_future(
                self._send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})
            )
            self._pings.add(ping)
            ping.add_done_callback(self._pings.discard)
        self._ticker = asyncio.get_running_loop().call_later(_TICK_S, self._tick)
