"""The worker that compiles constraints before admission, in bounded time and memory (R8)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from trilithon_server.engine.constraint_check import ConstraintChecker, ConstraintError
from trilithon_server.engine.wire_pb2 import Constraint

HUGE = Constraint(json_schema=json.dumps({"enum": [f"value number {i}" for i in range(18_400)]}))


@pytest.fixture
async def make(tiny_dir: Path) -> AsyncIterator[Callable[..., ConstraintChecker]]:
    checkers: list[ConstraintChecker] = []

    def build(**options: float) -> ConstraintChecker:
        checkers.append(ConstraintChecker(tiny_dir, **options))  # type: ignore[arg-type]  # a table of numbers
        return checkers[-1]

    yield build
    for checker in checkers:
        await checker.stop()


async def test_R8_good_constraints_pass_and_bad_ones_say_why(make: Callable[..., ConstraintChecker]) -> None:
    """The reason is the library's own first line; a verdict is remembered."""
    checker = make()
    await checker.check(Constraint(regex="[a-z]+"))
    for _ in range(2):
        with pytest.raises(ConstraintError, match=r"invalid regex") as error:
            await checker.check(Constraint(regex="a(b"))
        assert error.value.code == "invalid_constraint"
    await checker.check(Constraint(json_schema="{}"))


async def test_R8_a_constraint_beyond_its_time_is_refused(make: Callable[..., ConstraintChecker]) -> None:
    """The worker is killed, the sender told the budget, and the next constraint compiled by a new worker."""
    checker = make(compile_s=0.003)
    with pytest.raises(ConstraintError, match=r"within 3 ms and 64 MiB. Given: one that took longer") as error:
        await checker.check(HUGE)

    assert error.value.code == "constraint_too_large"
    await make().check(Constraint(regex="a"))


async def test_R8_a_constraint_beyond_its_memory_is_refused(make: Callable[..., ConstraintChecker]) -> None:
    """The limit ends the worker, not the server."""
    checker = make(compile_s=20.0, memory_bytes=1 << 20)
    with pytest.raises(ConstraintError, match=r"1 MiB. Given: one that needs more memory"):
        await checker.check(HUGE)


async def test_a_worker_that_dies_is_replaced(make: Callable[..., ConstraintChecker]) -> None:
    """Killing the worker between checks costs nobody an answer."""
    checker = make()
    await checker.start()
    assert checker._process is not None
    os.kill(checker._process.pid, signal.SIGKILL)
    await checker._process.wait()

    await checker.check(Constraint(regex="a+"))


async def test_a_cancelled_check_leaves_no_answer_for_the_next(make: Callable[..., ConstraintChecker]) -> None:
    """Verdicts are never taken for another's when a client leaves during the compilation."""
    checker = make()
    await checker.start()
    task = asyncio.create_task(checker.check(HUGE))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    with pytest.raises(ConstraintError, match="invalid regex"):
        await checker.check(Constraint(regex="("))
