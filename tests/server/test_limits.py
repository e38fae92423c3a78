"""Rates of one key, on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilithon.errors import RateLimited
from trilithon_server.auth import Principal
from trilithon_server.config import LimitsConfig
from trilithon_server.limits import Bucket, KeyLimiter


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_S5_a_key_that_asks_too_fast_is_told_when_to_come_back() -> None:
    """The third request of a key with two per minute waits half a minute; another key does not."""
    clock = Clock()
    limiter = KeyLimiter(LimitsConfig(requests_per_minute_per_key=2), clock=clock)
    slow, other = Principal(tenant="a", key_id="a"), Principal(tenant="b", key_id="b")
    for _ in range(2):
        with limiter.request(slow):
            pass

    with pytest.raises(RateLimited) as refused, limiter.request(slow):
        pass
    with limiter.request(other):
        pass
    clock.now_s += 31
    with limiter.request(slow):
        pass

    assert refused.value.retry_after_s == pytest.approx(30)
    assert (b"x-ratelimit-limit-requests", b"2") in limiter.headers(slow)


def test_S5_tokens_are_charged_when_they_are_known() -> None:
    """A long answer is not cut off; the key's next prompt waits for it."""
    clock = Clock()
    limiter = KeyLimiter(LimitsConfig(), clock=clock)
    key = Principal(tenant="a", key_id="a", tokens_per_minute=600)

    limiter.spend_tokens(key, 100)
    limiter.charge_tokens(key, 1000)

    with pytest.raises(RateLimited):
        limiter.spend_tokens(key, 1)
    clock.now_s += 51
    limiter.spend_tokens(key, 1)


def test_places_come_back_whatever_ends_a_request() -> None:
    """A place in flight is given back when the request fails."""
    limiter = KeyLimiter(LimitsConfig(max_requests_per_key=1))
    key = Principal(tenant="a", key_id="a")

    for _ in range(3):
        with pytest.raises(KeyError), limiter.request(key):
            raise KeyError

    with limiter.request(key), pytest.raises(RateLimited, match="at most 1 requests"), limiter.request(key):
        pass


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), max_size=30))
def test_a_bucket_never_gives_more_than_its_rate(steps: list[tuple[float, int]]) -> None:
    """Over any span, what was taken is at most one full bucket plus the rate times the span."""
    clock = Clock()
    bucket = Bucket(60, clock=clock)
    taken = 0
    for wait_s, amount in steps:
        clock.now_s += wait_s
        if bucket.wait_s(amount) == 0:
            bucket.take(amount)
            taken += amount

    assert taken <= 60 + clock.now_s + 1e-6
