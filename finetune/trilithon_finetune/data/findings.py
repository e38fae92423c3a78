"""
The findings that a data file can have: their codes, how they are made, collected and written for people.

A collector keeps the first so many by line and counts all, so that a file of nothing but mistakes costs no memory.
"""

from __future__ import annotations

import bisect
import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning"]

CODES: Mapping[str, tuple[Severity, str]] = {
    "E-DATA-001": ("error", "the file has no rows"),
    "E-DATA-002": ("error", "not UTF-8"),
    "E-DATA-003": ("error", "not strict JSON"),
    "E-DATA-004": ("error", "not an object"),
    "E-DATA-005": ("error", "too large to be read"),
    "E-DATA-006": ("error", "several formats in one file"),
    "E-DATA-007": ("error", "unknown key"),
    "E-DATA-008": ("error", "a key is missing, or its value is of another kind"),
    "E-DATA-011": ("error", "no messages"),
    "E-DATA-012": ("error", "unknown role"),
    "E-DATA-013": ("error", "roles out of turn"),
    "E-DATA-014": ("error", "no assistant turn"),
    "E-DATA-015": ("error", "empty content"),
    "E-DATA-016": ("error", "the template renders a turn differently with and without later ones"),
    "E-DATA-021": ("error", "too long"),
    "E-DATA-022": ("error", "nothing to learn"),
    "E-DATA-023": ("error", "the end of a turn is not learned"),
    "E-DATA-024": ("warning", "the end token is untrained"),
    "E-DATA-025": ("warning", "special token text in a content"),
    "E-DATA-031": ("warning", "duplicate rows"),
    "E-DATA-032": ("error", "also in the validation file"),
    "E-DATA-033": ("warning", "suspicious share of a label"),
    "E-DATA-041": ("error", "an answer is not where it is said to be"),
    "E-DATA-042": ("error", "illegal sequence of tags"),
    "E-DATA-051": ("error", "more bad rows than allowed"),
}
"""Every code: how severe it is as a rule, and what it is about."""

MAX_SHOWN_CHARS = 60
"""Of a value that a message shows."""


@dataclass(frozen=True, slots=True)
class Finding:
    """
    One thing that is wrong with a data file.

    Attributes:
        code: `E-DATA-012`.
        file: its name as the user gave it.
        line: from 1; 0 where the whole file is meant.
        path: within the row, `messages[2].role`; empty for the row.
        message: rule, value given, what is allowed.
        hint: what to do; empty where the message says it.
    """

    code: str
    severity: Severity
    file: str
    line: int
    path: str
    message: str
    hint: str = ""


def finding(
    code: str,
    message: str,
    *,
    file: str,
    line: int = 0,
    path: str = "",
    hint: str = "",
    severity: Severity | None = None,
) -> Finding:
    """
    One finding; its severity is the code's, unless it is given.

    >>> line_form(finding("E-DATA-015", "is empty.", file="train.jsonl", line=3, path="text"))
    'E-DATA-015  train.jsonl:3  text: is empty.'
    """
    return Finding(code, severity or CODES[code][0], file, line, path, message, hint)


def line_form(item: Finding) -> str:
    """A finding as people read it: code, place, path, message, hint, on one line."""
    place = f"{item.file}:{item.line}" if item.line else item.file
    path = f"{item.path}: " if item.path else ""
    hint = f" {item.hint}" if item.hint else ""
    return f"{item.code}  {place}  {path}{item.message}{hint}"


def shown(value: Any) -> str:
    """A value in JSON, in ASCII and cut short, for a message."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A closing hint that names the allowed word nearest to `given`, with a space before; empty where none is near."""
    near = difflib.get_close_matches(given[:200], list(allowed), n=1)
    return f' Did you mean "{near[0]}"?' if near else ""


def count_of(number: int, noun: str) -> str:
    """
    A number and its noun.

    >>> count_of(1204, "row"), count_of(1, "error")
    ('1,204 rows', '1 error')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def reason(findings: Iterable[Finding]) -> str:
    """The line of the first error, for a message on why a file is refused; empty where there is none."""
    return next((line_form(item) for item in findings if item.severity == "error"), "")


class LineRanges:
    """
    Rising line numbers as ranges, of which the first few are kept and the rest counted.

    >>> lines = LineRanges()
    >>> for line in (1, 2, 3, 7):
    ...     lines.add(line)
    >>> lines.text()
    'lines 1-3, 7'
    """

    def __init__(self, *, most: int = 6) -> None:
        self._most = most
        self._ranges: list[tuple[int, int]] = []
        self._more = 0

    def __bool__(self) -> bool:
        return bool(self._ranges)

    @property
    def first(self) -> int:
        """The first line."""
        return self._ranges[0][0]

    def add(self, line: int) -> None:
        """Note a line, which is above all that were noted."""
        if self._ranges and not self._more and self._ranges[-1][1] == line - 1:
            self._ranges[-1] = (self._ranges[-1][0], line)
        elif len(self._ranges) < self._most:
            self._ranges.append((line, line))
        else:
            self._more += 1

    def text(self) -> str:
        """The ranges, for a message."""
        text = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in self._ranges)
        one = not self._more and len(self._ranges) == 1 and self._ranges[0][0] == self._ranges[0][1]
        return f"line{'' if one else 's'} {text}" + (f" and {self._more:,} more" if self._more else "")


class Findings:
    """
    The findings of one file. The first `most` by line are kept, errors before warnings; all are counted.

    Args:
        most: how many are kept; 0 for all.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[Severity, list[tuple[int, int, Finding]]] = {"error": [], "warning": []}
        self._added = 0
        self.counts: Counter[str] = Counter()
        """By code."""
        self.by_severity: Counter[Severity] = Counter()
        self.error_codes: set[str] = set()

    def add(self, *items: Finding) -> None:
        """Count findings, and keep those that are among the first."""
        for item in items:
            self.counts[item.code] += 1
            self.by_severity[item.severity] += 1
            if item.severity == "error":
                self.error_codes.add(item.code)
            self._added += 1
            kept = self._kept[item.severity]
            bisect.insort(kept, (item.line, self._added, item))
            if self._most and len(kept) > self._most:
                kept.pop()

    @property
    def first(self) -> tuple[Finding, ...]:
        """By line, and within a line in the order in which they were found; the whole file's own come first."""
        kept = [*self._kept["error"], *self._kept["warning"]]
        return tuple(item for _, _, item in sorted(kept[: self._most] if self._most else kept))
