"""Facts by the vectors of an encoder: those that go with a story, and the vectors themselves, which are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trilithon_server.knowledge.graph import Fact
from trilithon_server.knowledge.tfidf import unit

Vector = npt.NDArray[np.float32]

SCORE_DIGITS = 5
"""Scores that differ by less are equal, and the graph's order decides: layouts differ by about 1e-6."""

MAX_VECTORS = 20_000
"""That a process remembers: 30 MB of 384 numbers each."""


@dataclass(frozen=True, slots=True)
class ScoredFact:
    """A fact and the cosine of its vector and the story's."""

    fact: Fact
    score: float


class FactVectors:
    """Vectors of facts by what made them; the least recently used are forgotten."""

    def __init__(self, most: int = MAX_VECTORS) -> None:
        self._most = most
        self._known: OrderedDict[tuple[str, ...], Vector] = OrderedDict()

    def get(self, key: tuple[str, ...]) -> Vector | None:
        """A vector, or None."""
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)

    def put(self, key: tuple[str, ...], vector: Vector) -> None:
        """Remember a vector."""
        self._known[key] = vector
        self._known.move_to_end(key)
        while len(self._known) > self._most:
            self._known.popitem(last=False)


def by_cosine(facts: Sequence[Fact], vectors: Sequence[Vector], story: Vector) -> list[ScoredFact]:
    """Facts with their cosines, best first; equal ones in the order given."""
    if not facts:
        return []
    rows = unit(np.stack(vectors).astype(np.float64))
    scores = rows @ unit(story.astype(np.float64)[None])[0]
    scored = [ScoredFact(fact, round(float(score), SCORE_DIGITS)) for fact, score in zip(facts, scores, strict=True)]
    return sorted(scored, key=lambda one: -one.score)
