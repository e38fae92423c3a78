"""
Files that appear whole or not at all: written aside, brought to the disk, renamed.

A reader never sees half of anything, a crash leaves only a temporary name behind, and of two writers at once one wins.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_path(path: Path) -> Path:
    """A name beside `path` that nobody else uses; on the same file system, so that a rename is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's names, to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock while several renames in it belong together. Ends with the process at the latest."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def publish_folder(folder: Path, fill: Callable[[Path], None]) -> bool:
    """
    Make a folder whole: `fill` writes its files into a temporary one, which is then renamed.

    Args:
        folder: where it shall be; its parent is created.
        fill: writes files (no folders) into the path that it is given.
    Returns:
        True when ours became `folder`; False when somebody else's was there first, which then stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = temporary_path(folder)
    aside.mkdir()
    try:
        fill(aside)
        for file in sorted(aside.iterdir()):
            sync(file)
        sync(aside)
        try:
            # A rename onto a folder that holds something fails: the first one stays.
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            return False
        sync(folder.parent)
        return True
    finally:
        shutil.rmtree(aside, ignore_errors=True)
