"""
Base forms of English words by rule: what a word may be listed under.

Without a dictionary nobody knows that "evening" is none of "even", so what is given are candidates, in the order in
which to try them, and a list of known words decides:

    1. the word itself
    2. the base form of an irregular one (`irregular_forms.txt`: went -> go, children -> child)
    3. -'s -> nothing
    4. -ies -> -y, -ie, -sses, -shes, -ches, -xes, -zes -> without -es, -s -> nothing (but not -ss, -us, -is)
    5. -ied -> -y, -ie, -ed -> -e, nothing, and one letter less where it is doubled (hoped, walked, stopped)
    6. -ing -> the same three (hoping, walking, stopping)

What is left has at least three letters.

Source: the detachment rules of WordNet's morphy, without those for adjectives.
"""

from __future__ import annotations

import re
from collections.abc import Container
from functools import cache

from trilithon_server.knowledge.word_lists import lines_of

MIN_LETTERS = 3

_SPACES = re.compile(r"[\s_]+")
_ARTICLE = re.compile(r"(?:a|an|the) (?=\S)")


def normalised(phrase: str) -> str:
    """
    How concepts are compared: small letters, single spaces (`_` is one), no leading article.

    >>> normalised("The  Eiffel_Tower")
    'eiffel tower'
    """
    return _ARTICLE.sub("", _SPACES.sub(" ", phrase).strip().lower().replace("\u2019", "'"), count=1)


def base_forms(word: str) -> tuple[str, ...]:
    """
    A word in small letters, then what it may be a form of, likeliest first.

    >>> base_forms("stopped")
    ('stopped', 'stoppe', 'stopp', 'stop')
    """
    found = [word, *_irregular().get(word, ())]
    if word.endswith("'s"):
        found += base_forms(word[:-2])
    elif word.endswith("ies"):
        found += [f"{word[:-3]}y", word[:-1]]
    elif word.endswith(("sses", "shes", "ches", "xes", "zes")):
        found += [word[:-2], word[:-1]]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        found.append(word[:-1])
    elif word.endswith("ied"):
        found += [f"{word[:-3]}y", word[:-1]]
    elif word.endswith("ed"):
        found += _stems(word[:-2])
    elif word.endswith("ing"):
        found += _stems(word[:-3])
    kept = (form for form in found if form == word or len(form) >= MIN_LETTERS or form in _irregular().get(word, ()))
    return tuple(dict.fromkeys(kept))


def known_forms(word: str, known: Container[str]) -> tuple[str, ...]:
    """The base forms that are known, in order; none where none is."""
    return tuple(form for form in base_forms(word) if form in known)


def is_plural(word: str) -> bool:
    """
    Whether a word looks like several things: an irregular plural, or an -s that a rule takes off.

    >>> [is_plural(word) for word in ("dogs", "children", "glass", "dog")]
    [True, True, False, False]
    """
    if word in _PLURALS:
        return True
    return word.endswith("s") and not word.endswith(("ss", "us", "is", "'s")) and len(word) > MIN_LETTERS


_PLURALS = frozenset(
    ["children", "men", "women", "feet", "teeth", "geese", "mice", "lice", "oxen", "people", "pence", "cacti", "fungi"]
)


def _stems(stem: str) -> list[str]:
    """What -ed and -ing may have been put to."""
    stems = [f"{stem}e", stem]
    if len(stem) > MIN_LETTERS and stem[-1] == stem[-2] and stem[-1] not in "aeiou":
        stems.append(stem[:-1])
    return stems


@cache
def _irregular() -> dict[str, tuple[str, ...]]:
    forms: dict[str, tuple[str, ...]] = {}
    for line in lines_of("irregular_forms.txt"):
        form, base = line.split(" ")
        forms[form] = (*forms.get(form, ()), base)
    return forms
