"""What goes wrong with checkpoints, and how all ranks come to know it: one rank's failure is every rank's error."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable

import torch

from trilithon_parallel.collectives import all_reduce, all_reduce_max, broadcast_
from trilithon_parallel.config import ModelError
from trilithon_parallel.grid import Axis

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_TURN_S = 0.02  # between two looks at whether all ranks are done: far below any collective's limit


class CheckpointError(ModelError):
    """
    A checkpoint cannot be written, found or loaded: `code`, `message` and `hint` as for every `ModelError`.

    Codes: `checkpoint_missing`, `checkpoint_incomplete`, `checkpoint_corrupt`, `checkpoint_mismatch`,
    `checkpoint_coverage`, `checkpoint_exists`, `checkpoint_busy`, `checkpoint_disk_full`, `checkpoint_disk`,
    `checkpoint_state`, `checkpoint_unsupported`, `checkpoint_failed`, and the `weights_...` codes of the files.
    """


def typed(error: BaseException) -> CheckpointError:
    """Any failure as the error that users read."""
    if isinstance(error, CheckpointError):
        return error
    if isinstance(error, ModelError):
        return CheckpointError(error.message, code=error.code, hint=error.hint)
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in _FULL:
            return CheckpointError(
                f"there is no room left for the checkpoint: {error.strerror}{where}.",
                code="checkpoint_disk_full",
                hint="Free space or keep fewer checkpoints; the ones published before are untouched.",
            )
        return CheckpointError(
            f"a checkpoint file cannot be read or written: {error.strerror}{where}.",
            code="checkpoint_disk",
            hint="Look after the disk and the rights on the run directory; the checkpoints published before are "
            "untouched.",
        )
    return CheckpointError(f"{type(error).__name__}: {error}", code="checkpoint_failed")


class Task:
    """A function in a thread of its own. What it raises is kept in `error` until all ranks have agreed on it."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._run = run
        self._thread = threading.Thread(target=self._guarded, name="checkpoint", daemon=True)
        self._thread.start()

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException as error:  # raised again, on every rank, by `agree`
            self.error = error

    @property
    def is_done(self) -> bool:
        """Whether the function has returned or failed."""
        return not self._thread.is_alive()

    def pause(self) -> None:
        """Let a moment pass before the ranks are looked at again; less where this one ends within it."""
        if self.is_done:
            time.sleep(_TURN_S)
        else:
            self._thread.join(_TURN_S)


def all_done(task: Task, axis: Axis, *, label: str) -> bool:
    """Whether the tasks of all ranks of the axis have ended. Collective."""
    done = torch.tensor([int(task.is_done)])
    return int(all_reduce(done, axis, label=label)) == axis.size


def agree(error: BaseException | None, axis: Axis, *, label: str) -> None:
    """
    Raise on every rank where any rank brings an error: the last such rank's. Collective.

    Raises:
        CheckpointError: the same code, message and hint on all ranks.
    """
    failed = int(all_reduce_max(torch.tensor([0 if error is None else axis.rank + 1]), axis, label=label))
    if not failed:
        return
    own = typed(error) if error is not None else None
    told = own if own is not None and axis.rank == failed - 1 else None
    payload = b""
    if told is not None:
        where = "" if axis.is_trivial else f"rank {axis.ranks[axis.rank]}: "
        payload = json.dumps([where + told.message, told.code, told.hint]).encode()
    message, code, hint = json.loads(_share(payload, axis, src=axis.ranks[failed - 1], label=label))
    raise CheckpointError(message, code=code, hint=hint) from error


def _share(payload: bytes, axis: Axis, *, src: int, label: str) -> bytes:
    """The bytes that `src` gives, on every rank; what the others give is not looked at."""
    size = broadcast_(torch.tensor([len(payload)]), axis, src=src, label=label)
    data = torch.zeros(int(size), dtype=torch.uint8)
    if axis.ranks[axis.rank] == src:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    return bytes(broadcast_(data, axis, src=src, label=label).tolist())


def together(run: Callable[[], None], axis: Axis, *, label: str) -> None:
    """
    Run something on every rank and end together: all succeed or all raise. Collective.

    A rank may take as long as it needs: the others look after it every moment instead of waiting in one collective,
    whose limit a large file would exceed.
    """
    task = Task(run)
    while not all_done(task, axis, label=label):
        task.pause()
    agree(task.error, axis, label=label)
