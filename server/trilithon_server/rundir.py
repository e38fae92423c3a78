"""
The directory where a server's processes meet: sockets, heartbeats, the children's settings. 0700, gone at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trilithon_server.config import environment_runtime_dir

_PREFIX = "trilithon-"
_LOCK = "lock"
_MAX_SOCKET_PATH = 100  # sun_path holds 108 bytes on Linux, 104 elsewhere, one of them the final zero
_LONGEST_NAME = len("/" + 32 * "x" + ".beats")


class RunDirError(ValueError):
    """The run directory that the user named can't be used; the message says why."""


@contextlib.contextmanager
def run_directory(wanted: Path | None = None) -> Iterator[Path]:
    """
    A directory for one server, held by a lock while the server lives.

    Without `wanted` a new one is made under XDG_RUNTIME_DIR or the temporary directory, and removed at the end; ones
    that a killed server left behind are removed too. A directory that the user names is made if missing and stays.

    Raises:
        RunDirError: `wanted` is in use, open to others, or too long for a Unix socket.
    """
    path = _make() if wanted is None else _take(wanted)
    lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"--run-dir must not be in use by another server. Given: {path}. Name another directory."
            raise RunDirError(message) from None
        yield path
        if wanted is None:
            shutil.rmtree(path, ignore_errors=True)
        else:
            (path / _LOCK).unlink(missing_ok=True)
    finally:
        os.close(lock)


def _make() -> Path:
    bases = [environment_runtime_dir(), tempfile.gettempdir(), "/tmp"]
    usable = [
        Path(base) for base in bases if base and os.access(base, os.W_OK) and _fits(Path(base) / (_PREFIX + 8 * "x"))
    ]
    if not usable:
        raise RunDirError(
            "no short writable directory for sockets was found. Given: XDG_RUNTIME_DIR, TMPDIR, /tmp. "
            "Name one with --run-dir."
        )
    _remove_left_behind(usable[0])
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=usable[0]))


def _take(wanted: Path) -> Path:
    path = wanted.absolute()
    if not _fits(path):
        raise RunDirError(
            f"--run-dir must have at most {_MAX_SOCKET_PATH - _LONGEST_NAME} characters. Given: {len(str(path))}."
        )
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.stat().st_mode & 0o077
    except OSError as error:
        raise RunDirError(f"--run-dir must be a writable directory. Given: {path} ({error.strerror}).") from None
    if mode:
        raise RunDirError(f"--run-dir must be closed to others (mode 0700). Given: {path}, mode {mode | 0o700:04o}.")
    return path


def _fits(path: Path) -> bool:
    return len(os.fsencode(str(path))) + _LONGEST_NAME <= _MAX_SOCKET_PATH


def _remove_left_behind(base: Path) -> None:
    """Remove directories of ours whose server is gone: nobody holds their lock."""
    for path in base.glob(_PREFIX + "*"):
        if path.is_symlink() or not path.is_dir() or path.stat().st_uid != os.getuid():
            continue
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # none yet: its server is just starting
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # alive
        finally:
            os.close(lock)
