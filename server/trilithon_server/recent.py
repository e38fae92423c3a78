"""What this process keeps for a while: so many things for each tenant, for so long; then they are forgotten."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """
    Things by id, each tenant its own.

    >>> kept = Recent[str](most=2, kept_s=10.0, clock=lambda: 0.0)
    >>> [kept.put("alice", id, id.upper()) for id in ("a", "b", "c")][-1], kept.get("alice", "a"), kept.get("bob", "c")
    (None, None, None)

    Args:
        most: of one tenant; of more the one that was put the longest ago is forgotten.
        kept_s: seconds after it was last put.
        clock: monotonic seconds.
    """

    def __init__(self, *, most: int, kept_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._kept_s, self._clock = most, kept_s, clock
        self._of: dict[str, OrderedDict[str, tuple[float, T]]] = {}

    def put(self, tenant: str, id: str, thing: T) -> None:
        """Keep a thing, in the place of one with the same id."""
        mine = self._of.setdefault(tenant, OrderedDict())
        mine[id] = (self._clock() + self._kept_s, thing)
        mine.move_to_end(id)
        self._forget_old()
        while len(mine) > self._most:
            mine.popitem(last=False)

    def get(self, tenant: str, id: str) -> T | None:
        """What is kept under an id, or None."""
        self._forget_old()
        mine = self._of.get(tenant)
        found = None if mine is None else mine.get(id)
        return None if found is None else found[1]

    def delete(self, tenant: str, id: str) -> bool:
        """Forget a thing; whether there was one."""
        self._forget_old()
        mine = self._of.get(tenant)
        return mine is not None and mine.pop(id, None) is not None

    def _forget_old(self) -> None:
        """Of every tenant: one that never asks again must not hold memory for ever."""
        now = self._clock()
        for tenant, things in list(self._of.items()):
            while things and next(iter(things.values()))[0] <= now:
                things.popitem(last=False)
            if not things:
                del self._of[tenant]
