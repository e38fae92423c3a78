"""
Sentences of documents, each with its place in the text: what a conversation's knowledge is made of.

A sentence ends at `.`, `!` or `?`, with the closing quotes, brackets and references behind it, where a space follows
and then anything but a small letter; an empty line ends one too. A full stop after a title ("Dr. Hale"), an initial
("J. Hale"), a dotted abbreviation ("U.S. Army") or a counting word before a number ("No. 5") ends none. Time is linear
in the text, whatever it is made of.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from trilithon_server.knowledge.word_lists import lines_of

MIN_WORDS = 5
MAX_WORDS = 60
MAX_SENTENCES = 512
"""Kept of one document."""

Span = tuple[int, int]
"""Half-open range of characters."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """
    One sentence of a document.

    Attributes:
        text: in one line, single spaces between words.
        document_id, title, url: of the document; the url is a label and is never opened.
        number: among all sentences of the document, from 0, those counted that were not kept.
        start, end: characters [start, end) of the document's text that it was made of.
    """

    text: str
    document_id: str
    number: int
    start: int
    end: int
    title: str = ""
    url: str = ""


def sentences_of(text: str, *, document_id: str, title: str = "", url: str = "") -> list[Sentence]:
    """
    The sentences of a document that can carry knowledge, in order: the first `MAX_SENTENCES` of `MIN_WORDS` to
    `MAX_WORDS` words (what stands between spaces) that neither repeat an earlier one or the title nor hold one of the
    phrases of navigation and cookie bars in `stop_phrases.txt`.

    >>> [s.text for s in sentences_of("The mill stands by the river. Read more.", document_id="d")]
    ['The mill stands by the river.']
    """
    kept: list[Sentence] = []
    seen = {_compared(title)}
    for number, (start, end) in enumerate(split_sentences(text)):
        words = text[start:end].split()
        compared = _compared(text[start:end])
        if MIN_WORDS <= len(words) <= MAX_WORDS and compared not in seen and not _is_furniture(compared):
            seen.add(compared)
            kept.append(Sentence(" ".join(words), document_id, number, start, end, title, url))
            if len(kept) == MAX_SENTENCES:
                break
    return kept


def split_sentences(text: str) -> list[Span]:
    """
    Where the sentences of a text stand, in order; together they hold every character that is no space.

    >>> text = 'Dr. Hale came. "Late?" she asked.'
    >>> [text[start:end] for start, end in split_sentences(text)]
    ['Dr. Hale came.', '"Late?" she asked.']
    """
    spans: list[Span] = []
    start = 0
    for found in _BREAK.finditer(text):
        if found.group("stop") is None or _ends(text, found):
            spans.append((start, found.start("space") if found.group("stop") else found.start()))
            start = found.end()
    spans.append((start, len(text)))
    return [span for span in (_stripped(text, *span) for span in spans) if span[0] < span[1]]


# Possessive, and a run of stops is looked at once: what doesn't match costs no second look at its parts.
_BREAK = re.compile(
    r"(?P<stop>(?<![.!?\u2026])[.!?\u2026]++[\"'\u2019\u201d)\]]*+(?:\[[^\[\]\n]{1,40}+\])*+)(?P<space>\s++)"
    r"|(?P<paragraph>\n[^\S\n]*+\n\s*+)"
)
"""A stop with quotes, brackets and references (`[3]`) behind it, then space; or an empty line."""

_BEFORE = re.compile(r"[^\s(\[\"'\u2018\u201c]*\Z")
_DOTTED = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")
_LONGEST_ABBREVIATION = 20

_TITLE = re.compile(
    r"adm|brig|capt|cmdr|col|cpl|drs?|fr|gen|gov|hon|insp|lt|maj|messrs|mlle|mme|mrs?|ms|mt|mx|pres|prof|rep|rev|sen|sgt"
    r"|sr|st|supt|vs|viz|cf|approx|ca",
    re.IGNORECASE,
)
"""What stands before a name or an explanation, never at an end."""

_COUNTER = re.compile(r"art|ch|chap|eq|figs?|nos?|pp?|par|sec|vols?", re.IGNORECASE)
"""What stands before a number."""


def _ends(text: str, found: re.Match[str]) -> bool:
    """Whether a sentence ends at what looks like an end; spaces with an empty line in them always end one."""
    if found.group("space").count("\n") > 1 or found.end() == len(text):
        return True
    following = text[found.end()]
    if following.islower():
        return False
    if found.group("stop") != ".":
        return True
    at = found.start()
    before = _BEFORE.search(text, max(0, at - _LONGEST_ABBREVIATION), at)
    word = before.group() if before else ""
    if _DOTTED.fullmatch(word):
        return word == "I" or word.endswith(("p.m", "a.m"))
    if _COUNTER.fullmatch(word):
        return not following.isdigit()
    return not _TITLE.fullmatch(word)


def _stripped(text: str, start: int, end: int) -> Span:
    """The span without the spaces at its ends."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _compared(text: str) -> str:
    """The words of a text alone, so that spaces, signs and capitals make no difference."""
    return " ".join(_WORD.findall(text.casefold()))


def _is_furniture(compared: str) -> bool:
    """Whether words hold a phrase of the page around an article, at word borders."""
    return _stop_phrases().search(f" {compared} ") is not None


_WORD = re.compile(r"\w+")


@cache
def _stop_phrases() -> re.Pattern[str]:
    return re.compile(f" (?:{'|'.join(map(re.escape, lines_of('stop_phrases.txt')))}) ")
