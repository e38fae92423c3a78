"""
PubTator files: abstracts with mentions by characters (BC5CDR, NCBI disease, PubTator Central).

    26094|t|Title
    26094|a|Abstract
    26094<TAB>27<TAB>37<TAB>depression<TAB>Disease<TAB>D003866

Characters count through title, one separator, and abstract.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trilithon_server.tasks.pieces import split_words
from trilithon_server.tasks.relations import split_sentences

_TEXT = re.compile(r"(\d+)\|([ta])\|(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Mention:
    """Characters [start, end) of a document, and what the file says stands there."""

    start: int
    end: int
    type: str
    text: str


@dataclass(frozen=True, slots=True)
class Annotated:
    """A document and its mentions."""

    id: str
    text: str
    mentions: tuple[Mention, ...]


def read_pubtator(document: bytes) -> list[Annotated]:
    """
    Documents in the order of the file. Lines that are neither text nor a mention (relations) are left out.

    Raises:
        ValueError: not UTF-8; a mention before the text of its document, or one that its document doesn't hold.
    """
    texts: dict[str, list[str]] = {}
    mentions: dict[str, list[Mention]] = {}
    for number, raw in enumerate(document.decode("utf-8").split("\n"), start=1):
        line = raw.removesuffix("\r")
        if match := _TEXT.fullmatch(line):
            texts.setdefault(match[1], []).append(match[3])
            continue
        columns = line.split("\t")
        if len(columns) < 5 or not (columns[1].isdecimal() and columns[2].isdecimal()):
            continue
        found = Mention(int(columns[1]), int(columns[2]), columns[4], columns[3])
        there = " ".join(texts.get(columns[0], []))[found.start : found.end]
        if there != found.text:
            raise ValueError(
                f"line {number}: characters {found.start} to {found.end} of document {columns[0]} must be "
                f"{found.text!r}, as the mention says. Given: {there!r}."
            )
        mentions.setdefault(columns[0], []).append(found)
    return [Annotated(key, " ".join(parts), tuple(mentions.get(key, ()))) for key, parts in texts.items()]


def tagging_rows(document: Annotated) -> list[dict[str, Any]]:
    """Rows of the task `ner`, one for each sentence. Of mentions that overlap the longest is kept."""
    return tagged_sentences(document.text, document.mentions)


def tagged_sentences(text: str, mentions: Sequence[Mention]) -> list[dict[str, Any]]:
    """
    Sentences of a text as `{"tokens", "tags"}`. A mention that begins or ends within a word takes the whole word; the
    part of one that goes beyond its sentence begins anew there.
    """
    kept: list[Mention] = []
    for mention in sorted(mentions, key=lambda item: (item.start - item.end, item.start)):
        if all(mention.end <= other.start or other.end <= mention.start for other in kept):
            kept.append(mention)
    rows = []
    for begin, stop in split_sentences(text):
        words = [(begin + start, begin + end) for start, end in split_words(text[begin:stop])]
        owners = [next((m for m in kept if m.start < end and start < m.end), None) for start, end in words]
        tags = []
        for i, owner in enumerate(owners):
            inside = owner is not None and i > 0 and owners[i - 1] is owner
            tags.append("O" if owner is None else f"{'I' if inside else 'B'}-{owner.type}")
        if words:
            rows.append({"tokens": [text[start:end] for start, end in words], "tags": tags})
    return rows
