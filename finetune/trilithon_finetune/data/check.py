"""A data file judged whole, before anything is queued: every finding, and the numbers that a job is planned with."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from trilithon_finetune.data.duplicates import RowKeys
from trilithon_finetune.data.findings import Finding, finding
from trilithon_finetune.data.judging import Judge, Judged, allowed_rows, too_many_bad_rows, with_labels
from trilithon_finetune.data.packing import efficiency, pack_shuffled
from trilithon_finetune.data.reading import LIMITS, Limits, OnBytes
from trilithon_finetune.data.report import Example, Report, example_of, lengths_of
from trilithon_finetune.recipes.base import Context, Recipe
from trilithon_finetune.recipes.chat import MESSAGES
from trilithon_finetune.recipes.preference import PREFERENCE
from trilithon_server.text.template import template_digest

MAX_FINDINGS = 1000
"""Findings that a report keeps unless told otherwise; all are counted."""

NUM_EXAMPLES = 3

SUSPICIOUS_SHARE = 0.99
"""A label with this share of the rows teaches to say nothing else."""

FEWEST_LABELLED = 20
"""Rows below which a share means nothing."""

_CHATS = (MESSAGES, PREFERENCE)  # formats that go through the template

_PACKING_WINDOW = 1024  # samples that are packed together for the estimate


def check_file(
    path: Path,
    *,
    recipe: Recipe,
    context: Context,
    file: str = "",
    validation: Path | None = None,
    validation_file: str = "",
    bad_rows_allowed: float = 0,
    max_findings: int = MAX_FINDINGS,
    limits: Limits = LIMITS,
    on_bytes: OnBytes | None = None,
) -> Report:
    """
    Check a data file.

    Args:
        context: with `labels` those are held (a validation file); without, they are the file's own.
        file, validation_file: names for messages; by default those of the paths.
        validation: a file that must not share rows with this one. It is not checked itself.
        bad_rows_allowed: rows with errors that may be left out: a number, or a share where it is below 1.
        max_findings: that the report keeps; 0 for all.
    Raises:
        OSError: a file cannot be read.
        FinetuneError: `invalid_config`, the task does not fit the model.
    """
    file = file or path.name
    context = with_labels(context, recipe, path, file=file, limits=limits)
    judge = Judge(recipe, context, file=file, most=max_findings, limits=limits, on_bytes=on_bytes)
    keys, lengths, labels = RowKeys(), array("q"), Counter[int]()
    supervised = 0
    examples: list[Example] = []
    for judged in judge.rows_of(path):
        keys.add(judged.row, judged.key)
        lengths.extend(len(sample.tokens) for sample in judged.samples)
        supervised += sum(sample.num_supervised for sample in judged.samples)
        labels.update(_labels(judged))
        if len(examples) < NUM_EXAMPLES:
            causal = context.model.is_causal
            examples += [example_of(sample, context.tokenizer, causal=causal) for sample in judged.samples]
    judge.findings.add(*keys.repeated(file=file))
    shared: list[Finding] = []
    if validation is not None:
        theirs = validation_file or validation.name
        shared = list(keys.shared(validation, recipe, file=file, validation_file=theirs, limits=limits))
        judge.findings.add(*shared)
    shared_too_much = any(item.severity == "error" for item in shared)
    for extra in (
        _suspicious(labels, context, file),
        too_many_bad_rows(judge, bad_rows_allowed, file=file),
        _nothing(judge, lengths, file),
    ):
        judge.findings.add(*([extra] if extra else []))
    few_enough = judge.bad_rows <= allowed_rows(bad_rows_allowed, judge.num_rows)
    capacity = max(context.max_tokens, max(lengths, default=1))
    bins = pack_shuffled(lengths, capacity, window=_PACKING_WINDOW, seed=0)
    template = context.template if judge.format in _CHATS else None
    return Report(
        file=file,
        task=recipe.task,
        ok=judge.whole and few_enough and len(lengths) > 0 and not shared_too_much,
        rows=judge.num_rows,
        usable_rows=judge.usable_rows,
        bad_rows=judge.bad_rows,
        dropped_rows=judge.dropped,
        truncated_rows=judge.truncated,
        errors=judge.findings.by_severity["error"],
        error_kinds=len(judge.findings.error_codes),
        warnings=judge.findings.by_severity["warning"],
        counts=dict(sorted(judge.findings.counts.items())),
        findings=judge.findings.first,
        format=judge.format,
        labels=context.labels,
        samples=len(lengths),
        tokens=sum(lengths),
        supervised_tokens=supervised,
        max_tokens=context.max_tokens,
        lengths=lengths_of(lengths),
        packing_efficiency=efficiency(lengths, bins, capacity),
        template_digest=template_digest(template, context.tokenizer) if template is not None else "",
        data_digest=file_digest(path),
        examples=tuple(examples[:NUM_EXAMPLES]),
        sample_lengths=lengths,
    )


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _labels(judged: Judged) -> list[int]:
    return [sample.columns["label"] for sample in judged.samples[:1] if "label" in sample.columns]


def _nothing(judge: Judge, lengths: Sequence[int], file: str) -> Finding | None:
    """Rows that all make no sample, so that there is nothing to count or to judge by."""
    if len(lengths) or not judge.usable_rows:
        return None
    return finding("E-DATA-022", "no row of it makes a sample.", file=file, hint="Look at the rows' texts.")


def _suspicious(labels: Counter[int], context: Context, file: str) -> Finding | None:
    total = labels.total()
    if total < FEWEST_LABELLED or len(context.labels) < 2:
        return None
    label, count = min(labels.items(), key=lambda item: (-item[1], item[0]))
    if count < SUSPICIOUS_SHARE * total:
        return None
    message = f'{count / total:.1%} of the rows have the label "{context.labels[label]}": little else will be learned.'
    return finding("E-DATA-033", message, file=file, hint="Add rows of the other labels, or remove some of these.")
