"""
Names of a story's people as tags, so that a model learns what they do and not who they are called.

    A girl named Anna had a dog. Tom said it was his.  ->  A girl named [FEMALE] had a dog. [MALE] said it was his.

A name is a capitalised word behind "named", or before a verb of saying. Each tag stands for one name of a story, so a
text with tags has its names back; a name for which no tag is left stays a word. Who a tag fits is told by the word
before "named", else by the next pronoun; where neither tells, the tag is neutral.

Source: arXiv 2010.00840, which learns from stories whose names are [MALE], [FEMALE] and [NEUTRAL].
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from trilithon_server.knowledge.word_lists import stop_words

MALE, FEMALE, NEUTRAL = TAGS = ("[MALE]", "[FEMALE]", "[NEUTRAL]")

_SAYING = "said|says|asked|asks|replied|replies|answered|answers|cried|shouted|whispered|yelled|exclaimed|added"
_NAME = re.compile(rf"(?:\b(\w+) named ([A-Z]\w+)\b)|(?:\b([A-Z]\w+) (?:{_SAYING})\b)")
_HIS = "he him his himself boy man father dad brother son uncle grandfather king prince"
_HERS = "she her hers herself girl woman mother mom sister daughter aunt grandmother queen princess"
_MALE, _FEMALE = frozenset(_HIS.split()), frozenset(_HERS.split())
_PRONOUN = re.compile(r"\b(he|him|his|himself|she|her|hers|herself)\b", re.IGNORECASE)


def names_of(story: Sequence[str]) -> dict[str, str]:
    """
    The names of a story that have a tag, each with its own.

    >>> names_of(["A girl named Anna had a dog.", "Tom said it was his.", '"No," Tom said.', "Max asked Anna why."])
    {'Anna': '[FEMALE]', 'Tom': '[MALE]', 'Max': '[NEUTRAL]'}
    """
    text = " ".join(story)
    pronouns = [(match.start(), match[1].lower()) for match in _PRONOUN.finditer(text)]
    found: dict[str, str] = {}
    for match in _NAME.finditer(text):
        if len(found) == len(TAGS):
            break
        kind, named, saying = match.groups()
        name = named or saying
        if name in found or name.lower() in stop_words():
            continue
        at = bisect_left(pronouns, (match.end(), ""))
        tag = _tag((kind or "").lower(), pronouns[at][1] if at < len(pronouns) else "")
        free = [one for one in (tag, NEUTRAL) if one not in found.values()]
        if free:
            found[name] = free[0]
    return found


def _tag(kind: str, pronoun: str) -> str:
    """Of a name, by the word before "named" and by the next pronoun behind the place where it first stands so."""
    for word in (kind, pronoun):
        if word in _MALE | _FEMALE:
            return MALE if word in _MALE else FEMALE
    return NEUTRAL


def cut_at_names(text: str, names: Mapping[str, str], *, any_case: bool = False) -> Iterator[tuple[str, str]]:
    """
    A text in parts: words with no tag, and each name with its own. The parts in order are the text.

    Args:
        any_case: whether small letters are the name too, as keywords have it.
    """
    tags = {name.lower() if any_case else name: tag for name, tag in names.items()}
    pattern = "|".join(re.escape(name) for name in names)
    at = 0
    for match in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE if any_case else 0) if names else ():
        if match.start() > at:
            yield text[at : match.start()], ""
        yield match[0], tags[match[0].lower() if any_case else match[0]]
        at = match.end()
    if at < len(text):
        yield text[at:], ""


def with_names(text: str, names: Mapping[str, str]) -> str:
    """
    A text with names in the place of their tags.

    >>> with_names("[FEMALE] ran to [MALE].", {"Anna": "[FEMALE]"})
    'Anna ran to [MALE].'
    """
    for name, tag in names.items():
        text = text.replace(tag, name)
    return text
