"""Lists of words that the package brings along: one entry a line, sorted, UTF-8."""

from __future__ import annotations

from functools import cache
from importlib import resources


@cache
def lines_of(name: str) -> tuple[str, ...]:
    """The lines of a file of this package."""
    return tuple(resources.files(__package__).joinpath(name).read_text("utf-8").splitlines())


@cache
def stop_words() -> frozenset[str]:
    """Words that say how others relate and little by themselves, with what `\\w+` leaves of their short forms."""
    return frozenset(lines_of("stop_words.txt"))
