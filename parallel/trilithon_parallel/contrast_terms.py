"""The words of `contrast.py`: roles of vectors, and how answers are told from others. No torch."""

from __future__ import annotations

from dataclasses import dataclass

QUERY, ANSWER, OTHER, NOTHING = 0, 1, 2, 3
"""Roles of vectors: a query, the passage that it asks for, one that it doesn't; what only fills a micro-batch."""


@dataclass(frozen=True)
class Contrast:
    """
    How a query's answer is told from other passages.

    Attributes:
        scale: of inner products, for example 1 / sqrt(H), or 20 where vectors have length 1.
        margin: above 0, in the measure of the scaled products; None for cross-entropy.
        within: from those alone that were given with it, not from all of the global batch.
    """

    scale: float = 1.0
    margin: float | None = None
    within: bool = False


PLAIN = Contrast()
