"""What a phase's end means: the data that it left, or whose fault the failure is."""

from __future__ import annotations

import json
import secrets
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trilithon_finetune.errors import JobError
from trilithon_finetune.jobs.launch import Exit
from trilithon_parallel.launch.local import EXIT_PEER_LOST

STOPPED = frozenset({128 + signal.SIGTERM})
"""A gang that was asked to end did so in good order."""

_KILLED = {128 + number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
_DISK_FULL_BYTES = 1 << 20  # less free space than this, and a phase could not even say what was wrong


class AttemptFailed(Exception):
    """An attempt cannot go on; `error` says why, `data` is what the phase has found out all the same."""

    def __init__(self, error: JobError, data: Mapping[str, Any] | None = None) -> None:
        super().__init__(error.message)
        self.error, self.data = error, data or {}


def phase_data(directory: Path, phase: str, ended: Exit) -> dict[str, Any]:
    """
    What a phase that ended well has found out.

    Args:
        directory: of the attempt.
    Raises:
        AttemptFailed: it did not end well, or left nothing.
    """
    if ended.code == 0:
        result = _read(directory / f"{phase}.json")
        if result is not None and result.get("ok") is True and isinstance(result.get("data"), dict):
            return dict(result["data"])
        raise AttemptFailed(bug(f"The phase {phase} ended well and left no result."))
    left = (_read(directory / f"{phase}.json") or {}).get("data")
    raise AttemptFailed(error_of(directory, phase, ended), left if isinstance(left, dict) else None)


def error_of(directory: Path, phase: str, ended: Exit) -> JobError:
    """Why a phase failed: its own words where it left some, else what its end says."""
    path = directory / (f"train-{ended.rank}.json" if phase == "train" else f"{phase}.json")
    result = _read(path)
    if result is not None and result.get("ok") is False and isinstance(result.get("error"), dict):
        try:
            return replace(JobError.from_json(result["error"]), rank=ended.rank if phase == "train" else -1)
        except (AssertionError, TypeError):
            return bug(f"The phase {phase} failed and left an error of no known kind.", rank=ended.rank)
    rank = ended.rank if phase == "train" else -1
    where = f"Rank {rank} of the training" if rank >= 0 else f"The phase {phase}"
    if shutil.disk_usage(directory).free < _DISK_FULL_BYTES:
        message = f"{where} stopped, and the store's disk is full."
        return JobError(code="disk_full", message=message, hint="Free space, then resume the job.", rank=rank)
    if ended.code == 128 + signal.SIGKILL and ended.oom:
        message = f"{where} was killed by the system, which had no memory left."
        hint = "Lower training.micro_batch_tokens or data.max_tokens, or spread the model over more ranks."
        return JobError(code="out_of_memory", message=message, hint=hint, rank=rank)
    if ended.code in _KILLED:
        name = signal.Signals(ended.code - 128).name
        return JobError(code="rank_lost", message=f"{where} was ended from outside ({name}).", rank=rank)
    if ended.code == EXIT_PEER_LOST:
        return JobError(code="rank_lost", message=f"{where} lost a peer.", rank=rank)
    return bug(f"{where} ended with code {ended.code} and said nothing.", rank=rank)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def bug(message: str, *, rank: int = -1) -> JobError:
    """An internal error; its id is in the message alone, to be quoted, and the logs tell the rest."""
    hint = "The attempt's log files say more. This is an error of the system, not of your data."
    return JobError(code="bug", message=f"{message} Id: {secrets.token_hex(6)}.", hint=hint, rank=rank)
