"""
Entities: words are labelled O, B-type or I-type, and runs of labels are spans of the original text. No torch.

    format = TaggingFormat(types=("Chemical", "Disease"))
    tagged = format.encode_text(text, pieces)
    entities = format.decode_text(text, tagged, logits)     # logits [T, L] of each of tagged.windows

A text longer than a window is cut between words into windows that overlap; of the words that two windows share, each
window decides those that lie farther from its cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from trilithon_server.tasks.pieces import Encoded, Span, WordPieces, split_words

Logits = npt.NDArray[np.float32]
Method = Literal["first", "whole"]

IGNORE = -1
"""The target of a token that does not count."""


@dataclass(frozen=True, slots=True)
class Entity:
    """A mention: `text` is characters [start, end) of the original; `score` is the mean probability of its labels."""

    start: int
    end: int
    type: str
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class TagWindow:
    """
    One sequence of a text.

    Attributes:
        encoded: what the model reads.
        start: the first word in it.
        pieces: half-open range of tokens of each of its words, in order.
        kept: half-open range of words (of the text) that this window decides; the windows' ranges tile the text.
    """

    encoded: Encoded
    start: int
    pieces: tuple[Span, ...]
    kept: Span


@dataclass(frozen=True, slots=True)
class TaggedText:
    """A text ready for the model: its words as character ranges, and its windows."""

    words: tuple[Span, ...]
    windows: tuple[TagWindow, ...]


@dataclass(frozen=True)
class TaggingFormat:
    """
    How entities are asked for.

    Attributes:
        types: of entities, at least one.
        method: which pieces of a word carry its label while training: the `first`, or the `whole` word (the first
            piece of B is B, what follows is I). Either way the first piece decides.
        max_tokens: of a window, [CLS] and [SEP] included; at least 3.
        stride: words that consecutive windows share, where a window holds twice as many.
    """

    types: tuple[str, ...]
    method: Method = "first"
    max_tokens: int = 256
    stride: int = 32

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels in the order of their ids: O, then B and I of each type."""
        return labels_of(self.types)

    def encode(self, words: Sequence[str], pieces: WordPieces) -> tuple[TagWindow, ...]:
        """Windows over words that are given; none for no words."""
        room = self.max_tokens - 2
        encoded = [tuple(piece for piece, _, _ in pieces.word(word))[:room] for word in words]
        bounds = _windows([len(word) for word in encoded], room, self.stride)
        middles = ((after[0] + before[1]) // 2 for before, after in itertools.pairwise(bounds))
        cuts = [0, *middles, len(words)] if bounds else []
        return tuple(
            self._window(encoded, bound, kept, pieces)
            for bound, kept in zip(bounds, itertools.pairwise(cuts), strict=True)
        )

    def encode_text(self, text: str, pieces: WordPieces) -> TaggedText:
        """Words and windows of a text."""
        words = split_words(text)
        return TaggedText(tuple(words), self.encode([text[start:end] for start, end in words], pieces))

    def targets(self, window: TagWindow, tags: Sequence[str]) -> tuple[int, ...]:
        """
        Label ids of a window's tokens, `IGNORE` where none is learned: pieces that the method leaves out, and words
        that another window decides, so that each word counts once.

        Args:
            tags: of all words of the text.
        """
        ids = {label: i for i, label in enumerate(self.labels)}
        out = [IGNORE] * len(window.encoded.tokens)
        for word in range(*window.kept):
            first, stop = window.pieces[word - window.start]
            out[first] = ids[tags[word]]
            if self.method == "whole":
                inside = tags[word] if tags[word] == "O" else f"I-{tags[word][2:]}"
                out[first + 1 : stop] = [ids[inside]] * (stop - first - 1)
        return tuple(out)

    def decode(self, windows: Sequence[TagWindow], logits: Sequence[Logits]) -> tuple[list[str], list[float]]:
        """
        Labels of the words and their probabilities.

        Args:
            logits: [T, L] of each window.
        Returns:
            Labels in which no I stands without its B (such an I becomes B), and the probability of each choice.
        """
        labels = self.labels
        tags: list[str] = []
        scores: list[float] = []
        for window, logits_TL in zip(windows, logits, strict=True):
            firsts = [window.pieces[word - window.start][0] for word in range(*window.kept)]
            rows_WL = np.asarray(logits_TL, dtype=np.float64)[firsts]
            rows_WL = np.exp(rows_WL - rows_WL.max(axis=-1, keepdims=True))
            rows_WL /= rows_WL.sum(axis=-1, keepdims=True)
            for row_L in rows_WL:
                best = int(row_L.argmax())
                tags.append(labels[best])
                scores.append(float(row_L[best]))
        return legal(tags), scores

    def decode_text(self, text: str, tagged: TaggedText, logits: Sequence[Logits]) -> list[Entity]:
        """Entities of a text in order, from the logits [T, L] of its windows."""
        tags, scores = self.decode(tagged.windows, logits)
        entities = []
        for first, stop, type_ in spans_of(tags):
            start, end = tagged.words[first][0], tagged.words[stop - 1][1]
            entities.append(Entity(start, end, type_, text[start:end], sum(scores[first:stop]) / (stop - first)))
        return entities

    def task_file(self) -> dict[str, JsonValue]:
        """What `from_task_file` reads."""
        return {
            "task": "ner",
            "labels": list(self.labels),
            "types": list(self.types),
            "method": self.method,
            "max_tokens": self.max_tokens,
            "stride": self.stride,
        }

    @classmethod
    def from_task_file(cls, document: Mapping[str, Any]) -> Self:
        """
        The format of a `task.json`.

        Raises:
            ValueError, KeyError, TypeError: it is not one that `task_file` writes.
        """
        if document["method"] not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}. Given: {document['method']!r}.")
        return cls(
            types=tuple(document["types"]),
            method=document["method"],
            max_tokens=int(document["max_tokens"]),
            stride=int(document["stride"]),
        )

    def _window(self, encoded: Sequence[tuple[int, ...]], bound: Span, kept: Span, pieces: WordPieces) -> TagWindow:
        tokens = [pieces.cls_id]
        places = []
        for word in encoded[bound[0] : bound[1]]:
            places.append((len(tokens), len(tokens) + len(word)))
            tokens += word
        tokens.append(pieces.sep_id)
        return TagWindow(Encoded(tuple(tokens)), bound[0], tuple(places), kept)


def labels_of(types: Sequence[str]) -> tuple[str, ...]:
    """
    Labels of entity types in the order of their ids.

    >>> labels_of(["Chemical"])
    ('O', 'B-Chemical', 'I-Chemical')
    """
    return ("O", *(f"{prefix}-{type_}" for type_ in types for prefix in "BI"))


def types_of(labels: Sequence[str]) -> tuple[str, ...]:
    """Entity types of labels in their order: the inverse of `labels_of`."""
    return tuple(label[2:] for label in labels if label.startswith("B-"))


def legal(tags: Sequence[str]) -> list[str]:
    """
    The tags with every I that does not go on with the entity before it made a B.

    >>> legal(["O", "I-x", "I-x", "I-y"])
    ['O', 'B-x', 'I-x', 'B-y']
    """
    out: list[str] = []
    for tag in tags:
        goes_on = bool(out) and out[-1] != "O" and out[-1][2:] == tag[2:]
        out.append(f"B-{tag[2:]}" if tag.startswith("I-") and not goes_on else tag)
    return out


def spans_of(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """
    Entities as half-open ranges of words with their type. Strict: an I without its B is no entity.

    >>> spans_of(["B-x", "I-x", "B-x", "O", "I-x"])
    [(0, 2, 'x'), (2, 3, 'x')]
    """
    spans: list[tuple[int, int, str]] = []
    start = -1
    for i, tag in enumerate([*tags, "O"]):
        if start >= 0 and tag != f"I-{tags[start][2:]}":
            spans.append((start, i, tags[start][2:]))
            start = -1
        if tag.startswith("B-"):
            start = i
    return spans


def _windows(lengths: Sequence[int], room: int, stride: int) -> list[Span]:
    """Half-open ranges of words that hold at most `room` pieces each and share `stride` words, or half a window."""
    bounds: list[Span] = []
    start = stop = 0
    while stop < len(lengths):
        stop, used = start, 0
        while stop < len(lengths) and used + lengths[stop] <= room:
            used += lengths[stop]
            stop += 1
        if bounds and stop <= bounds[-1][1]:
            # A long word that does not fit beside the shared ones: share fewer.
            start += 1
            stop = bounds[-1][1]
            continue
        bounds.append((start, stop))
        start = stop - min(stride, (stop - start) // 2)
    return bounds
