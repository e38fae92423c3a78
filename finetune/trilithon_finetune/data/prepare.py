"""
Preparing: a data file becomes samples on disk, once for every combination of data, tokenizer, template and options.

Runs in a CPU process before any rank starts, so nothing waits for it in a collective.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trilithon_finetune.config import JobConfig
from trilithon_finetune.data.check import file_digest
from trilithon_finetune.data.findings import line_form, reason
from trilithon_finetune.data.judging import Judge, allowed_rows, with_labels
from trilithon_finetune.data.prepared import FORMAT, PreparedFacts, open_prepared, write_prepared
from trilithon_finetune.errors import FinetuneError, JobError, refuse
from trilithon_finetune.recipes.base import Context, Recipe, Sample
from trilithon_server.text.template import template_digest

SAMPLES_VERSION = 2
"""Raised when the same rows give other samples than before."""

_KEPT_FINDINGS = 100


def prepared_key(
    config: JobConfig, recipe: Recipe, context: Context, train_path: Path, validation_path: Path | None
) -> str:
    """SHA-256 (hex) of everything that prepared data depends on: its directory's name."""
    return _digest(_made_from(config, recipe, context, train_path, validation_path))


def prepare(
    config: JobConfig,
    recipe: Recipe,
    context: Context,
    train_path: Path,
    validation_path: Path | None,
    directory: Path,
    *,
    file: str = "",
    validation_file: str = "",
    on_progress: Callable[[float], None] = lambda share: None,
) -> PreparedFacts:
    """
    Make the prepared data of a job, or find it made.

    Args:
        directory: `StorePaths.prepared(prepared_key(...))`.
        file, validation_file: the files' names, as messages give them; by default those of the paths.
        on_progress: told the share that is done, from 0 to 1.
    Raises:
        FinetuneError: `invalid_training_file` or `invalid_validation_file`, with the findings.
    """
    made_from = _made_from(config, recipe, context, train_path, validation_path)
    if directory.is_dir():
        facts = open_prepared(directory, verify=True).facts
        on_progress(1.0)
        return facts
    file = file or train_path.name
    context = with_labels(context, recipe, train_path, file=file)
    known: dict[str, Any] = {
        "digest": _digest(made_from),
        "task": recipe.task,
        "labels": context.labels,
        "unit": recipe.unit(context.options),
        "made_from": made_from,
    }
    share = config.data.validation_share if validation_path is None else 0.0
    progress = _Progress(on_progress, [train_path, validation_path or (train_path if share else None)])

    def train() -> Iterator[Sample]:
        judge = Judge(
            recipe,
            context,
            file=file,
            most=_KEPT_FINDINGS,
            keep=lambda key: not _held_out(key, share),
            on_bytes=progress.part(0),
        )
        count = yield from _samples(judge, train_path)
        _refuse_bad(judge, config, "invalid_training_file", file)
        if not count:
            raise _holds_out("every", judge, share)
        known.update(rows=judge.num_rows, bad_rows=judge.bad_rows, dropped=judge.dropped, truncated=judge.truncated)

    def valid() -> Iterator[Sample]:
        path = validation_path or train_path
        if validation_path is None and not share:
            return
        name = (validation_file or path.name) if validation_path is not None else file
        judge = Judge(
            recipe,
            replace(context, validating=True),
            file=name,
            most=_KEPT_FINDINGS,
            keep=None if validation_path is not None else lambda key: _held_out(key, share),
            on_bytes=progress.part(1),
        )
        count = yield from _samples(judge, path)
        if validation_path is not None:
            _refuse_bad(judge, config, "invalid_validation_file", name)
        elif not count:
            raise _holds_out("no", judge, share)

    written = write_prepared(directory, train(), valid(), facts=known)
    on_progress(1.0)
    return written


def _made_from(
    config: JobConfig, recipe: Recipe, context: Context, train_path: Path, validation_path: Path | None
) -> dict[str, Any]:
    template, retriever = context.template, context.retriever
    beside = {} if retriever is None else {"tokenizer": retriever.tokenizer.digest, **retriever.format.task_file()}
    return {
        "format": FORMAT,
        "samples_version": SAMPLES_VERSION,
        "task": recipe.task,
        "options": context.options.model_dump(mode="json"),
        "train": file_digest(train_path),
        "valid": "" if validation_path is None else file_digest(validation_path),
        "tokenizer": context.tokenizer.digest,
        "ends": list(context.tokenizer.eos_ids),
        "template": "" if template is None else template_digest(template, context.tokenizer),
        "labels": list(context.labels),
        "labelled_by": context.labelled_by,
        "max_tokens": context.max_tokens,
        "on_long": context.on_long,
        "train_on": context.train_on,
        "bad_rows_allowed": config.data.bad_rows_allowed,
        "validation_share": config.data.validation_share if validation_path is None else 0.0,
        **({"retriever": beside} if beside else {}),
    }


def _digest(made_from: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _samples(judge: Judge, path: Path) -> Generator[Sample, None, int]:
    """The samples of a file; returns how many there were."""
    count = 0
    for judged in judge.rows_of(path):
        count += len(judged.samples)
        yield from judged.samples
    return count


def _holds_out(what: str, judge: Judge, share: float) -> FinetuneError:
    return refuse(
        "invalid_config",
        f"data.validation_share {share} holds out {what} row of {judge.usable_rows:,}.",
        param="data.validation_share",
        hint="Set another share, or give a validation file.",
    )


def _held_out(key: int, share: float) -> bool:
    """Whether a row is held out for validation: by its content, so that copies stay together and no order matters."""
    return key < share * 2**64


def _refuse_bad(judge: Judge, config: JobConfig, code: str, file: str) -> None:
    few_enough = judge.bad_rows <= allowed_rows(config.data.bad_rows_allowed, judge.num_rows)
    if judge.whole and few_enough and judge.usable_rows:
        return
    lines = tuple(line_form(item) for item in judge.findings.first)
    first = reason(judge.findings.first) or f"{file}: no row is usable."
    param = "training_file" if code == "invalid_training_file" else "validation_file"
    raise FinetuneError(JobError(code=code, message=first, param=param), findings=lines)


class _Progress:
    """The share of all bytes that were read."""

    def __init__(self, tell: Callable[[float], None], paths: list[Path | None]) -> None:
        self._tell = tell
        self._sizes = [path.stat().st_size if path is not None else 0 for path in paths]

    def part(self, number: int) -> Callable[[int], None]:
        """What is told how far one of the files was read."""
        before, total = sum(self._sizes[:number]), max(1, sum(self._sizes))
        return lambda position: self._tell((before + position) / total)
