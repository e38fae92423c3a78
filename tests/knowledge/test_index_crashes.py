"""An index while it is written: whole versions or none, whatever kills the writer or refuses it."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from knowledge.retrieval_cases import is_whole, opened, publish, told

# Python 3.12 warns of forks beside threads; the children here start none and end by `_exit`.
FORKS = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def _killed_at(count: int, folder: Path) -> None:
    """
    Make the `count`th call of this process that changes the disk its last one, as a power failure does.

    What was written since and not brought to the disk is cut in half.
    """
    left, synced = [count], {path.stat().st_ino for path in folder.rglob("*")}
    plain_open, truncate = builtins.open, os.truncate

    def tick() -> None:
        left[0] -= 1
        if left[0] == 0:
            for path in folder.rglob("*"):
                if path.is_file() and path.stat().st_ino not in synced:
                    truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def guarded(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            tick()
            result = original(*arguments, **named)
            if name == "fsync":
                synced.add(os.fstat(arguments[0]).st_ino)
            return result

        return call

    def opening(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if mode.strip("bt") != "r":
            tick()
        return plain_open(file, mode, *arguments, **named)

    for name in CALLS:
        setattr(os, name, guarded(getattr(os, name), name))
    builtins.open = io.open = opening


def in_child(run: Callable[[], None]) -> int:
    """Run in a forked process; what `os.waitpid` says of its end."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "indexes"


@FORKS
def test_acc_A04_killed_at_any_write_a_whole_version_is_current(root: Path) -> None:
    """
    SIGKILL at every call that changes the disk, and what was not synced is lost: version 2 opens whole until version 3
    does, and the next writer tidies up.

    Inverse check: seen to fail with `current` replaced before the version is renamed, with old versions removed before
    that, and with the files or `current` not synced.
    """
    publish(root, 1)
    publish(root, 2)
    found = []
    for count in range(1, 1000):
        copy = root.with_name("copy")
        shutil.copytree(root, copy)

        def attempt(copy: Path = copy, count: int = count) -> None:
            _killed_at(count, copy)
            publish(copy, 3)

        status = in_child(attempt)
        index = opened(copy)
        assert is_whole(index)
        found.append(index.version)
        if count % 5 == 0 or status == 0:
            assert_tidied(copy, newer_than=index.version)
        shutil.rmtree(copy)
        if status == 0:
            break
        assert os.WIFSIGNALED(status)

    assert set(found) == {2, 3}
    assert found == sorted(found)
    assert found.count(2) > 20, "the calls were not seen"
    assert found.count(3) > 10


def assert_tidied(root: Path, *, newer_than: int) -> None:
    """The next writer publishes, and leaves two versions and nothing else."""
    version = publish(root, 9)
    names = sorted(path.name for path in (root / "wiki").iterdir())

    assert version == opened(root).version > newer_than
    assert opened(root).passage(0) == told(9)[0]
    assert names[0] == "current"
    assert len(names) == 3
    assert names[2] == f"v{version:08d}"
    assert names[1][0] == "v"


def test_acc_A04_a_full_disk_harms_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    An error at each call that changes the disk is raised, and a whole version is current.

    Inverse check: seen to fail with the errors of the pointer's replacement swallowed.
    """
    publish(root, 1)
    publish(root, 2)
    found = []
    for count in range(1, 1000):
        copy = root.with_name("copy")
        shutil.copytree(root, copy)
        left = _refused_at(count, monkeypatch)
        try:
            publish(copy, 3)
            is_done = True
        except OSError:
            is_done = False
        monkeypatch.undo()
        index = opened(copy)
        assert is_whole(index)
        assert index.version == 3 or not is_done
        found.append(index.version)
        if count % 5 == 0:
            assert_tidied(copy, newer_than=index.version)
        shutil.rmtree(copy)
        if left[0] > 0:
            break

    assert set(found) == {2, 3}
    assert found.count(2) > 10, "the calls were not seen"


def _refused_at(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    left = [count]

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **named)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    return left
