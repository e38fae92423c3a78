"""How often something that died may be started again, and after what pause."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

MAX_RESTARTS, RESTART_WINDOW_S = 3, 600.0


class Restarts:
    """
    At most `MAX_RESTARTS` in `RESTART_WINDOW_S`, with 1, 2, 4 s between.

    >>> restarts = Restarts(clock=lambda: 0.0)
    >>> [restarts.count() for _ in range(restarts.left)], restarts.left
    ([1.0, 2.0, 4.0], 0)
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: deque[float] = deque()

    @property
    def left(self) -> int:
        """How many more there may be now."""
        horizon = self._clock() - RESTART_WINDOW_S
        while self._times and self._times[0] < horizon:
            self._times.popleft()
        return MAX_RESTARTS - len(self._times)

    def count(self) -> float:
        """Take one; the seconds to wait before it."""
        self._times.append(self._clock())
        return float(2 ** (len(self._times) - 1))
