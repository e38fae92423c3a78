"""
Several rankings made one by where things stand in them, whatever their scores mean.

Source: reciprocal rank fusion (Cormack, Clarke and Buettcher 2009), with its constant of 60.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trilithon_server.knowledge.ranking import Ranking, best

RANK_OFFSET = 60


def fuse(rankings: Sequence[Ranking], k: int) -> Ranking:
    """
    The `k` rows with the highest sum of 1 / (60 + rank), rank from 1; a row that a ranking lacks gets nothing from it.

    The order of the rankings doesn't matter.
    """
    shares: dict[int, list[float]] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking.rows.tolist(), start=1):
            shares.setdefault(row, []).append(1 / (RANK_OFFSET + rank))
    rows = np.array(sorted(shares), dtype=np.int64)
    scores = np.array([math.fsum(shares[row]) for row in rows.tolist()], dtype=np.float32)
    return best(scores, k, rows=rows)
