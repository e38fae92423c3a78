"""Send a trace at a server, closed or open loop, and keep what comes back."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from trilithon._bench.wire import Answer, Connection, Exchange, Target, read
from trilithon.errors import ConnectionFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass of a trace: its answers in the order of the trace, and what the load generator itself used."""

    answers: tuple[Answer, ...]
    duration_s: float
    own_cpu_s: float
    max_in_flight: int


async def run_pass(
    target: Target,
    bodies: Sequence[bytes],
    *,
    concurrency: int | None,
    arrivals_s: Sequence[float] = (),
    timeout_s: float = 600.0,
    on_done: Callable[[int], None] | None = None,
) -> Pass:
    """
    Send every request once.

    Args:
        concurrency: closed loop: so many at a time. None: open loop, at `arrivals_s`.
        arrivals_s: seconds from the start, one per request.
        on_done: called with the number of ended requests.
    Raises:
        ConnectionFailed: closed loop only: nothing answers before the first request.
    """
    pool = _Pool(target, timeout_s, on_done)
    requests = [target.request(body) for body in bodies]
    exchanges: list[Exchange] = []
    if concurrency is not None:
        try:
            await pool.open(min(concurrency, len(requests)))
        except OSError as error:
            message = f"Nothing answered at {target.host}:{target.port}. Given: {error.strerror}."
            raise ConnectionFailed(message) from None
    started_s, cpu_s = perf_counter(), _cpu_s()
    if concurrency is not None:
        pending = iter(enumerate(requests))
        slots: list[Exchange | None] = [None] * len(requests)

        async def work() -> None:
            for index, request in pending:
                slots[index] = await pool.send(request)

        await asyncio.gather(*(work() for _ in range(concurrency)))
        exchanges = [slot for slot in slots if slot is not None]
    else:

        async def at(due_s: float, request: bytes) -> Exchange:
            await asyncio.sleep(max(0.0, started_s + due_s - perf_counter()))
            return await pool.send(request)

        exchanges = await asyncio.gather(*map(at, arrivals_s, requests))
    own_cpu_s = _cpu_s() - cpu_s
    pool.close()
    ended_s = max((exchange.ended_s for exchange in exchanges), default=started_s)
    return Pass(
        answers=tuple(map(read, exchanges)),
        duration_s=ended_s - started_s,
        own_cpu_s=own_cpu_s,
        max_in_flight=pool.max_in_flight,
    )


class _Pool:
    """Connections that are kept between requests."""

    def __init__(self, target: Target, timeout_s: float, on_done: Callable[[int], None] | None) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._on_done = on_done
        self._idle: list[Connection] = []
        self._all: list[Connection] = []
        self._in_flight = 0
        self._ended = 0
        self.max_in_flight = 0

    async def open(self, count: int) -> None:
        """Connect before the clock starts."""
        for _ in range(count):
            self._idle.append(await self._connect())

    async def send(self, request: bytes) -> Exchange:
        """One exchange, over an idle connection or a new one."""
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            connection = self._take() or await self._connect()
            exchange = await connection.exchange(request, self._timeout_s)
            if connection.usable:
                self._idle.append(connection)
            return exchange
        except OSError as error:
            return Exchange(perf_counter(), error=f"cannot connect: {error}")
        finally:
            self._in_flight -= 1
            self._ended += 1
            if self._on_done is not None:
                self._on_done(self._ended)

    def close(self) -> None:
        """Hang up all."""
        for connection in self._all:
            connection.close()

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self) -> Connection:
        connection = await self._target.connect()
        self._all.append(connection)
        return connection


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
