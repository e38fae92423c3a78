"""
One request's answers on their way from the engine to the service.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from trilithon.errors import Cancelled, TrilithonError
from trilithon_server.config import LimitsConfig
from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.engine.request import answers_told

SendAbort = Callable[[int, int, str], None]
"""Sends an abort: handle, sequence index or -1 for all, cause."""


class EngineStream:
    """
    One request's answers: an async iterator of `wire.SequenceDelta`, for one consumer.

    It ends after every sequence has finished; it raises `Unavailable` (`engine_lost`) when the engine dies and
    `Cancelled` (`slow_reader`) when nobody read for `limits.slow_reader_s`. Cancelling a waiting consumer loses no
    delta. Beyond `limits.max_stream_events` or `max_stream_bytes` unread, new deltas are merged into the last one of
    their sequence, so the engine never waits for a reader.
    """

    def __init__(self, submit: wire.Submit, *, limits: LimitsConfig, send_abort: SendAbort) -> None:
        self.handle = submit.handle
        self.request_id = submit.request_id
        self.prompt_tokens = len(submit.prompt) + len(submit.source_tokens)
        self.adapter_digest = submit.adapter.digest
        self.streamed = False
        """Set by the service once part of the answer has left for the client: then a retry is not advised."""
        self._send_abort = send_abort
        self._limits = limits
        self._open = set(range(answers_told(submit)))
        self.queued = True
        """Whether the engine has not started on it yet."""
        self._aborted = False
        self._buffer: deque[wire.SequenceDelta] = deque()
        self._buffered_bytes = 0
        self._unread_since = 0.0
        self._error: TrilithonError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> EngineStream:
        return self

    async def __anext__(self) -> wire.SequenceDelta:
        while not self._buffer:
            if self._error is not None:
                raise self._error
            if not self._open:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        delta = self._buffer.popleft()
        self._buffered_bytes = self._buffered_bytes - delta.ByteSize() if self._buffer else 0
        self._unread_since = time.monotonic()
        return delta

    @property
    def finished(self) -> bool:
        """Whether the engine holds nothing of it any more."""
        return not self._open or self._error is not None

    def abort(self, cause: str) -> None:
        """Ask the engine to drop the whole request; idempotent. Its sequences then finish as CANCELLED."""
        if not self._aborted and not self.finished:
            self._aborted = True
            self._send_abort(self.handle, -1, cause)

    def abort_sequence(self, index: int, cause: str = "stop_string") -> None:
        """Ask the engine to drop one sequence; idempotent."""
        if index in self._open and not self._aborted:
            self._send_abort(self.handle, index, cause)

    def push(self, delta: wire.SequenceDelta) -> None:
        """Take a delta from the engine (EngineClient only)."""
        never_started = self.queued and not delta.HasField("started")
        if delta.finish == wire.ERROR and never_started:
            self._open.clear()  # refused or timed out in the queue: one error stands for all its sequences
        elif delta.finish != wire.NOT_FINISHED:
            self._open.discard(delta.index)
        if not self._buffer:
            self._unread_since = time.monotonic()
        limits = self._limits
        full = len(self._buffer) >= limits.max_stream_events or self._buffered_bytes >= limits.max_stream_bytes
        last = next((d for d in reversed(self._buffer) if d.index == delta.index), None) if full else None
        if last is None:
            self._buffer.append(delta)
        else:
            last.MergeFrom(delta)
        self._buffered_bytes += delta.ByteSize()
        if full and time.monotonic() - self._unread_since > limits.slow_reader_s:
            self.abort("slow_reader")
            message = f"the stream was not read for {limits.slow_reader_s:g} s and was aborted."
            self.fail(Cancelled(message, code="slow_reader", request_id=self.request_id))
        self._wake()

    def fail(self, error: TrilithonError) -> None:
        """End the stream with an error once what is buffered was read; a finished stream stays as it is."""
        if self._error is None and self._open:
            self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
