"""Limits of one key: requests in flight, requests and tokens per minute. Checked before any work (bar S5)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from trilithon.errors import RateLimited
from trilithon_server.auth import Principal
from trilithon_server.config import LimitsConfig
from trilithon_server.validation import Bounds


class Bucket:
    """
    A token bucket that holds one minute's worth.

    >>> bucket = Bucket(60, clock=lambda: 0.0)
    >>> bucket.wait_s(60), bucket.take(60), round(bucket.wait_s(1))
    (0.0, None, 1)
    """

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._then = clock()

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._then) * self.per_minute / 60)
        self._then = now

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` can be taken; an amount above a whole minute's worth needs a full bucket."""
        self._refill()
        missing = min(amount, self.per_minute) - self._level
        return max(0.0, missing * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        """Take; the level may go below zero, and later callers wait for it."""
        self._refill()
        self._level -= amount

    @property
    def remaining(self) -> int:
        """What can be taken now."""
        self._refill()
        return max(0, int(self._level))


class _KeyState:
    def __init__(self, principal: Principal, limits: LimitsConfig, clock: Callable[[], float]) -> None:
        requests = principal.requests_per_minute or limits.requests_per_minute_per_key
        tokens = principal.tokens_per_minute or limits.tokens_per_minute_per_key
        self.max_in_flight = principal.max_requests or limits.max_requests_per_key
        self.in_flight = 0
        self.requests = Bucket(requests, clock=clock) if requests else None
        self.tokens = Bucket(tokens, clock=clock) if tokens else None


class KeyLimiter:
    """
    Counts what each key has in flight and how fast it asks.

    Args:
        limits: the server's limits, for keys without their own.
        clock: monotonic seconds.
    """

    def __init__(self, limits: LimitsConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._states: dict[str, _KeyState] = {}

    def _state(self, principal: Principal) -> _KeyState:
        state = self._states.get(principal.key_id)
        if state is None:
            state = self._states[principal.key_id] = _KeyState(principal, self._limits, self._clock)
        return state

    @contextlib.contextmanager
    def request(self, principal: Principal) -> Iterator[None]:
        """
        Hold one of the key's places for as long as the request lives.

        Raises:
            RateLimited: too many in flight, or too many this minute.
        """
        state = self._state(principal)
        if state.in_flight >= state.max_in_flight:
            raise RateLimited(
                f"a key may have at most {state.max_in_flight} requests in flight. Wait for one to end.",
                retry_after_s=1.0,
            )
        _draw(state.requests, 1, "requests")
        state.in_flight += 1
        try:
            yield
        finally:
            state.in_flight -= 1

    def spend_tokens(self, principal: Principal, tokens: int) -> None:
        """
        Charge a request's prompt, and later its answer, to the key.

        Raises:
            RateLimited: the key has used up this minute's tokens.
        """
        _draw(self._state(principal).tokens, tokens, "tokens")

    def charge_tokens(self, principal: Principal, tokens: int) -> None:
        """Charge what was generated; never refused, the next request waits for it."""
        bucket = self._state(principal).tokens
        if bucket is not None:
            bucket.take(tokens)

    def headers(self, principal: Principal) -> list[tuple[bytes, bytes]]:
        """`x-ratelimit-*` of the rates that are set for this key."""
        state = self._state(principal)
        out: list[tuple[bytes, bytes]] = []
        for what, bucket in (("requests", state.requests), ("tokens", state.tokens)):
            if bucket is not None:
                reset_s = bucket.wait_s(bucket.per_minute)
                for kind, value in (
                    ("limit", str(bucket.per_minute)),
                    ("remaining", str(bucket.remaining)),
                    ("reset", f"{reset_s:.1f}s"),
                ):
                    out.append((f"x-ratelimit-{kind}-{what}".encode(), value.encode()))
        return out


def _draw(bucket: Bucket | None, amount: int, what: str) -> None:
    if bucket is None:
        return
    wait_s = bucket.wait_s(amount)
    if wait_s > 0:
        raise RateLimited(
            f"this key may use at most {bucket.per_minute} {what} per minute. Retry in {wait_s:.0f} s.",
            retry_after_s=wait_s,
        )
    bucket.take(amount)


def bounds_for(
    limits: LimitsConfig,
    principal: Principal,
    *,
    vocab_size: int,
    max_context: int,
    default_max_tokens: int | None = None,
) -> Bounds:
    """What this key may ask of a model with this vocabulary and window."""
    return Bounds(
        vocab_size=vocab_size,
        max_context=max_context,
        max_output_tokens=limits.max_output_tokens,
        default_max_tokens=default_max_tokens or limits.default_max_tokens,
        max_n=limits.max_n,
        max_beam=limits.max_beam,
        max_logprobs=limits.max_logprobs,
        max_logprob_token_ids=limits.max_logprob_token_ids,
        max_time_ms=limits.max_time_limit_ms,
        max_priority=principal.max_priority,
        max_stop=limits.max_stop,
        max_stop_bytes=limits.max_stop_bytes,
        max_stop_token_ids=limits.max_stop_token_ids,
        max_bad_words=limits.max_bad_words,
        max_bad_word_tokens=limits.max_bad_word_tokens,
        max_logit_bias=limits.max_logit_bias,
        max_allowed_ids=limits.max_allowed_token_ids,
        max_constraint_bytes=limits.max_constraint_bytes,
    )
