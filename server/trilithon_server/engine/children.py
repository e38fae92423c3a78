"""
Child processes that cannot outlive their parent, and what is known of them: status lines, last output, way of death.

Each child leads its own session, so a terminal's ^C reaches the supervisor alone and `kill` takes the child's own
helpers with it; the kernel kills it when the supervisor dies (PR_SET_PDEATHSIG).
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
from typing import IO

_PR_SET_PDEATHSIG = 1
_MAX_LINE_BYTES = 64 << 10
_TAIL_LINES = 20

LineHandler = Callable[[str], None]


def _load_prctl() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    prctl: Callable[[int, int], int] = ctypes.CDLL(None, use_errno=True).prctl
    return prctl


_prctl = _load_prctl()  # looked up before any fork: the child may only call it


def die_with_parent() -> None:
    """Make the kernel kill the calling process when its parent dies (Linux; elsewhere the pipes' end must do)."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class LineReader:
    """Cuts what a pipe delivers into lines; over-long lines are cut at 64 KiB."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.closed = False
        self._rest = b""

    def read(self) -> list[str]:
        """Whole lines that have arrived; at the end of the stream also an unfinished one."""
        chunks = []
        while not self.closed:
            try:
                chunk = os.read(self.fd, _MAX_LINE_BYTES)
            except BlockingIOError:
                break
            if not chunk:
                self.closed = True
            chunks.append(chunk)
            if len(chunks) >= 16:
                break  # others want to be read too
        *lines, self._rest = (self._rest + b"".join(chunks)).split(b"\n")
        if self._rest and (self.closed or len(self._rest) > _MAX_LINE_BYTES):
            lines.append(self._rest)
            self._rest = b""
        return [line[:_MAX_LINE_BYTES].decode("utf-8", errors="replace") for line in lines]


class Child:
    """
    One child process with a status pipe from it, optionally a control pipe to it, and its output captured.

    Args:
        argv: the command; `{status}` and `{control}` in it become the descriptors' numbers.
        env: its whole environment.
        on_output: called with each line of its stdout and stderr.
        on_status: called with each line of its status pipe.
        control: whether it gets a control pipe.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        name: str,
        env: Mapping[str, str],
        on_output: LineHandler,
        on_status: LineHandler,
        control: bool = False,
    ) -> None:
        self.name = name
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._on_output = on_output
        self._on_status = on_status
        self._closed = False
        self._selector: selectors.BaseSelector | None = None
        self._pidfd: int | None = None
        self._control_fd: int | None = None
        status_read, status_write = os.pipe()
        control_read, control_write = os.pipe() if control else (None, None)
        passed = [fd for fd in (status_write, control_read) if fd is not None]
        words = {"{status}": str(status_write), "{control}": str(control_read)}
        try:
            self.process = subprocess.Popen(  # one thread runs here; the hook makes one call
                [words.get(word, word) for word in argv],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=passed,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        except BaseException:
            for fd in (status_read, control_write):
                if fd is not None:
                    os.close(fd)
            raise
        finally:
            for fd in passed:
                os.close(fd)
        self._control_fd = control_write
        output: IO[bytes] | None = self.process.stdout
        assert output is not None
        self._output_file = output
        self._output = LineReader(output.fileno())
        self._status = LineReader(status_read)

    @property
    def pid(self) -> int:
        """Process id, and id of its process group."""
        return self.process.pid

    def register(self, selector: selectors.BaseSelector) -> None:
        """Wake `selector` when the child speaks or dies; the keys' data is a function to call."""
        self._selector = selector
        for reader in (self._output, self._status):
            selector.register(reader.fd, selectors.EVENT_READ, self.read)
        with contextlib.suppress(OSError, AttributeError):  # without pidfd the caller's own tick notices the exit
            self._pidfd = os.pidfd_open(self.pid)
            selector.register(self._pidfd, selectors.EVENT_READ, self._on_exit)

    def read(self) -> None:
        """Hand on everything that the child has said so far; nothing once it is closed."""
        if self._closed:
            return
        for line in self._output.read():
            self.tail.append(line)
            self._on_output(line)
        for line in self._status.read():
            self._on_status(line)
        for reader in (self._output, self._status):
            if reader.closed:
                self._unregister(reader.fd)

    def send(self, line: str) -> bool:
        """Write a line to the control pipe; False when the child has closed it."""
        assert self._control_fd is not None
        try:
            os.write(self._control_fd, line.encode() + b"\n")
        except BrokenPipeError:
            return False
        return True

    def exit_code(self) -> int | None:
        """None while it runs; below zero: killed by that signal."""
        return self.process.poll()

    def stopped(self) -> bool:
        """Whether a signal has stopped it (state T); a process under a debugger (t) is not meant."""
        try:
            with open(f"/proc/{self.pid}/stat", encoding="utf-8", errors="replace") as file:
                return file.read().rpartition(") ")[2][:1] == "T"
        except OSError:
            return False

    def signal(self, signum: int) -> None:
        """Signal the whole process group, helpers that survived the child included."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signum)

    def wait(self, *, timeout_s: float) -> bool:
        """Reap it; False when it is still there after `timeout_s`. Its output is read meanwhile."""
        end = time.monotonic() + timeout_s
        while self.exit_code() is None:
            if time.monotonic() > end:
                return False
            self.read()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.02)
        self.read()
        return True

    def close(self) -> None:
        """Kill what is left of the group and release the pipes; idempotent."""
        self.signal(signal.SIGKILL)
        self.wait(timeout_s=5.0)
        if self._closed:
            return
        self._closed = True
        for fd in (self._output.fd, self._status.fd, self._pidfd, self._control_fd):
            self._unregister(fd)
        self._output_file.close()
        for fd in (self._status.fd, self._pidfd, self._control_fd):
            if fd is not None:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._pidfd = self._control_fd = None

    def _on_exit(self) -> None:
        self._unregister(self._pidfd)

    def _unregister(self, fd: int | None) -> None:
        if self._selector is not None and fd is not None:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(fd)


def describe_exit(code: int) -> str:
    """
    How a process ended, in words.

    >>> describe_exit(-9), describe_exit(1)
    ('killed by SIGKILL', 'exited with code 1')
    """
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
