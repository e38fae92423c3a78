"""When to try again, and after how long."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable

from trilithon._transport import Attempt, AttemptFailed
from trilithon.errors import DeadlineExceeded, TrilithonError

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 8.0
MAX_SERVER_DELAY_S = 60.0
"""A server that asks for a longer wait is not waited for: the caller should know now."""


def new_request_id() -> str:
    """
    A fresh, time-ordered request id.

    >>> new_request_id().startswith("req_")
    True
    """
    return f"req_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(8)}"


class Retries:
    """
    The attempts of one call: asks the clock how much time is left and decides what to do after a failure.

    Delays are exponential, 0.5 to 8 s, with jitter, unless the server said how long to wait; the total `timeout_s`
    holds over all attempts and delays.
    """

    def __init__(
        self,
        *,
        request_id: str,
        timeout_s: float,
        max_retries: int,
        tell_server: bool = False,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._request_id = request_id
        self._timeout_s = timeout_s
        self._clock = clock
        self._jitter = jitter
        self._deadline = clock() + timeout_s
        self._max_retries = max_retries
        self._tell_server = tell_server
        self._failures = 0

    def attempt(self) -> Attempt:
        """The next try. Raises DeadlineExceeded when no time is left."""
        left_s = self._deadline - self._clock()
        if left_s <= 0:
            raise self._timed_out()
        return Attempt(self._request_id, left_s, self._tell_server)

    def delay_after(self, failed: AttemptFailed) -> float:
        """Seconds to wait before the next try; raises the error when there is to be none."""
        error = failed.error
        if not error.request_id:
            error.request_id = self._request_id
        self._failures += 1
        if not failed.retry or self._failures > self._max_retries:
            raise error from None
        delay_s = self._delay_s(error)
        if delay_s > MAX_SERVER_DELAY_S or self._clock() + delay_s >= self._deadline:
            raise error from None
        return delay_s

    def _delay_s(self, error: TrilithonError) -> float:
        if error.retry_after_s is not None:
            return max(0.0, error.retry_after_s)
        backoff_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** (self._failures - 1))
        return backoff_s * (0.75 + 0.25 * self._jitter())

    def _timed_out(self) -> DeadlineExceeded:
        message = f"No answer within `timeout`. Given: {self._timeout_s:g} s."
        return DeadlineExceeded(message, code="timeout", request_id=self._request_id)
