"""
Preparing: a data file becomes samples on disk, once for every combination of data, tokenizer, template and options.

Runs in a CPU process before any rank starts, so nothing waits for it in a collective.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trilithon_finetune.config import JobConfig
from trilithon_finetune.data.prepared import PreparedFacts
from trilithon_finetune.recipes.base import Context, Recipe


def prepared_key(
    config: JobConfig, recipe: Recipe, context: Context, train_path: Path, validation_path: Path | None
) -> str:
    """SHA-256 (hex) of everything that prepared data depends on: its directory's name."""
    raise NotImplementedError


def prepare(
    config: JobConfig,
    recipe: Recipe,
    context: Context,
    train_path: Path,
    validation_path: Path | None,
    directory: Path,
    *,
    file: str = "",
    on_progress: Callable[[float], None] = lambda share: None,
) -> PreparedFacts:
    """
    Make the prepared data of a job, or find it made.

    Args:
        directory: `StorePaths.prepared(prepared_key(...))`.
        file: the training file's name, as messages give it; by default that of the path.
        on_progress: told the share that is done, from 0 to 1.
    Raises:
        FinetuneError: `invalid_training_file` or `invalid_validation_file`, with the findings.
    """
    raise NotImplementedError
