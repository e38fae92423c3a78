"""
What a running phase says, line by line, and what becomes of it: events, rows of checkpoints, numbers of progress.

A phase appends one JSON object a line to `events.jsonl` of its attempt. How far the table has read is a column of the
job, written in the transaction that stores the events: each line counts exactly once, whoever reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from trilithon_finetune.jobs.moves import NewEvent
from trilithon_finetune.jobs.queue import NewCheckpoint
from trilithon_finetune.jobs.records import Level, Progress

PHASE_KINDS = frozenset(
    {
        "prepare_progress",
        "gang_started",
        "weights_loaded",
        "worst_batch_ok",
        "running",
        "step",
        "eval",
        "checkpoint_started",
        "checkpoint_saved",
        "checkpoint_deleted",
        "warning",
        "early_stopped",
    }
)
"""Kinds that phases write, stored as they come."""

MOVE_KINDS = frozenset({"validated", "prepared", "export_started", "exported", "verify_started", "verified"})
"""Kinds that tell of a move: a phase's words for it are kept until the worker makes the move."""

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class News:
    """What a piece of the file says. `offset` is where the next piece begins; `running`: the first step is near."""

    events: tuple[NewEvent, ...]
    saved: tuple[NewCheckpoint, ...]
    progress: Progress
    running: bool
    offset: int


@dataclass(slots=True)
class Tail:
    """A reader of `path` from `offset` on, who counts along."""

    path: Path
    offset: int
    progress: Progress

    def read(self) -> News | None:
        """The next whole lines; None when there are none. `accept` makes the next call go on behind them."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                piece = file.read(_READ_BYTES)
        except FileNotFoundError:
            return None
        end = piece.rfind(b"\n") + 1
        if not end and len(piece) == _READ_BYTES:
            end = len(piece)  # no line is so long: it is told as unreadable, piece by piece
        if not end:
            return None
        events, saved, progress = [], [], self.progress
        for line in piece[:end].splitlines():
            event = _event(line)
            events.append(event)
            progress = _advance(progress, event)
            saved += _checkpoints(event)
        running = any(event.kind in ("running", "step") for event in events)
        return News(tuple(events), tuple(saved), progress, running, self.offset + end)

    def accept(self, news: News) -> None:
        """The news are in the table."""
        self.offset, self.progress = news.offset, news.progress


def _advance(progress: Progress, event: NewEvent) -> Progress:
    data = event.data
    if event.kind == "prepare_progress":
        return replace(progress, prepare_fraction=_number(data, "fraction", progress.prepare_fraction))
    if event.kind == "running":
        return replace(progress, total_steps=int(_number(data, "total_steps", progress.total_steps)))
    if event.kind != "step":
        return progress
    step = int(_number(data, "step", progress.step))
    total = int(_number(data, "total_steps", progress.total_steps))
    remaining = data.get("seconds_remaining")
    return replace(
        progress,
        step=step,
        total_steps=total,
        epoch=_number(data, "epoch", progress.epoch),
        fraction=min(1.0, _number(data, "fraction", step / total if total else 0.0)),
        seconds_remaining=remaining if isinstance(remaining, int) else None,
        trained_tokens=int(_number(data, "trained_tokens", progress.trained_tokens)),
        supervised_tokens=int(_number(data, "supervised_tokens", progress.supervised_tokens)),
        tokens_per_second=_number(data, "tokens_per_second", 0.0),
    )


def _event(line: bytes) -> NewEvent:
    try:
        found = json.loads(line, parse_constant=lambda name: None)  # what is not finite is not known
        kind, message, level = found["kind"], found["message"], found.get("level", "info")
        data = found.get("data") or {}
        if not (isinstance(message, str) and isinstance(data, dict) and level in get_args(Level)):
            raise ValueError("a field of another kind")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        message = f"A phase wrote {len(line)} bytes that are no event."
        return NewEvent(kind="warning", level="warn", message=message)
    if kind not in PHASE_KINDS | MOVE_KINDS:
        message = f"A phase wrote an event of kind {str(kind)[:32]!r}, which is not its to write: {message}"
        return NewEvent(kind="warning", level="warn", message=message, data=data)
    step = data.get("step") if kind == "step" else None
    return NewEvent(kind=kind, level=level, message=message, data=data, step=step if isinstance(step, int) else None)


def _checkpoints(event: NewEvent) -> list[NewCheckpoint]:
    step = event.data.get("step")
    if event.kind not in ("checkpoint_saved", "checkpoint_deleted") or not isinstance(step, int):
        return []
    if event.kind == "checkpoint_deleted":
        return [NewCheckpoint(step=step, servable=False)]
    metrics = event.data.get("metrics")
    given = metrics if isinstance(metrics, dict) else {}
    numbers = {str(name): _number(given, name, 0.0) for name, value in given.items() if isinstance(value, int | float)}
    size = int(_number(event.data, "bytes", 0))
    return [NewCheckpoint(step=step, digest=str(event.data.get("digest", "")), bytes=size, metrics=numbers)]


def _number(data: Mapping[str, Any], name: str, default: float) -> float:
    value = data.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default
