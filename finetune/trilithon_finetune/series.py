"""
The numbers of a run under the names that users see: OpenAI's where it has one. No torch.

The trainer's record (`metrics.jsonl`) keeps the core's own names; whatever shows it goes through here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OPENAI_COLUMNS = (
    "step",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)
"""First in every table and in this order; what is not measured stays empty."""

VALID_ACCURACY = "valid_mean_token_accuracy"

_NAMES = {
    "loss": "train_loss",
    "token_accuracy": "train_mean_token_accuracy",
    "learning_rate": "lr",
    "tokens_per_s": "tokens_per_second",
    "step_s": "step_seconds",
    "peak_bytes": "memory_bytes",
    "validation_loss": "valid_loss",
}


def series_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """
    One line of the trainer's record, renamed, without what was not measured or is not finite.

    >>> series_row({"step": 2, "loss": 0.5, "mfu": None, "validation_loss": 0.6, "validation": {"f1": 0.9}})
    {'step': 2, 'train_loss': 0.5, 'valid_loss': 0.6, 'f1': 0.9, 'full_valid_loss': 0.6}
    """
    flat = {_NAMES.get(name, name): value for name, value in row.items() if name != "validation"}
    flat = with_full(flat | (row.get("validation") or {}))
    return {name: value for name, value in flat.items() if isinstance(value, int | float) and math.isfinite(value)}


def with_full(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """
    With OpenAI's names of a whole validation beside those of a part: every evaluation here reads all rows.

    >>> with_full({"valid_loss": 0.6})
    {'valid_loss': 0.6, 'full_valid_loss': 0.6}
    """
    whole = {f"full_{name}": numbers[name] for name in ("valid_loss", VALID_ACCURACY) if name in numbers}
    return {**numbers, **whole}


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """
    The columns of a table: OpenAI's first, then the others by name.

    >>> columns_of([{"step": 1, "lr": 0.1}, {"f1": 0.5}])[-2:]
    ['f1', 'lr']
    """
    return [*OPENAI_COLUMNS, *sorted(_names(rows) - set(OPENAI_COLUMNS))]


def _names(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    return {name for row in rows for name in row}
