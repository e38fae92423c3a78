"""Streams of a task's events: what was found, pieces of text, and last the whole answer."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from trilithon._decode import decode
from trilithon._streams import cut_off
from trilithon._transport import AsyncEventStream, AttemptFailed, Event, EventStream

T = TypeVar("T")
"""What the stream yields: a dataclass for each kind of event."""
R = TypeVar("R")
"""The whole answer."""

Kinds = Mapping[str, type[Any]]
"""Name of an event -> what a stream yields for it."""

LAST = "finished"


class _Events(Generic[T, R]):
    """What both streams know so far."""

    result: R | None
    """The whole answer; None until the stream has ended."""

    def __init__(self, kinds: Kinds, result: type[R]) -> None:
        self.result = None
        self._kinds, self._result = kinds, result
        self._closed = False

    def _take(self, event: Event | None) -> T | None:
        """The event's dataclass; None for the last one, and for a newer server's news."""
        if event is None:
            raise cut_off("")
        name, fields = event
        if name == LAST:
            self.result = decode(self._result, fields)
            return None
        kind = self._kinds.get(name)
        return None if kind is None else decode(kind, fields)


class TaskStream(_Events[T, R]):
    """
    The events of one task, as they come; `result` holds the whole answer at the end.

    Ends after the last event, or raises the error that ended the request. Leaving the block, `close()`, or dropping the
    stream ends the request on the server.
    """

    def __init__(self, events: EventStream, kinds: Kinds, result: type[R]) -> None:
        super().__init__(kinds, result)
        self._events, self._iterator = events, iter(events)
        self._pending = [self._first()]

    def _first(self) -> T | None:
        try:
            return self._take(next(self._iterator, None))
        except BaseException:
            self._events.close()
            raise

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            while self._pending or (self.result is None and not self._closed):
                item = self._pending.pop() if self._pending else self._take(next(self._iterator, None))
                if item is not None:
                    return item
            if not self._closed:
                with contextlib.suppress(AttemptFailed):  # the result is whole, however the stream ends
                    next(self._iterator, None)  # the server ends it now: the connection stays whole
        except AttemptFailed as failed:
            self.close()
            raise failed.error from None
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def close(self) -> None:
        """End the request, if it still runs. May be called again; the stream then yields nothing more."""
        self._closed = True
        self._pending.clear()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        events: Any = getattr(self, "_events", None)
        if events is not None:
            events.close()


class AsyncTaskStream(_Events[T, R]):
    """The events of one task, as they come; `result` holds the whole answer at the end. As `TaskStream`."""

    def __init__(self, events: AsyncEventStream, kinds: Kinds, result: type[R]) -> None:
        super().__init__(kinds, result)
        self._events, self._iterator = events, aiter(events)
        self._pending: list[T | None] = []

    async def open(self) -> Self:
        """Wait until the server has accepted the request. Raises AttemptFailed."""
        try:
            self._pending.append(self._take(await anext(self._iterator, None)))
        except BaseException:
            await self._events.aclose()
            raise
        return self

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        try:
            while self._pending or (self.result is None and not self._closed):
                item = self._pending.pop() if self._pending else self._take(await anext(self._iterator, None))
                if item is not None:
                    return item
            if not self._closed:
                with contextlib.suppress(AttemptFailed):  # as of a `TaskStream`
                    await anext(self._iterator, None)
        except AttemptFailed as failed:
            await self.aclose()
            raise failed.error from None
        except BaseException:
            await self.aclose()
            raise
        await self.aclose()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the request, if it still runs. May be called again; the stream then yields nothing more."""
        self._closed = True
        self._pending.clear()
        await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()
