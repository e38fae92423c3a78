"""Streams of deltas: iterators that are context managers too. Closing one ends the request on the server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Self

from trilithon._decode import decode
from trilithon._transport import AsyncEventStream, AttemptFailed, Event, EventStream
from trilithon._types import Delta, Finished, Started, Timings, Usage
from trilithon.errors import ConnectionFailed, TrilithonError


class _Progress:
    """What both streams know so far."""

    started: Started
    """The request's id, model and prompt."""
    finished: Finished | None
    """Usage and timings; None until the stream has ended."""

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.started.request_id

    @property
    def model(self) -> str:
        """The served model that answers."""
        return self.started.model

    @property
    def usage(self) -> Usage | None:
        """What was counted; None until the stream has ended."""
        return self.finished.usage if self.finished else None

    @property
    def timings(self) -> Timings | None:
        """Where the time went; None until the stream has ended."""
        return self.finished.timings if self.finished else None

    def _begin(self, event: Event | None) -> None:
        self.finished = None
        if event is None:
            raise AttemptFailed(cut_off(""), retry=False)
        self.started = decode(Started, event[1]) if event[0] == "started" else Started()
        self._pending = [] if event[0] == "started" else [event]

    def _take(self, event: Event) -> Delta | None:
        name, fields = event
        if name == "delta":
            return decode(Delta, fields)
        if name == "finished":
            self.finished = decode(Finished, fields)
        return None  # a newer server's news

    def _named(self, error: TrilithonError) -> TrilithonError:
        if not error.request_id:
            error.request_id = self.request_id
        return error


class Stream(_Progress):
    """
    The deltas of one request, as they come.

        with client.generate("Once", stream=True) as stream:
            for delta in stream:
                print(delta.text, end="")

    Ends after the last delta, or raises the error that ended the request: a text that stops short is never passed off
    as finished. Leaving the block, `close()`, or dropping the stream ends the request on the server.
    """

    def __init__(self, events: EventStream) -> None:
        self._events = events
        self._iterator = iter(events)
        self._closed = False
        try:
            self._begin(next(self._iterator, None))
        except BaseException:
            events.close()
            raise

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        try:
            while self.finished is None and not self._closed:
                event = self._pending.pop() if self._pending else next(self._iterator, None)
                if event is None:
                    raise cut_off(self.request_id)
                delta = self._take(event)
                if delta is not None:
                    return delta
            if self.finished is not None and not self._closed:
                # The server ends the stream now: hearing it leaves the connection whole for the next request. Where it
                # is cut instead, the answer is whole all the same.
                with contextlib.suppress(AttemptFailed):
                    next(self._iterator, None)
        except AttemptFailed as failed:
            self.close()
            raise self._named(failed.error) from None
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def close(self) -> None:
        """End the request, if it still runs. May be called again; the stream then yields nothing more."""
        self._closed = True
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        events: Any = getattr(self, "_events", None)
        if events is not None:
            events.close()


class AsyncStream(_Progress):
    """
    The deltas of one request, as they come.

        async with await client.generate("Once", stream=True) as stream:
            async for delta in stream:
                print(delta.text, end="")

    Ends after the last delta, or raises the error that ended the request. Leaving the block, or `aclose()`, ends the
    request on the server.
    """

    def __init__(self, events: AsyncEventStream) -> None:
        self._events = events
        self._iterator = aiter(events)
        self._closed = False

    async def _open(self) -> Self:
        try:
            self._begin(await anext(self._iterator, None))
        except BaseException:
            await self._events.aclose()
            raise
        return self

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        try:
            while self.finished is None and not self._closed:
                event = self._pending.pop() if self._pending else await anext(self._iterator, None)
                if event is None:
                    raise cut_off(self.request_id)
                delta = self._take(event)
                if delta is not None:
                    return delta
            if self.finished is not None and not self._closed:
                # As of a `Stream`.
                with contextlib.suppress(AttemptFailed):
                    await anext(self._iterator, None)
        except AttemptFailed as failed:
            await self.aclose()
            raise self._named(failed.error) from None
        except BaseException:
            await self.aclose()
            raise
        await self.aclose()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the request, if it still runs. May be called again; the stream then yields nothing more."""
        self._closed = True
        await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()


def cut_off(request_id: str) -> ConnectionFailed:
    """A stream that ends without its last event."""
    message = "The stream ended before the answer did. Given: no `finished` event. The text so far is not whole."
    return ConnectionFailed(message, code="connection_lost", request_id=request_id)
