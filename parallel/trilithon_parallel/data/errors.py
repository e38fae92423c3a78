"""What a user's mistake about training data looks like."""

from __future__ import annotations

from collections.abc import Sequence

MAX_SHOWN = 20
"""Findings that a message lists; the rest are counted."""


class DataError(ValueError):
    """
    A user's mistake about training data: its files, rows, blend or schedules.

    `code` is stable and machine readable, `message` says what, where and the value given, `hint` what to do.
    """

    def __init__(self, message: str, *, code: str = "data_invalid", hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.code = code
        self.message = message
        self.hint = hint


def raise_findings(what: str, findings: Sequence[str], *, total: int, hint: str) -> None:
    """
    Raise one DataError that lists everything that is wrong with an input; return when nothing is.

    Args:
        what: begins the message, e.g. `"the input"`.
        findings: the first findings, each a sentence with file and line.
        total: how many there are altogether.
        hint: what to do.
    Raises:
        DataError: `data_rows`, with at most `MAX_SHOWN` findings and the number of the others.
    """
    if not total:
        return
    shown = list(findings[:MAX_SHOWN])
    if total > len(shown):
        shown.append(f"... and {total - len(shown)} more.")
    noun = "finding" if total == 1 else "findings"
    raise DataError("\n  ".join([f"{what} has {total} {noun}:", *shown]) + "\n", code="data_rows", hint=hint)
