"""
A job as it goes, on stderr: a bar with the newest numbers on a terminal, elsewhere a plain line for what matters.

The time that is left is counted in steps: the median of the last ones times those that are still to come.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from trilithon._job_types import JobEvent
from trilithon.cli._output import printable

EVERY_S = 5.0
"""Seconds between two plain lines of steps."""

_TIMED_STEPS, _LEAST_STEPS = 50, 10
_QUIET = frozenset({"claimed", "checkpoint_started", "checkpoint_deleted", "prepare_started"})


class Pace:
    """
    Seconds until the last step.

    >>> pace = Pace()
    >>> [pace.left({"step": n, "total_steps": 30, "step_seconds": 2.0}) for n in (9, 10)]
    [None, None]
    """

    def __init__(self) -> None:
        self._step_s: deque[float] = deque(maxlen=_TIMED_STEPS)

    def left(self, numbers: dict[str, Any]) -> float | None:
        """After a step with these numbers; None while too few were timed."""
        seconds, total = numbers.get("step_seconds"), numbers.get("total_steps") or 0
        if seconds:
            self._step_s.append(float(seconds))
        if len(self._step_s) < _LEAST_STEPS or not total:
            return None
        return statistics.median(self._step_s) * max(0, int(total) - int(numbers.get("step") or 0))


class Follow:
    """
    Shows events one by one, inside a `with` block.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._pace, self._clock = Pace(), clock
        self._shown_at = -EVERY_S
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Follow:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[numbers]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("waiting", total=None, numbers="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: JobEvent) -> None:
        """The next event."""
        if event.kind == "step":
            self._step(event.data)
        elif event.kind not in _QUIET:
            self.say(event_line(event))
            if self._bar is not None:
                self._bar.update(self._task, description=event.kind.replace("_", " "))

    def say(self, line: str) -> None:
        """A line for people, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _step(self, numbers: dict[str, Any]) -> None:
        line = step_line(numbers, self._pace.left(numbers))
        step, total = int(numbers.get("step") or 0), int(numbers.get("total_steps") or 0)
        if self._bar is not None:
            self._bar.update(self._task, description="training", completed=step, total=total or None, numbers=line)
        elif step in (1, total) or self._clock() - self._shown_at >= EVERY_S:
            self._shown_at = self._clock()
            self.say(line)


def step_line(numbers: dict[str, Any], left_s: float | None) -> str:
    """
    A step in one line; what is not known is left out.

    >>> step_line({"step": 12, "total_steps": 300, "train_loss": 2.5, "lr": 2e-4, "tokens_per_second": 1234.5}, 185.0)
    'step 12/300  loss 2.5000  lr 2.00e-04  1,234 tokens/s  3 min 5 s left'
    """
    total = f"/{numbers['total_steps']}" if numbers.get("total_steps") else ""
    parts = [
        f"step {numbers.get('step')}{total}",
        f"loss {numbers['train_loss']:.4f}" if numbers.get("train_loss") is not None else "",
        f"lr {numbers['lr']:.2e}" if numbers.get("lr") is not None else "",
        f"{numbers['tokens_per_second']:,.0f} tokens/s" if numbers.get("tokens_per_second") else "",
        f"{duration(left_s)} left" if left_s is not None else "",
    ]
    return "  ".join(part for part in parts if part)


def event_line(event: JobEvent) -> str:
    """An event as people read it: what happened, and a word before it where it is no good news."""
    level = {"warn": "warning: ", "error": "error: "}.get(event.level, "")
    return f"{event.kind.replace('_', ' ')}: {level}{printable(event.message)}"


def duration(seconds: float) -> str:
    """
    A time for people, in its two largest units.

    >>> duration(0.4), duration(59.6), duration(3725), duration(90061)
    ('0 s', '1 min', '1 h 2 min', '1 d 1 h')
    """
    left, parts = round(seconds), []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2]) or "0 s"
