"""How long a run still takes, from what its steps, evaluations and checkpoints have taken so far."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

TIMED_STEPS = 50
LEAST_STEPS = 10


class Remaining:
    """
    Counts along with a run.

    Args:
        total_steps: of the whole run; `evaluate_every`: steps between evaluations; the last step has one anyway.
        clock: seconds, from anywhere.
    """

    def __init__(self, total_steps: int, evaluate_every: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._every, self._clock = total_steps, evaluate_every, clock
        self._steps: deque[float] = deque(maxlen=TIMED_STEPS)
        self._pauses: dict[bool, list[float]] = {True: [], False: []}
        self._last = clock()

    def after(self, step: int, *, step_s: float) -> int | None:
        """
        The seconds left after step number `step`, of which `step_s` were the training: whole ones, None before ten
        steps were timed.

        They are the median of the last 50 steps for each that is left, and for each pause to come the mean of those
        seen: behind an evaluated step that is the evaluation, behind another what a checkpoint held up. An evaluation
        counts from the first that was seen.
        """
        now = self._clock()
        self._steps.append(step_s)
        self._pauses[self._is_evaluated(step)].append(max(0.0, now - self._last - step_s))
        self._last = now
        if len(self._steps) < LEAST_STEPS:
            return None
        left = self._total - step
        evaluations = max(0, (self._total - 1) // self._every - step // self._every) + (left > 0)
        training = left * statistics.median(self._steps)
        pauses = evaluations * _mean(self._pauses[True]) + (left - evaluations) * _mean(self._pauses[False])
        return round(training + pauses)

    def _is_evaluated(self, step: int) -> bool:
        return step == self._total or step % self._every == 0


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else 0.0
