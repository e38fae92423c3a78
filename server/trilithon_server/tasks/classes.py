"""
One label for a text or a pair of texts: `[CLS] text [SEP]` or `[CLS] text [SEP] other [SEP]`. No torch.

    format = ClassFormat(labels=("maybe", "no", "yes"))
    encoded = format.encode(question, pieces, abstract)
    answer = format.decode(logits)                          # logits [L] of the sequence
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from trilithon_server.tasks.pieces import Encoded, WordPieces

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Classified:
    """The most probable label, its probability, and those of all labels in the order of their ids."""

    label: str
    score: float
    probabilities: Mapping[str, float]


@dataclass(frozen=True)
class ClassFormat:
    """
    How a label is asked for.

    Attributes:
        labels: in the order of their ids.
        max_tokens: of a sequence, special tokens included.
    """

    labels: tuple[str, ...]
    max_tokens: int = 256

    def encode(self, text: str, pieces: WordPieces, pair: str | None = None) -> Encoded:
        """
        The sequence, however long; `cut` makes it fit.

        Args:
            pair: a second text, with token types 1.
        """
        first = pieces.text(text).ids
        second = None if pair is None else pieces.text(pair).ids
        return _framed(first, second, pieces)

    def cut(self, text: str, pieces: WordPieces, pair: str | None = None) -> Encoded:
        """The sequence with at most `max_tokens` tokens: the longer text loses its end."""
        first = pieces.text(text).ids
        if pair is None:
            return _framed(first[: self.max_tokens - 2], None, pieces)
        second = pieces.text(pair).ids
        room = self.max_tokens - 3
        keep = min(len(first), max(room - len(second), (room + 1) // 2))
        return _framed(first[:keep], second[: room - keep], pieces)

    def decode(self, logits_L: Logits) -> Classified:
        """The label of a sequence from its logits [L]."""
        return classified(self.labels, logits_L)

    def task_file(self) -> dict[str, JsonValue]:
        """What `from_task_file` reads."""
        return {"task": "classify", "labels": list(self.labels), "max_tokens": self.max_tokens}

    @classmethod
    def from_task_file(cls, document: Mapping[str, Any]) -> Self:
        """
        The format of a `task.json`.

        Raises:
            ValueError, KeyError, TypeError: it is not one that `task_file` writes.
        """
        return cls(labels=tuple(document["labels"]), max_tokens=int(document["max_tokens"]))


def classified(labels: Sequence[str], logits_L: Logits) -> Classified:
    """The most probable of `labels`; the first of equal ones."""
    values_L = np.asarray(logits_L, dtype=np.float64)
    values_L = np.exp(values_L - values_L.max())
    values_L /= values_L.sum()
    best = int(values_L.argmax())
    chances = {label: float(value) for label, value in zip(labels, values_L, strict=True)}
    return Classified(labels[best], chances[labels[best]], chances)


def _framed(first: tuple[int, ...], second: tuple[int, ...] | None, pieces: WordPieces) -> Encoded:
    head = (pieces.cls_id, *first, pieces.sep_id)
    if second is None:
        return Encoded(head)
    return Encoded((*head, *second, pieces.sep_id), (0,) * len(head) + (1,) * (len(second) + 1))
