"""
A data file through a recipe: each row read, judged and made into samples, while what is wrong is collected.

Checking and preparing both go this way, so that what a report says is what training gets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trilithon_finetune.data.findings import Finding, Findings, LineRanges, count_of, finding
from trilithon_finetune.data.reading import LIMITS, Limits, OnBytes, Row, read_rows
from trilithon_finetune.recipes.base import Context, Recipe, Sample

_ONCE = ("E-DATA-024",)  # what is true of every row is said of the first


@dataclass(frozen=True, slots=True)
class Judged:
    """A usable row and its samples; none where it was not to be encoded, or was dropped. `key` is its `row_key`."""

    row: Row
    key: int
    samples: tuple[Sample, ...]


class Judge:
    """
    Reads one file; what it counted is told when `rows_of` has ended.

    Args:
        file: the file's name for messages.
        most: findings that are kept; 0 for all.
        keep: by `row_key`, which rows are encoded; None for all.
    """

    def __init__(
        self,
        recipe: Recipe,
        context: Context,
        *,
        file: str,
        most: int,
        limits: Limits = LIMITS,
        keep: Callable[[int], bool] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> None:
        self._recipe, self._context, self._file = recipe, context, file
        self._limits, self._keep, self._on_bytes = limits, keep, on_bytes
        self._formats: dict[str, LineRanges] = {}
        self.findings = Findings(most)
        self.format = ""
        """The rows' format, that of the first which has one."""
        self.num_rows, self.bad_rows, self.dropped, self.truncated = 0, 0, 0, 0
        self.whole = True
        """False where the file could not be read to its end."""

    @property
    def usable_rows(self) -> int:
        """Rows that training gets, shortened ones included."""
        return self.num_rows - self.bad_rows - self.dropped

    def rows_of(self, path: Path) -> Iterator[Judged]:
        """The usable rows of the file, in order."""
        for item in read_rows(path, recipe=self._recipe, file=self._file, limits=self._limits, on_bytes=self._on_bytes):
            if isinstance(item, Finding):
                self.findings.add(item)
                self.whole = self.whole and bool(item.line)
                self.num_rows += bool(item.line)
                self.bad_rows += bool(item.line)
                continue
            self.num_rows += 1
            judged = self._judge(item)
            if judged is not None:
                yield judged
        if len(self._formats) > 1:
            self._say_mixed()

    def _judge(self, row: Row) -> Judged | None:
        found = self._recipe.detect(row.value)
        if found is not None:
            self._formats.setdefault(found, LineRanges()).add(row.line)
            self.format = self.format or found
        if found is not None and found != self.format:
            self.bad_rows += 1
            return None
        held = self.format or self._recipe.formats[0]
        wrong = self._recipe.check(row.value, held, file=self._file, line=row.line)
        samples: list[Sample] = []
        key = row_key(row.value)
        if not _errors(wrong) and (self._keep is None or self._keep(key)):
            for item in self._recipe.encode(row.value, row.line, self._context, file=self._file):
                if isinstance(item, Sample):
                    samples.append(item)
                else:
                    wrong = [*wrong, item]
        if self._context.on_long == "drop" and any(item.code == "E-DATA-021" for item in wrong):
            self.dropped += 1
            return None
        self.findings.add(*(item for item in wrong if item.code not in _ONCE or not self.findings.counts[item.code]))
        if _errors(wrong):
            self.bad_rows += 1
            return None
        self.truncated += any(sample.cut for sample in samples)
        return Judged(row, key, tuple(samples))

    def _say_mixed(self) -> None:
        parts = [f"{name} in {ranges.text()}" for name, ranges in self._formats.items()]
        deviating = next(ranges for name, ranges in self._formats.items() if name != self.format)
        self.findings.add(
            finding(
                "E-DATA-006",
                f"has rows of several formats: {'; '.join(parts)}.",
                file=self._file,
                line=deviating.first,
                hint=f"Keep to one; the first row's is {self.format}.",
            )
        )


def _errors(items: Sequence[Finding]) -> bool:
    return any(item.severity == "error" for item in items)


def row_key(value: Mapping[str, Any]) -> int:
    """64 bits that tell rows apart by their content, whatever the order of their keys and the spaces between."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def with_labels(context: Context, recipe: Recipe, path: Path, *, file: str, limits: Limits = LIMITS) -> Context:
    """The context with the labels of a training file, where it has none yet."""

    def rows() -> Iterator[Mapping[str, Any]]:
        for item in read_rows(path, recipe=recipe, file=file, limits=limits):
            if isinstance(item, Row):
                form = recipe.detect(item.value)
                if form is not None and not _errors(recipe.check(item.value, form, file=file, line=item.line)):
                    yield item.value

    return context if context.labels else replace(context, labels=recipe.labels(rows(), context.options))


def allowed_rows(bad_rows_allowed: float, num_rows: int) -> int:
    """
    How many bad rows may be left out.

    >>> allowed_rows(0.01, 1000), allowed_rows(5, 1000)
    (10, 5)

    Args:
        bad_rows_allowed: a number, or a share of all rows where it is below 1.
    """
    return int(bad_rows_allowed * num_rows) if bad_rows_allowed < 1 else int(bad_rows_allowed)


def too_many_bad_rows(judge: Judge, bad_rows_allowed: float, *, file: str) -> Finding | None:
    """E-DATA-051 where some bad rows are allowed, and there are more."""
    most = allowed_rows(bad_rows_allowed, judge.num_rows)
    if not bad_rows_allowed or judge.bad_rows <= most:
        return None
    message = f"has {count_of(judge.bad_rows, 'bad row')}, at most {most:,} allowed (data.bad_rows_allowed)."
    return finding("E-DATA-051", message, file=file, hint="Repair them, or allow more.")
