"""Work that the front itself must not do, since it loads torch or takes long: a process beside it, within limits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Sequence

from trilithon.errors import DeadlineExceeded, Overloaded


class Turns:
    """
    How many processes of one kind run at once, and how many callers may wait for a turn.

    Args:
        what: they do, in the plural, as `too_many_...` of an error has it.
    """

    def __init__(self, what: str, *, running: int, waiting: int) -> None:
        self._what, self._most = what, waiting
        self._turn = asyncio.Semaphore(running)
        self._waiting = 0

    @contextlib.asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """The frame of one. Raises Overloaded: too many wait."""
        if self._waiting >= self._most:
            message = f"at most {self._most} {self._what} may wait at once. Try again later."
            raise Overloaded(message, code=f"too_many_{self._what}", retry_after_s=5.0)
        self._waiting += 1
        try:
            async with self._turn:
                yield
        finally:
            self._waiting -= 1


async def output_of(command: Sequence[str], *, limit_s: float, late: str) -> bytes:
    """
    Run a process of one thread to its end, and kill it when the caller is cancelled; what it printed.

    Raises:
        DeadlineExceeded: it took longer than `limit_s`; the message is `late`.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        async with asyncio.timeout(limit_s):
            output, _ = await process.communicate()
        return output
    except TimeoutError:
        raise DeadlineExceeded(late, code="timeout") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
