"""The front's check of a constraint before admission: compiled in a worker process, in bounded time and memory (R8)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sys
from collections import OrderedDict
from pathlib import Path

from trilithon_server.engine.framing import frame
from trilithon_server.engine.wire_pb2 import Constraint

_CACHED_VERDICTS = 1024
_START_S = 60.0
READY = b"ready"  # the worker's first frame


class ConstraintError(ValueError):
    """A constraint that can't be used. `code` is `invalid_constraint` or `constraint_too_large`."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class ConstraintChecker:
    """
    One worker process for one tokenizer; started by the first check (or `start`), restarted after it was killed.

    Args:
        model_dir: whose tokenizer the constraints are for.
        compile_s: time that one constraint may take.
        memory_bytes: memory that the worker may use beyond its own start.
    """

    def __init__(self, model_dir: Path, *, compile_s: float = 2.0, memory_bytes: int = 64 << 20) -> None:
        self._model_dir = model_dir
        self._compile_s = compile_s
        self._memory_bytes = memory_bytes
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()

    async def start(self) -> None:
        """Start the worker ahead of the first check."""
        async with self._lock:
            await self._ready_process()

    async def check(self, constraint: Constraint) -> None:
        """
        Return when the constraint compiles.

        Raises:
            ConstraintError: `invalid_constraint` with the library's reason, or `constraint_too_large`.
        """
        message = constraint.SerializeToString(deterministic=True)
        key = hashlib.sha256(message).digest()
        async with self._lock:
            verdict = self._verdicts.get(key)
            if verdict is None:
                verdict = await self._compile(message)
                self._verdicts[key] = verdict
                if len(self._verdicts) > _CACHED_VERDICTS:
                    self._verdicts.popitem(last=False)
        if verdict:
            raise ConstraintError(verdict, code="invalid_constraint")

    async def stop(self) -> None:
        """End the worker; idempotent."""
        async with self._lock:
            await self._kill()

    async def _compile(self, message: bytes) -> str:
        process = await self._ready_process()
        assert process.stdin is not None
        budget = (
            f"the constraint must compile within {self._compile_s * 1e3:.0f} ms and {self._memory_bytes >> 20} MiB."
        )
        try:
            process.stdin.write(frame(message))
            answer = await asyncio.wait_for(_read_frame(process), self._compile_s)
        except TimeoutError:
            await self._kill()
            raise ConstraintError(f"{budget} Given: one that took longer.", code="constraint_too_large") from None
        except (asyncio.IncompleteReadError, ConnectionError):  # the memory limit ended the worker
            await self._kill()
            raise ConstraintError(f"{budget} Given: one that needs more memory.", code="constraint_too_large") from None
        except asyncio.CancelledError:
            await self._kill()  # its answer would be taken for the next question's
            raise
        return answer.decode("utf-8", errors="replace")

    async def _ready_process(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        await self._kill()
        command = ("-m", "trilithon_server.engine.constraint_worker", "--model-dir", str(self._model_dir))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            "--memory-bytes",
            str(self._memory_bytes),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        self._process = process
        try:
            hello = await asyncio.wait_for(_read_frame(process), _START_S)
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self._kill()
            raise
        assert hello == READY
        return process

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()


async def _read_frame(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    length = int.from_bytes(await process.stdout.readexactly(4), "big")
    return await process.stdout.readexactly(length)
