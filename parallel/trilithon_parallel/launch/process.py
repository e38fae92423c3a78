"""
One rank as a child process that cannot outlive its launcher, and what is known of it: last lines, way of death.

Each rank leads a session of its own: a terminal's ^C reaches the launcher alone, and `kill` takes the rank's helpers
with it. When the launcher dies, the kernel kills the rank (PR_SET_PDEATHSIG) and the keeper kills its helpers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

_PR_SET_PDEATHSIG = 1
_READ_BYTES, _READS = 64 << 10, 16
_TAIL_LINES = 20
_LINE_BYTES = 4 << 10  # of a line in the tail


def _load_prctl() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    prctl: Callable[[int, int], int] = ctypes.CDLL(None, use_errno=True).prctl
    return prctl


_prctl = _load_prctl()  # looked up before any fork: the child may only call it


class Rank:
    """
    One running rank.

    Args:
        rank: its number.
        command: program and arguments.
        env: its whole environment.
        on_output: called with each piece of its stdout and stderr, as it arrives.
        pass_fds: descriptors that it holds too.
    """

    def __init__(
        self,
        rank: int,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        on_output: Callable[[bytes], None],
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.rank = rank
        self.exit_code: int | None = None
        self._on_output = on_output
        self._tail: deque[bytes] = deque(maxlen=_TAIL_LINES)
        self._rest = b""
        launcher = os.getpid()
        self._process = subprocess.Popen(  # one thread runs here; the hook makes two calls
            list(command),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: die_with(launcher),
            pass_fds=tuple(pass_fds),
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._pidfd: int | None = None

    @property
    def pid(self) -> int:
        """Process id, and id of its process group."""
        return self._process.pid

    @property
    def tail(self) -> tuple[str, ...]:
        """The last lines that it wrote, an unfinished one included."""
        lines = [*self._tail, self._rest] if self._rest else list(self._tail)
        return tuple(line.decode("utf-8", errors="replace") for line in lines[-_TAIL_LINES:])

    def register(self, selector: selectors.BaseSelector, *, on_exit: Callable[[], None]) -> None:
        """
        Wake `selector` when the rank speaks or dies; the keys' data is a function to call.

        Args:
            on_exit: called when the kernel tells that it is gone.
        """
        selector.register(self._output, selectors.EVENT_READ, lambda: self._speak(selector))
        with contextlib.suppress(OSError, AttributeError):  # without pidfd the caller's own tick notices the exit
            pidfd = self._pidfd = os.pidfd_open(self.pid)

            def gone() -> None:
                selector.unregister(pidfd)
                on_exit()

            selector.register(pidfd, selectors.EVENT_READ, gone)

    def poll(self) -> int | None:
        """Its exit code (below zero: killed by that signal), None while it runs; its output is read meanwhile."""
        code = self._process.poll()
        self.read()
        self.exit_code = code
        return code

    def read(self) -> bool:
        """Hand on what it has written; False at the end of its output."""
        for _ in range(_READS):  # others want to be read too
            if self._output.closed:
                return False
            try:
                piece = os.read(self._output.fileno(), _READ_BYTES)
            except BlockingIOError:
                return True
            if not piece:
                return False
            self._remember(piece)
            self._on_output(piece)
        return True

    def stopped(self) -> bool:
        """Whether a signal has stopped it (state T); a process under a debugger (t) is not meant."""
        try:
            with open(f"/proc/{self.pid}/stat", encoding="utf-8", errors="replace") as file:
                return file.read().rpartition(") ")[2][:1] == "T"
        except OSError:
            return False

    def signal(self, signum: int) -> None:
        """Signal the rank alone: its helpers must live while it writes a checkpoint."""
        if self._process.poll() is None:
            self._process.send_signal(signum)

    def signal_group(self, signum: int) -> None:
        """Signal the rank and its helpers, those that survived it included."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signum)

    def wait(self, *, timeout_s: float) -> bool:
        """Reap it; False when it is still there after `timeout_s`."""
        end = time.monotonic() + timeout_s
        while self.poll() is None:
            if time.monotonic() >= end:
                return False
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.02)
        return True

    def close(self, selector: selectors.BaseSelector) -> None:
        """Kill what is left of the rank and its helpers, reap it, release the pipes."""
        self.signal_group(signal.SIGKILL)
        self.wait(timeout_s=10.0)
        for file in (self._output, self._pidfd):
            if file is not None:
                with contextlib.suppress(KeyError, ValueError):
                    selector.unregister(file)
        self._output.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def _speak(self, selector: selectors.BaseSelector) -> None:
        if not self.read():
            selector.unregister(self._output)

    def _remember(self, piece: bytes) -> None:
        *lines, rest = (self._rest + piece).split(b"\n")
        self._tail.extend(line[:_LINE_BYTES] for line in lines)
        self._rest = rest[-_LINE_BYTES:]


class Keeper:
    """
    A small process that kills the groups it was told of when its launcher is gone, however that ended.

    It ends with `close`, which kills nobody: the launcher has done that itself by then.
    """

    _SCRIPT = 'trap "" INT TERM HUP; while read -r g; do gs="$gs -$g"; done; [ -z "$gs" ] || kill -s KILL -- $gs'

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", self._SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self, group: int) -> None:
        """Kill the process group `group` too when the launcher goes."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody killed it: the kernel still kills the ranks
            self._process.stdin.write(f"{group}\n".encode())
            self._process.stdin.flush()

    def close(self) -> None:
        """End it without killing anybody."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()


def die_with(parent: int) -> None:
    """From now on the kernel kills this process when the thread of `parent` that started it ends, however that is."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def describe_exit(code: int) -> str:
    """
    How a process ended, in words.

    >>> describe_exit(-9), describe_exit(1)
    ('was killed by SIGKILL', 'exited with code 1')
    """
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
