"""
A worker's hold on one job, on its own clock: renew it, wait out a database that is away, let go in time.

The lease ends in the database `lease_s` after the newest renewal began to be asked for, at the earliest. This side
counts from just before it asked, by the monotonic clock, so it never believes in a lease that another worker can see
the end of.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from trilithon.errors import Unavailable
from trilithon_finetune.jobs.moves import Ending, LeaseLost
from trilithon_finetune.jobs.queue import Claim, Move, NewCheckpoint, Queue, Verified
from trilithon_finetune.jobs.records import Desired, Job

_AGAIN_S = 0.25  # between two tries while the database is away

T = TypeVar("T")


class Lease:
    """
    The lease of `claim`.

    Args:
        since: monotonic time just before the job was claimed.
        lease_s: how long it holds. renew_s, look_s: how often it is renewed, and its owner's wish read.
    """

    def __init__(
        self, queue: Queue, claim: Claim, *, since: float, lease_s: float, renew_s: float, look_s: float
    ) -> None:
        self.queue, self.claim = queue, claim
        self._lease_s, self._renew_s, self._look_s = lease_s, renew_s, look_s
        self._began = self._renewed = self._looked = since
        self.job = claim.job
        """As it was at the newest write."""
        self.desired: Desired = claim.job.desired

    @property
    def used_s(self) -> float:
        """Time that workers have spent on the job, this one included."""
        return self.claim.used_s + time.monotonic() - self._began

    def check(self) -> None:
        """Raises LeaseLost when the lease must have run out by now."""
        if time.monotonic() >= self._renewed + self._lease_s:
            raise LeaseLost(f"job {self.claim.job.id}: the lease could not be renewed in time.")

    def beat(self) -> Desired:
        """Renew or look, when it is time to; call it often. Raises LeaseLost."""
        now = time.monotonic()
        try:
            if now >= self._renewed + self._renew_s:
                self.desired = self.queue.renew(self.claim, lease_s=self._lease_s, used_s=self.used_s)
                self._renewed = self._looked = now
            elif now >= self._looked + self._look_s:
                self.desired = self.queue.look(self.claim)
                self._looked = now
        except Unavailable:
            self._looked = now  # ask again at the next look; the processes go on meanwhile
        self.check()
        return self.desired

    def insist(self, work: Callable[[], T]) -> T:
        """Do `work` on the database, again while it is away and the lease holds. Raises LeaseLost."""
        while True:
            try:
                return work()
            except Unavailable:
                self.check()
                time.sleep(_AGAIN_S)

    def look(self) -> Desired:
        """What the owner wants, and that the lease is held, read now. Raises LeaseLost."""
        self.desired = self.insist(lambda: self.queue.look(self.claim))
        return self.desired

    def write(
        self,
        *moves: Move,
        values: Mapping[str, Any] | None = None,
        wait_s: float | None = None,
        release: bool = False,
        ending: Ending | None = None,
        verified: Verified | None = None,
    ) -> Job:
        """`Queue.write`, insisting. Raises LeaseLost."""
        used = {"used_ms": int(self.used_s * 1000)} if release else {}
        write = functools.partial(self.queue.write, self.claim, *moves, values={**(values or {}), **used})
        more = functools.partial(write, wait_s=wait_s, release=release, ending=ending, verified=verified)
        return self._note(self.insist(more))

    def write_news(self, move: Move, *, values: Mapping[str, Any], offset: int, saved: Sequence[NewCheckpoint]) -> Job:
        """`Queue.write` of what a phase said, once. Raises LeaseLost, Unavailable."""
        return self._note(self.queue.write(self.claim, move, values=values, offset=offset, saved=saved))

    def _note(self, job: Job) -> Job:
        self.job, self.desired = job, job.desired
        return job
