"""The frame of every call, whatever its protocol: who asks, may they, how did it end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Required, TypedDict

from trilithon.errors import BodyTooLarge, Overloaded, RateLimited, TrilithonError, Unavailable
from trilithon_server.auth import Keyring
from trilithon_server.limits import KeyLimiter
from trilithon_server.logs import log_request
from trilithon_server.metrics import Metrics, RequestRecord
from trilithon_server.served import Call
from trilithon_server.tracing import Tracing, span_of


class CallDetails(TypedDict, total=False):
    """Arguments of `Calls.open`."""

    route: Required[str]
    request_id: Required[str]
    scope: str
    authorization: str | None
    api_key: str | None
    deadline_s: float | None
    traceparent: str | None
    count: bool


class Calls:
    """
    Opens calls.

    Args:
        keys: who may ask.
        limiter: what each key has in flight.
        metrics: where ends are counted.
        tracer: records spans; None = off.
    """

    def __init__(self, keys: Keyring, limiter: KeyLimiter, metrics: Metrics, tracer: Tracing | None) -> None:
        self._keys = keys
        self._limiter = limiter
        self._metrics = metrics
        self._tracer = tracer
        self.draining = False
        """Whether calls that begin now are late: they are given no model."""
        self._open = 0  # counted, and not late
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Return once every counted call has ended that began before the drain did, its answer told to the end."""
        await self._idle.wait()

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        self._open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    @contextlib.contextmanager
    def open(
        self,
        *,
        route: str,
        request_id: str,
        scope: str = "user",
        authorization: str | None = None,
        api_key: str | None = None,
        deadline_s: float | None = None,
        traceparent: str | None = None,
        count: bool = True,
    ) -> Iterator[Call]:
        """
        The frame of one call: authenticates, holds one of the key's places, and counts and logs the end.

        Args:
            route: HTTP path pattern or RPC name.
            request_id: given or made.
            scope: that the call needs.
            authorization, api_key: as the client sent them.
            deadline_s: monotonic time by which the client wants its answer.
            traceparent: W3C trace context, if any.
            count: hold a place of the key's requests in flight (not for pages, lists and the like).
        Raises:
            Unauthenticated, PermissionDenied, RateLimited: before the body of the `with` runs.
        """
        record = RequestRecord(route=route, model="")
        arrived_s = time.monotonic()
        tenant = None
        late = self.draining
        ends: list[Callable[[], None]] = []
        span = span_of(self._tracer, route, traceparent, request_id)
        try:
            principal = self._keys.authenticate(authorization, api_key)
            tenant = principal.tenant
            principal.require(scope)
            with contextlib.ExitStack() as held:
                if count:
                    held.enter_context(self._limiter.request(principal))
                    if not late:
                        held.enter_context(self._holding())
                yield Call(
                    principal=principal,
                    request_id=request_id,
                    route=route,
                    arrived_s=arrived_s,
                    deadline_s=deadline_s,
                    late=late,
                    record=record,
                    ends=ends,
                )
                if record.generated_tokens:
                    self._limiter.charge_tokens(principal, record.generated_tokens)
        except TrilithonError as error:
            record.code = error.code
            if isinstance(error, RateLimited | Overloaded | BodyTooLarge | Unavailable):
                self._metrics.rejected(error.code)
            raise
        except Exception:
            record.code = "internal_error"
            raise
        except BaseException:  # the client left
            record.code = "client_left"
            raise
        finally:
            for end in ends:
                end()
            record.duration_s = time.monotonic() - arrived_s
            if count:
                self._metrics.request_ended(record)
                self._log_end(record, request_id, tenant)
            span.end(record)

    @staticmethod
    def _log_end(record: RequestRecord, request_id: str, tenant: str | None) -> None:
        def ms(seconds: float | None) -> float | None:
            return None if seconds is None else round(1000 * seconds, 3)

        log_request(
            request_id=request_id,
            tenant=tenant,
            route=record.route,
            model=record.model or None,
            code=record.code,
            finish_reason=record.finish_reason or None,
            prompt_tokens=record.prompt_tokens or None,
            cached_tokens=record.cached_tokens or None,
            generated_tokens=record.generated_tokens or None,
            queue_ms=ms(record.queue_s),
            first_token_ms=ms(record.first_token_s),
            total_ms=ms(record.duration_s),
        )
