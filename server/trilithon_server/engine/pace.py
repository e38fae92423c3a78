"""How long steps take: deadlines that only a hung rank misses, and the share of time that stages wait."""

from __future__ import annotations

MIN_DEADLINE_S = 5.0
DEADLINE_FACTOR = 10.0  # a step may take this many times its estimate before its rank counts as hung
_SMOOTHING = 0.1
_FORGETTING = 0.99  # per step, of the slowest pace seen


class Pace:
    """Moving estimates. `slots` is the number of plans that may be in flight."""

    def __init__(self, *, slots: int) -> None:
        self.step_s = 0.0
        """Moving average of a step's seconds."""
        self.bubble_ratio = 0.0
        """Moving average of the last stage's waiting share while plans are in flight."""
        self._slots = slots
        self._slowest_base_s = 0.0
        self._slowest_token_s = 0.0
        self._last_landing_s: float | None = None

    def deadline_s(self, num_tokens: int) -> float:
        """Seconds that a plan of this size may take, those in flight before it included."""
        estimate_s = self._slowest_base_s + num_tokens * self._slowest_token_s
        return max(MIN_DEADLINE_S, DEADLINE_FACTOR * estimate_s) * self._slots

    def warmed_up(self, num_tokens: int, *, seconds: float) -> None:
        """The worst-case forward pass took this long."""
        self._slowest_token_s = max(self._slowest_token_s, seconds / num_tokens)

    def landed(self, num_tokens: int, *, seconds: float, busy_s: float, now_s: float) -> None:
        """A plan has come back `seconds` after it was handed out; the last stage was busy for `busy_s`."""
        self.step_s += _SMOOTHING * (seconds - self.step_s) if self.step_s else seconds
        self._slowest_base_s = max(self._slowest_base_s * _FORGETTING, seconds)
        self._slowest_token_s = max(self._slowest_token_s * _FORGETTING, seconds / num_tokens)
        if self._slots > 1 and self._last_landing_s is not None:
            # Between two landings of a full pipeline the last stage does one plan's work.
            span_s = min(now_s - self._last_landing_s, seconds)
            if span_s > 0:
                waiting = 1.0 - min(1.0, busy_s / span_s)
                self.bubble_ratio += _SMOOTHING * (waiting - self.bubble_ratio)
        self._last_landing_s = now_s
