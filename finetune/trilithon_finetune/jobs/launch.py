"""
The seam between the worker and whatever starts processes: what to run, how it goes, how to end it.

`LocalLauncher` runs gangs on this host. Clusters are told of a job by `clusters.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trilithon_finetune.jobs import gang
from trilithon_parallel.launch.local import FAILURES_FILE

_MODULE = "trilithon_finetune.jobs.gang"
_TICK_S, _GONE_S = 0.02, 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """
    What to run: all ranks or none.

    Attributes:
        name: of the phase; it names the log files.
        command: program and arguments of a rank.
        directory: of the attempt.
        lock: file that every process of the job holds, whatever the attempt.
        lease, token: nothing starts unless the file says this token.
        environment: of the ranks, besides torchrun's variables.
        grace_s: between SIGTERM and SIGKILL.
    """

    name: str
    command: tuple[str, ...]
    nproc: int
    directory: Path
    lock: Path
    lease: Path
    token: int
    environment: Mapping[str, str]
    grace_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """
    How a gang ended.

    Attributes:
        code: of the rank that failed first, 128 + n for signal n; 0 where all were well.
        rank: that one; -1 where none failed or none is known.
        oom: whether the kernel killed a process for memory meanwhile.
    """

    code: int
    rank: int = -1
    oom: bool = False


class LaunchHandle(Protocol):
    """Processes that were started."""

    def poll(self) -> Exit | None:
        """How they ended; None while one runs."""
        ...

    def stop(self) -> None:
        """Ask them to write a checkpoint and end (SIGTERM), once."""
        ...

    def kill(self) -> None:
        """End them now, and wait until they are gone."""
        ...

    def token(self) -> str:
        """What tells them apart from all others."""
        ...


class Launcher(Protocol):
    """Starts processes, and finds those that an earlier worker left behind."""

    def start(self, spec: LaunchSpec) -> LaunchHandle:
        """Start the ranks. Raises OSError."""
        ...

    def clear(self, lock: Path, *, limit_s: float, check: Callable[[], object]) -> bool:
        """
        End what still runs of a job, whoever started it; False where it is on another host, or does not end in time.

        `check` raises when the caller may do so no more.
        """
        ...


class LocalLauncher:
    """Gangs as processes of this host, which end with this one."""

    def start(self, spec: LaunchSpec) -> LaunchHandle:
        """Start the ranks. They end with the calling thread, so it must outlive them."""
        return _Gang(spec)

    def clear(self, lock: Path, *, limit_s: float, check: Callable[[], object]) -> bool:
        """Kill whoever holds the job's lock, until nobody does."""
        end = time.monotonic() + limit_s
        while (holder := _holder(lock)) is not None:
            check()
            _kill(holder)
            if time.monotonic() > end:
                return False
            time.sleep(_TICK_S)
        return True


class _Gang:
    def __init__(self, spec: LaunchSpec) -> None:
        self._spec, self._asked = spec, False
        self._oom_kills = _oom_kills()
        order = {
            "parent": os.getpid(),
            "name": spec.name,
            "command": spec.command,
            "nproc": spec.nproc,
            "directory": str(spec.directory),
            "lock": str(spec.lock),
            "lease": str(spec.lease),
            "token": spec.token,
            "environment": dict(spec.environment),
            "grace_s": spec.grace_s,
        }
        with (spec.directory / "launch.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, json.dumps(order)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._identity = _identity(self._process.pid)

    def poll(self) -> Exit | None:
        code = self._process.poll()
        if code is None:
            return None
        code = code if code >= 0 else 128 - code
        return Exit(code=code, rank=self._first_failed() if code else -1, oom=_oom_kills() > self._oom_kills)

    def stop(self) -> None:
        if not self._asked:  # a second SIGTERM would kill the ranks
            self._asked = True
            self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        end = time.monotonic() + _GONE_S  # the kernel kills the ranks; they hold the lock until they are gone
        while self._identity and _holder(self._spec.lock) == self._identity and time.monotonic() < end:
            time.sleep(_TICK_S)

    def token(self) -> str:
        return self._identity

    def _first_failed(self) -> int:
        try:
            *_, line = (self._spec.directory / FAILURES_FILE).read_text().splitlines()
            return int(json.loads(line)["rank"])
        except (OSError, ValueError, KeyError):
            return -1


def _holder(lock: Path) -> str | None:
    """Who said last that it holds the lock; None when nobody does."""
    try:
        with lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return lock.read_text()
    return None


def _identity(pid: int) -> str:
    try:
        return gang.identity(pid)
    except OSError:  # it is gone
        return ""


def _kill(holder: str) -> None:
    """Kill the gang that wrote `holder`, unless another process has its pid by now or it is on another host."""
    pid = holder.split()[1] if len(holder.split()) == 3 else ""
    if pid.isdecimal() and _identity(int(pid)) == holder:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid), signal.SIGKILL)


def _oom_kills() -> int:
    """How many processes of this host the kernel has killed for memory."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
