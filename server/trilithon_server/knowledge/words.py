"""
Words of a text: those that BM25 counts, those in which an answer is looked for, and pieces of so many words.

Two ways of cutting words stand side by side because the field has two: published BM25 numbers count runs of word
characters, published answer matching also counts every other sign and leaves accents on their letters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

PASSAGE_WORDS = 100
"""Words of a passage (Karpukhin et al. 2020, section 4.1)."""

_WORD = re.compile(r"\w+")
_RUN_OR_SIGN = re.compile(r"[^\W_]+|\S")
_VISIBLE = re.compile(r"\S+")


def search_words(text: str) -> list[str]:
    """
    Runs of word characters of the lowered text in canonical decomposition: what BM25 counts.

    An accent is no word character, so it cuts its word in two; query and passage are cut alike.

    >>> search_words("The U.S. won 3-2")
    ['the', 'u', 's', 'won', '3', '2']
    """
    return _WORD.findall(unicodedata.normalize("NFD", text).lower())


def answer_words(text: str) -> list[str]:
    """
    Lowered runs of letters, digits and their accents, and every other visible sign on its own.

    >>> answer_words("The U.S. won 3-2")
    ['the', 'u', '.', 's', '.', 'won', '3', '-', '2']

    Source: the answer matching of DPR (Karpukhin et al. 2020), in canonical decomposition.
    """
    words: list[str] = []
    joins = -1  # where the run of letters before ends; what begins there continues it
    for found in _RUN_OR_SIGN.finditer(unicodedata.normalize("NFD", text)):
        part = found.group()
        category = unicodedata.category(part[0])
        if category[0] in "ZC":
            continue
        is_run = part[0].isalnum() or category[0] == "M"
        if is_run and joins == found.start():
            words[-1] += part.lower()
        else:
            words.append(part.lower())
        joins = found.end() if is_run else -1
    return words


def contains(words: Sequence[str], part: Sequence[str]) -> bool:
    """
    Whether `part` stands in `words`, in one stretch; an empty part stands nowhere.

    >>> contains(["in", "new", "york"], ["new", "york"]), contains(["new", "old", "york"], ["new", "york"])
    (True, False)
    """
    size = len(part)
    return size > 0 and any(
        words[i] == part[0] and list(words[i : i + size]) == list(part) for i in range(len(words) - size + 1)
    )


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a text: characters [start, end) of it."""

    text: str
    start: int
    end: int


def chunks(text: str, words: int = PASSAGE_WORDS, *, most: int | None = None) -> list[Chunk]:
    """
    Cut a text into pieces of so many words, the last of a paragraph shorter; none of a blank text.

    Words are what stands between spaces. An empty line ends a paragraph, a single line end does not: texts are
    wrapped at some width as often as not.

    >>> [piece.text for piece in chunks("a b  c d\\n\\ne", words=3)]
    ['a b  c', 'd', 'e']

    Args:
        words: of a piece, at least 1.
        most: pieces; what is behind them is not looked at. None: all.
    """
    assert words >= 1
    return list(islice(_pieces(text, words), most))


def _pieces(text: str, words: int) -> Iterator[Chunk]:
    start = end = held = 0
    for word in _VISIBLE.finditer(text):
        if held == words or (held and text.count("\n", end, word.start()) > 1):
            yield Chunk(text[start:end], start, end)
            held = 0
        if not held:
            start = word.start()
        end = word.end()
        held += 1
    if held:
        yield Chunk(text[start:end], start, end)
