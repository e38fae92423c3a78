"""
The directory of a training run: which checkpoints are there, which is the newest good one, which may go.

    RUN/step_00000100/      a checkpoint: complete as soon as it has this name
    RUN/.tmp-step_00000200/ one that is being written, or was when its run died
    RUN/latest              one line, the name of the checkpoint published last
    RUN/.lock               held by the run that writes here
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from trilithon_parallel.checkpoint.errors import CheckpointError, agree
from trilithon_parallel.checkpoint.manifest import Manifest, check_sizes, read_manifest, verify
from trilithon_parallel.collectives import all_reduce_max
from trilithon_parallel.grid import Axis, Grid

LATEST_FILE = "latest"

TEMPORARY = ".tmp-"

_STEP = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(re.escape(TEMPORARY) + r"(old-)?step_\d{8,}")


@dataclass(frozen=True)
class Retention:
    """
    Which checkpoints stay: the newest `keep_last` (at least 1), and every one whose step divides by `keep_every`.

    `keep_every` 0 keeps no further ones.
    """

    keep_last: int
    keep_every: int = 0

    def __post_init__(self) -> None:
        if self.keep_last < 1 or self.keep_every < 0:
            raise CheckpointError(
                f"retention keep_last must be at least 1 and keep_every at least 0. "
                f"Given: {self.keep_last} and {self.keep_every}.",
                code="checkpoint_unsupported",
                hint="A run without a checkpoint could not be resumed.",
            )


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that was passed over, and the error that says why."""

    directory: Path
    reason: CheckpointError


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint of a run, verified whole, and what was newer but not good."""

    directory: Path
    manifest: Manifest
    skipped: tuple[Skipped, ...]


def step_name(step: int) -> str:
    """
    The directory name of a step.

    >>> step_name(123)
    'step_00000123'
    """
    return f"step_{step:08d}"


def steps(run_dir: Path) -> dict[int, Path]:
    """The checkpoints of a run by their names alone, newest first."""
    if not run_dir.is_dir():
        return {}
    named = ((_STEP.fullmatch(path.name), path) for path in run_dir.iterdir() if path.is_dir())
    found = {int(match.group(1)): path for match, path in named if match}
    return dict(sorted(found.items(), reverse=True))


def find_latest(run_dir: Path, *, axis: Axis) -> Found | None:
    """
    The newest checkpoint that is complete and whose checksums fit; `latest` is not trusted. Collective.

    Returns:
        None where the run has no checkpoint at all, so that it begins anew.
    Raises:
        CheckpointError: there are checkpoints and none is good; beginning anew must then be somebody's decision.
    """
    skipped: list[Skipped] = []
    for directory in _agreed(run_dir, axis):
        try:
            manifest = verify(directory, axis=axis)
        except CheckpointError as error:
            skipped.append(Skipped(directory, error))
        else:
            return Found(directory, manifest, tuple(skipped))
    if skipped:
        raise CheckpointError(
            f"no checkpoint of {run_dir.name} is good: "
            + "; ".join(f"{item.directory.name}: {item.reason.message}" for item in skipped[:3]),
            code=skipped[0].reason.code,
            hint="Restore one from a copy, or remove them all to begin anew.",
        )
    return None


def _agreed(run_dir: Path, axis: Axis) -> list[Path]:
    """The candidates; an error where ranks do not see the same ones."""
    found = steps(run_dir)
    newest = max(found, default=-1)
    bounds = all_reduce_max(torch.tensor([len(found), -len(found), newest, -newest]), axis, label="checkpoint.find")
    differ = bounds[0] != -bounds[1] or bounds[2] != -bounds[3]
    error = CheckpointError(
        f"all ranks must see the same checkpoints in {run_dir.name}.",
        code="checkpoint_disk",
        hint="Put the run directory on a file system that every machine mounts.",
    )
    agree(error if differ else None, axis, label="checkpoint.find")
    return list(found.values())


def is_complete(directory: Path) -> bool:
    """Whether manifest and file sizes fit; checksums are not read."""
    try:
        check_sizes(directory, read_manifest(directory))
    except (CheckpointError, OSError):
        return False
    return True


def publish(temporary: Path, directory: Path) -> None:
    """
    Give a finished checkpoint its name and point `latest` to it; killed in between, the run loses nothing.

    One of the same step that is not good is renamed to `damaged-...`: what it is worth is a person's to say.

    Raises:
        CheckpointError: `checkpoint_exists`, a good one has that name.
    """
    run_dir = directory.parent
    sync_directory(temporary)
    if directory.exists():
        _move_bad_aside(directory)
    temporary.rename(directory)
    sync_directory(run_dir)
    pointer = run_dir / f"{TEMPORARY}{LATEST_FILE}"
    write_file(pointer, f"{directory.name}\n".encode())
    pointer.replace(run_dir / LATEST_FILE)
    sync_directory(run_dir)


def _move_bad_aside(directory: Path) -> None:
    try:
        verify(directory, axis=Grid.single().world)
    except CheckpointError:
        number = next(n for n in range(1, 1000) if not directory.with_name(f"damaged-{directory.name}-{n}").exists())
        directory.rename(directory.with_name(f"damaged-{directory.name}-{number}"))
        return
    raise CheckpointError(
        f"{directory.name} exists already and is good; checkpoints are never overwritten.",
        code="checkpoint_exists",
        hint="Resume from it, move it away, or train in another run directory.",
    )


def prune(run_dir: Path, retention: Retention, *, verified: Path, protected: Collection[int] = ()) -> list[Path]:
    """
    Delete old checkpoints that `retention` does not keep.

    Only complete ones older than `verified` go; damaged ones are left for a person to look at.

    Args:
        verified: a checkpoint whose checksums have just been found right: it is never deleted, so whatever goes, a
            good one stays.
        protected: steps that stay besides.
    Returns:
        What was deleted.
    """
    newest = next(step for step, path in steps(run_dir).items() if path == verified)
    complete = [(step, path) for step, path in steps(run_dir).items() if step <= newest and is_complete(path)]
    deleted = []
    for step, path in complete[retention.keep_last :]:
        is_kept = step in protected or (retention.keep_every and step % retention.keep_every == 0)
        if path != verified and not is_kept:
            remove(path)
            deleted.append(path)
    return deleted


def remove(directory: Path) -> None:
    """Delete a checkpoint: first its name, then its files, so that half of one is never seen."""
    gone = directory.with_name(f"{TEMPORARY}old-{directory.name}")
    shutil.rmtree(gone, ignore_errors=True)
    directory.rename(gone)
    sync_directory(directory.parent)
    shutil.rmtree(gone)


def remove_leftovers(run_dir: Path) -> None:
    """Delete what dead runs left unfinished, and nothing else; the caller holds the lock."""
    for path in run_dir.iterdir():
        if _LEFTOVER.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)
    (run_dir / f"{TEMPORARY}{LATEST_FILE}").unlink(missing_ok=True)


def lock(run_dir: Path) -> int:
    """
    Claim a run directory for this process until the returned descriptor is closed (the kernel does so at its death).

    Raises:
        CheckpointError: `checkpoint_busy`, another run writes there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    fd = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise CheckpointError(
            f"{run_dir.name} is in use: another training run writes its checkpoints there.",
            code="checkpoint_busy",
            hint="Wait for it to end, stop it, or name another run directory.",
        ) from None
    except OSError:
        os.close(fd)
        raise
    return fd


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and bring it to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Bring a directory's entries to the disk."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
