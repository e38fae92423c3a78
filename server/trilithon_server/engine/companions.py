"""
Processes beside the engines that the supervisor starts, starts again when they die, and stops in good order.

A companion's death ends nothing else: it is told, and the next start waits 1, 2, 4 s, at most a minute; one that has
lived for a minute begins anew.
"""

from __future__ import annotations

import functools
import logging
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Sequence

from trilithon_server.engine.children import Child, describe_exit
from trilithon_server.extension import Companion

MAX_DELAY_S = 60.0
PROVEN_S = 60.0  # one that lived this long starts without delay the next time

_log = logging.getLogger(__name__)


class _Process:
    """One companion, over all its starts."""

    def __init__(
        self,
        companion: Companion,
        *,
        selector: selectors.BaseSelector,
        on_output: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self.child: Child | None = None
        self._companion = companion
        self._selector = selector
        self._on_output = on_output
        self._clock = clock
        self._started_s = 0.0
        self._failures = 0
        self._start_at: float | None = None
        self._stopping = False

    def start(self) -> None:
        self._start_at = None
        self._started_s = self._clock()
        self.child = Child(
            self._companion.argv,
            name=self._companion.name,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self._companion.env},
            on_output=self._on_output,
            on_status=lambda _: None,
        )
        self.child.register(self._selector)

    def check(self) -> None:
        if self.child is None:
            if self._start_at is not None and self._clock() >= self._start_at and not self._stopping:
                self.start()
            return
        code = self.child.exit_code()
        if code is None:
            return
        self.child.wait(timeout_s=0.5)
        lines = tuple(self.child.tail)
        self.child.close()
        self.child = None
        if self._stopping:
            return
        now = self._clock()
        self._failures = 1 if now - self._started_s >= PROVEN_S else self._failures + 1
        delay_s = min(MAX_DELAY_S, 2.0 ** (self._failures - 1))
        self._start_at = now + delay_s
        told = {"companion": self._companion.name, "cause": describe_exit(code), "again_in_s": delay_s}
        _log.error("companion_lost", extra={**told, "last_lines": lines})

    def terminate(self) -> None:
        """SIGTERM to the process itself, which looks after what it has started."""
        self._stopping = True
        if self.child is not None and self.child.exit_code() is None:
            self.child.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        self._stopping = True
        if self.child is not None:
            self.child.close()
            self.child = None


class Companions:
    """
    All companions of a server.

    Args:
        companions: what runs.
        selector: of the supervisor's loop.
        on_output: takes (name, line) of everything that they print.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        companions: Sequence[Companion],
        *,
        selector: selectors.BaseSelector,
        on_output: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._processes = [
            _Process(item, selector=selector, on_output=functools.partial(on_output, item.name), clock=clock)
            for item in companions
        ]

    @property
    def running(self) -> int:
        """How many processes there are."""
        return sum(process.child is not None for process in self._processes)

    def start(self) -> None:
        """Start them all."""
        for process in self._processes:
            process.start()

    def check(self) -> None:
        """Notice deaths, and start again what is due."""
        for process in self._processes:
            process.check()

    def terminate(self) -> None:
        """Ask all to end; nothing is started again."""
        for process in self._processes:
            process.terminate()

    def close(self) -> None:
        """Kill what is left; idempotent."""
        for process in self._processes:
            process.close()


def python_module(module: str, *arguments: str) -> tuple[str, ...]:
    """The command that runs a module of this installation, wherever it is started."""
    return (sys.executable, "-P", "-m", module, *arguments)
