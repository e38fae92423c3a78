"""What the command prints: results on stdout, progress and errors on stderr, and the exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from trilithon.errors import (
    ConnectionFailed,
    DataLoss,
    DeadlineExceeded,
    Internal,
    Overloaded,
    ProtocolError,
    RateLimited,
    TrilithonError,
    Unavailable,
)

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_INVALID_DATA = 3
EXIT_JOB_FAILED = 4
EXIT_UNREACHABLE = 5
EXIT_ENGINE_LOST = 6
EXIT_CHECK_FAILED = 7
EXIT_INTERRUPTED = 130

_DATA_CODES = ("invalid_training_file", "invalid_validation_file")
_UNREACHABLE = (ConnectionFailed, Unavailable, Overloaded, RateLimited, DeadlineExceeded)


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Add `-o text|json`."""
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="how to print [text]")


def exit_code(error: BaseException) -> int:
    """The exit code that an error means."""
    if isinstance(error, TrilithonError) and error.code == "engine_lost":
        return EXIT_ENGINE_LOST
    if isinstance(error, _UNREACHABLE):
        return EXIT_UNREACHABLE
    if isinstance(error, DataLoss) or getattr(error, "code", "") in _DATA_CODES:
        return EXIT_INVALID_DATA
    if isinstance(error, Internal | ProtocolError):
        return EXIT_BUG
    return EXIT_USAGE


_PREFIX = "trilithon:"


def explain(error: Exception, code: int | None = None, *, as_json: bool = False) -> int:
    """Print an error for its reader; returns the exit code."""
    if as_json:
        described = {"message": str(error)}
        if isinstance(error, TrilithonError):
            described |= {"type": type(error).__name__, "code": error.code, "request_id": error.request_id}
        print(json.dumps({"error": described}), file=sys.stderr)
    else:
        lines = str(error).split("\n")
        if isinstance(error, TrilithonError):
            lines += [violation.message for violation in error.details[1:]]
            if error.request_id and not isinstance(error, ConnectionFailed):
                lines.append(f"(request {error.request_id})")
        for i, line in enumerate(lines):
            print(" " * len(_PREFIX) if i else _PREFIX, printable(line), file=sys.stderr)
    return exit_code(error) if code is None else code


def printable(text: str) -> str:
    r"""
    Text of others, safe for a terminal line.

    >>> printable("red \x1b[31m")
    'red \\x1b[31m'
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def print_json(value: Any) -> None:
    """A result as one JSON document."""
    json.dump(plain(value), sys.stdout, indent=2, ensure_ascii=False)
    print(flush=True)


def plain(value: Any) -> Any:
    """Results as JSON values: what a newer server added stands among the known fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        known = {
            field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.name not in ("extra", "top") or (field.name == "top" and getattr(value, "top"))  # noqa: B009
        }
        return {**known, **getattr(value, "extra", {})}
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns wide enough for their content; numbers to the right."""
    texts = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *texts, strict=True)]
    numeric = [all(isinstance(cell, int | float) for cell in column) for column in zip(*rows, strict=True)]
    numeric = numeric or [False] * len(headings)
    for line in ([*headings], *texts):
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        print("  ".join(cells).rstrip())


def human_bytes(count: int) -> str:
    """
    A size for people.

    >>> human_bytes(538_000_000)
    '513.1 MiB'
    """
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.1f} {unit}" if unit != "B" else f"{count} B"


class Progress:
    """
    Progress on stderr: a bar on a terminal, elsewhere one plain line every few seconds.

    Args:
        what: what is being done.
        total: of how many; None when that is not known.
    """

    EVERY_S = 5.0

    def __init__(self, what: str, *, total: int | None) -> None:
        self._what = what
        self._total = total
        self._last_s = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(what, total=total)
            self._bar.start()

    def update(self, done: int, *, what: str | None = None, total: int | None = None, in_bytes: bool = False) -> None:
        """So much is done by now; `what` and `total` may change on the way."""
        new = what is not None and what != self._what
        self._what = what or self._what
        self._total = total if new or total is not None else self._total
        if self._bar is not None:
            self._bar.update(self._task, description=self._what, total=self._total, completed=done)
        elif new or time.monotonic() - self._last_s >= self.EVERY_S:
            self._last_s = time.monotonic()
            shown = human_bytes if in_bytes else str
            of = f" of {shown(self._total)}" if self._total is not None else ""
            print(f"{self._what}: {shown(done)}{of}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
