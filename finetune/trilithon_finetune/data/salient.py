"""
Salient spans of a sentence: names, numbers and dates, which nobody guesses without knowing something (Guu et al. 2020).

Where nothing says where they are, they are told by their looks: runs of words that begin with a capital letter, and
words with a digit. A sentence's first word is capital whatever it is, so alone it counts only where it has a digit or
another capital. Another finder (a tagger of entities) is another function of the same kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Span = tuple[int, int]
"""Half-open range of characters."""

Finder = Callable[[str], list[Span]]
"""Finds the salient spans of a sentence, in order, none within another."""

_WORD = re.compile(r"[^\W_]+(?:[.,'\u2019-][^\W_]+)*")
_LINKS = frozenset({" ", ", ", " of ", " of the "})
"""What may stand between two words of one name; a comma only before a number, as in a date."""


def salient_spans(sentence: str) -> list[Span]:
    """
    By capitals and digits.

    >>> text = "In May 1921 Ada Noor met the mason, who had 12 sacks."
    >>> [text[start:end] for start, end in salient_spans(text)]
    ['May 1921 Ada Noor', '12']
    """
    spans: list[Span] = []
    for number, match in enumerate(_WORD.finditer(sentence)):
        word, is_first = match[0], number == 0
        has_digit = any(char.isdigit() for char in word)
        capitals = sum(char.isupper() for char in word)
        if not has_digit and not (word[0].isupper() and (not is_first or capitals > 1)):
            continue
        if spans:
            link = sentence[spans[-1][1] : match.start()]
            if link in _LINKS and (link != ", " or has_digit):
                spans[-1] = (spans[-1][0], match.end())
                continue
        spans.append((match.start(), match.end()))
    return spans
