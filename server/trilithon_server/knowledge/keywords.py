"""
Keywords of a text without a model: runs of words between stop words and signs, by how often their words stand together.

    score(word) = degree / frequency, where the degree adds the length of every run that the word stands in
    score(phrase) = sum of the scores of its words

Source: RAKE (Rose, Engel, Cramer and Cowley 2010).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from trilithon_server.knowledge.word_lists import stop_words

MAX_PHRASES = 3
MAX_WORDS = 3

_WORD_OR_SIGN = re.compile(r"(?P<word>[^\W_]+(?:['-][^\W_]+)*)|[^\s]")


def keywords(text: str, *, most: int = MAX_PHRASES, longest: int = MAX_WORDS) -> list[str]:
    """
    The best phrases of a text in small letters, best first, of equal ones the earlier; none where all is stop words.

    Of a run that is longer than allowed the last words are kept, where English has what a phrase is about. A word is
    letters and digits with apostrophes and hyphens between them; a possessive loses its 's.

    >>> keywords("The little dog barked at the red car, and the little dog ran.")
    ['little dog barked', 'little dog ran', 'red car']

    Args:
        most: phrases at most.
        longest: words of a phrase at most.
    """
    runs = list(_runs(text))
    frequency = Counter(word for run in runs for word in run)
    degree = Counter[str]()
    for run in runs:
        for word in run:
            degree[word] += len(run)
    scores: dict[str, float] = {}
    for run in runs:
        kept = run[-longest:]
        scores.setdefault(" ".join(kept), sum(degree[word] / frequency[word] for word in kept))
    return sorted(scores, key=lambda phrase: -scores[phrase])[:most]


def _runs(text: str) -> Iterator[list[str]]:
    """Words between stop words and signs."""
    run: list[str] = []
    for found in _WORD_OR_SIGN.finditer(text.lower().replace("\u2019", "'")):
        word = found.group("word")
        if word is not None and word not in stop_words():
            run.append(word.removesuffix("'s"))
        elif run:
            yield run
            run = []
    if run:
        yield run
