"""The best rows of an array of scores, with one rule for ties: the earlier row comes first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """
    What was found for one query, best first.

    Attributes:
        rows: of the passages, int64[K]; each once.
        scores: float32[K], never rising; of equal scores the lower row comes first.
    """

    rows: Rows
    scores: Scores

    def __len__(self) -> int:
        return len(self.rows)


def best(scores: Scores, k: int, *, rows: Rows | None = None) -> Ranking:
    """
    The `k` highest scores, or all where there are fewer.

    >>> best(np.array([1, 3, 3, 2], np.float32), 2).rows.tolist()
    [1, 2]

    Args:
        scores: float32[M], finite.
        k: at least 1.
        rows: whose scores they are, int64[M] ascending; by default 0 to M - 1.
    """
    rows = np.arange(len(scores), dtype=np.int64) if rows is None else rows
    if k < len(scores):
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        kept = np.flatnonzero(scores >= least)  # more than k where several are equal to the last one
        scores, rows = scores[kept], rows[kept]
    order = np.argsort(-scores, kind="stable")[:k]
    return Ranking(rows[order], scores[order])
