"""What following a job's events needs, without a wire: where to go on, when to try again, when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from trilithon._job_types import FINAL_STATES, JobEvent
from trilithon._retry import new_request_id
from trilithon._transport import Attempt, AttemptFailed
from trilithon.errors import ConnectionFailed, DeadlineExceeded

PAGE = 100
"""Items asked for at once; the most that the server gives."""

LONG_S = 30 * 86_400.0
"""A stream without a time limit of its own."""

FIRST_PAUSE_S, MAX_PAUSE_S, MAX_FAILURES = 0.5, 15.0, 8


def page_fields(found: Sequence[Any], **fields: Any) -> dict[str, Any]:
    """The fields of a list's next page."""
    given = {name: value for name, value in fields.items() if value is not None}
    return {**given, "limit": PAGE, **({"after": found[-1].id} if found else {})}


class Following:
    """
    One caller's way through a job's events, over as many streams as it takes.

    Args:
        job_id: of the job.
        after_seq: the last event that is known already.
        follow: wait for more until the final event; else end after the newest.
        timeout_s: for everything; None: no limit.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        job_id: str,
        *,
        after_seq: int,
        follow: bool,
        timeout_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ended = False
        """Whether there is nothing more to ask for."""
        self._job_id, self._seq, self._follow = job_id, after_seq, follow
        self._timeout_s, self._clock = timeout_s, clock
        self._deadline = clock() + (LONG_S if timeout_s is None else timeout_s)
        self._failures = 0

    @property
    def fields(self) -> dict[str, Any]:
        """Of the request of the next stream."""
        return {"id": self._job_id, "after_seq": self._seq, "no_wait": not self._follow}

    def attempt(self) -> Attempt:
        """The next try. Raises DeadlineExceeded when no time is left."""
        left_s = self._deadline - self._clock()
        if left_s <= 0:
            raise self._timed_out()
        return Attempt(new_request_id(), left_s)

    def seen(self, event: JobEvent) -> JobEvent:
        """Note an event, and hand it on."""
        self._seq, self._failures = event.seq, 0
        self.ended = event.kind in FINAL_STATES
        return event

    def closed(self) -> None:
        """The stream has ended by itself: that is the end, for a server ends it with the job."""
        self.ended = True

    def pause_after(self, failed: AttemptFailed) -> float:
        """Seconds until the next try; raises the error when there is to be none."""
        error = failed.error
        if self._deadline <= self._clock():
            raise self._timed_out() from None
        self._failures += 1
        lost = failed.retry or isinstance(error, ConnectionFailed) or error.retryable
        if not lost or not self._follow or self._failures > MAX_FAILURES:
            raise error from None
        pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self._failures - 1))
        return min(pause_s, max(0.0, self._deadline - self._clock()))

    def _timed_out(self) -> DeadlineExceeded:
        message = f"The job is not over within `timeout_s`. Given: {self._timeout_s:g} s. It goes on."
        return DeadlineExceeded(message, code="timeout")
