"""
Relations between two mentions in a sentence: each mention is replaced by a marker of its type, `@CHEMICAL$`, and the
sequence gets one label. No torch.

    format = RelationFormat(labels=..., markers={"CHEMICAL": 1, "GENE": 2})
    for a, b in format.candidates(text, entities):
        encoded = format.encode(text, a, b, pieces)
        relation = format.decode(logits)                    # logits [L] of the sequence

A marker is one token. A vocabulary that has no such token lends a row that it keeps free (`[unused0]`); which one is
stored in the task file, so recipe and server read a text alike.
Source: the input form of BioBERT for ChemProt (Lee et al. 2020).
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

from pydantic import JsonValue

from trilithon_parallel.config import ModelError
from trilithon_server.tasks.classes import Classified, Logits, classified
from trilithon_server.tasks.pieces import Encoded, Span, WordPieces, split_words

SENTENCE_END = re.compile(r"\t|(?<=[.!?])\s+(?=[A-Z0-9(])")
"""Where one sentence ends and the next begins."""


class Mention(Protocol):
    """Characters [start, end) of a text and what is named there."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def type(self) -> str: ...


M = TypeVar("M", bound=Mention)


@dataclass(frozen=True)
class RelationFormat:
    """
    How a relation is asked for.

    Attributes:
        labels: in the order of their ids.
        markers: token id of each type's marker.
        pairs: types of the first and the second mention that may be related.
        negative: the label that says that there is none.
        max_tokens: of a sequence, special tokens included; at least 8.
    """

    labels: tuple[str, ...]
    markers: Mapping[str, int]
    pairs: tuple[tuple[str, str], ...] = (("CHEMICAL", "GENE"),)
    negative: str = "false"
    max_tokens: int = 128

    def encode(self, text: str, a: Mention, b: Mention, pieces: WordPieces) -> Encoded:
        """
        The sentence (or sentences) that the two mentions lie in, with markers in their places.

        A sentence that is too long is cut to what stands around the two; where they lie too far from each other, the
        middle between them is left out.

        Raises:
            ValueError: the mentions overlap, or a type has no marker.
        """
        first, second = sorted((a, b), key=lambda mention: mention.start)
        if first.end > second.start:
            raise ValueError(f"mentions must not overlap. Given: {a.start}:{a.end} and {b.start}:{b.end}.")
        for mention in (a, b):
            if mention.type not in self.markers:
                raise ValueError(f"type must be one of {', '.join(self.markers)}. Given: {mention.type!r}.")
        begin, stop = sentence_of(text, a, b)
        room = self.max_tokens - 4
        before = _last(text, (begin, first.start), room, pieces)
        between = _ends(text, (first.end, second.start), room, pieces)
        after = _first(text, (second.end, stop), room, pieces)
        before, between, after = _fit(before, between, after, room)
        markers = self.markers[first.type], self.markers[second.type]
        ids = (pieces.cls_id, *before, markers[0], *between, markers[1], *after, pieces.sep_id)
        return Encoded(ids)

    def candidates(self, text: str, entities: Sequence[M]) -> list[tuple[M, M]]:
        """Pairs of entities of one sentence that may be related and do not overlap; in the order of `entities`."""
        sentences = split_sentences(text)
        starts = [start for start, _ in sentences]
        allowed = set(self.pairs)
        places = [bisect_right(starts, entity.start) - 1 for entity in entities]
        together: dict[int, list[M]] = {}
        for entity, place in zip(entities, places, strict=True):
            if place >= 0 and entity.end <= sentences[place][1]:
                together.setdefault(place, []).append(entity)
        return [
            (a, b)
            for a, place in zip(entities, places, strict=True)
            if place >= 0 and a.end <= sentences[place][1]
            for b in together[place]
            if (a.type, b.type) in allowed and a is not b and (a.end <= b.start or b.end <= a.start)
        ]

    def decode(self, logits_L: Logits) -> Classified:
        """The label of a pair from its logits [L]."""
        return classified(self.labels, logits_L)

    def task_file(self) -> dict[str, JsonValue]:
        """What `from_task_file` reads."""
        return {
            "task": "relation",
            "labels": list(self.labels),
            "markers": dict(self.markers),
            "pairs": [list(pair) for pair in self.pairs],
            "negative": self.negative,
            "max_tokens": self.max_tokens,
        }

    @classmethod
    def from_task_file(cls, document: Mapping[str, Any]) -> Self:
        """
        The format of a `task.json`.

        Raises:
            ValueError, KeyError, TypeError: it is not one that `task_file` writes.
        """
        return cls(
            labels=tuple(document["labels"]),
            markers={str(name): int(row) for name, row in dict(document["markers"]).items()},
            pairs=tuple((str(a), str(b)) for a, b in document["pairs"]),
            negative=str(document["negative"]),
            max_tokens=int(document["max_tokens"]),
        )


def split_sentences(text: str) -> list[Span]:
    """
    Half-open ranges of characters of the sentences of a text, in order.

    >>> [text[start:end] for text in ["It is. So 5.5 is."] for start, end in split_sentences(text)]
    ['It is.', 'So 5.5 is.']
    """
    breaks = [(match.start(), match.end()) for match in SENTENCE_END.finditer(text)]
    starts = [0, *(end for _, end in breaks)]
    ends = [*(start for start, _ in breaks), len(text)]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]


def sentence_of(text: str, a: Mention, b: Mention) -> Span:
    """From the start of the sentence of the first of two mentions to the end of that of the last."""
    starts, ends = _bounds(text)
    begin = bisect_right(starts, min(a.start, b.start)) - 1
    stop = bisect_left(ends, max(a.end, b.end))
    return starts[begin] if begin >= 0 else 0, ends[stop] if stop < len(ends) else len(text)


@functools.lru_cache(maxsize=4)
def _bounds(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Starts and ends of the sentences, once for all pairs of a text."""
    sentences = split_sentences(text)
    return tuple(start for start, _ in sentences), tuple(end for _, end in sentences)


def marker_ids(types: Sequence[str], pieces: WordPieces) -> dict[str, int]:
    """
    A token for the marker of each type: the vocabulary's own `@TYPE$`, else a row that it keeps free.

    Raises:
        ModelError: `task_tokenizer`, there are too few free rows.
    """
    free = iter(pieces.unused_ids)
    ids: dict[str, int] = {}
    for name in sorted(types):
        own = pieces.id_of(f"@{name}$")
        row = next(free, None) if own is None else own
        if row is None:
            raise ModelError(
                f"the vocabulary must have a token @{name}$, or a free row [unusedN] for it. Given: neither.",
                code="task_tokenizer",
                hint="Use a model whose vocabulary has [unused] rows, as BERT's have, or fewer types of mentions.",
            )
        ids[name] = row
    return ids


# Only as many words next to a mention can matter as there are tokens: a long text is not read to its ends.


def _first(text: str, part: Span, count: int, pieces: WordPieces) -> tuple[int, ...]:
    """Pieces of a part of a text, or of its beginning where that has `count` words."""
    start, stop = part
    size = 8 * count
    while start + size < stop:
        cut = text.rfind(" ", start, start + size)
        if cut > start and len(split_words(text[start:cut])) >= count:
            return _ids(text, (start, cut), pieces)
        size *= 2
    return _ids(text, part, pieces)


def _last(text: str, part: Span, count: int, pieces: WordPieces) -> tuple[int, ...]:
    """Pieces of a part of a text, or of its end where that has `count` words."""
    start, stop = part
    size = 8 * count
    while start + size < stop:
        cut = text.find(" ", stop - size, stop)
        if cut >= 0 and len(split_words(text[cut:stop])) >= count:
            return _ids(text, (cut, stop), pieces)
        size *= 2
    return _ids(text, part, pieces)


def _ends(text: str, part: Span, count: int, pieces: WordPieces) -> tuple[int, ...]:
    """Pieces of a part of a text, or of its beginning and its end where each of these has `count` words."""
    start, stop = part
    middle = text.find(" ", (start + stop) // 2, stop)
    if stop - start <= 32 * count or middle < 0:
        return _ids(text, part, pieces)
    return _first(text, (start, middle), count, pieces) + _last(text, (middle, stop), count, pieces)


def _ids(text: str, part: Span, pieces: WordPieces) -> tuple[int, ...]:
    start, stop = part
    spans = [(start + begin, start + end) for begin, end in split_words(text[start:stop])]
    return pieces.text(text, spans=spans).ids


def _fit(
    before: tuple[int, ...], between: tuple[int, ...], after: tuple[int, ...], room: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Cut three parts to `room` pieces in all: outside evenly, and the middle only where it alone is too long."""
    if len(between) > room:
        half = room // 2
        return (), between[: room - half] + between[len(between) - half :], ()
    room -= len(between)
    left = min(len(before), max(room - len(after), room // 2))
    return before[len(before) - left :], between, after[: room - left]
