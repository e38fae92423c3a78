"""Rankings: the best rows with one rule for ties, and several rankings made one."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilithon_server.knowledge.fusion import fuse
from trilithon_server.knowledge.ranking import Ranking, best

ORDERS = st.lists(st.lists(st.integers(0, 12), unique=True, max_size=8), max_size=4)


def ranked(rows: list[int]) -> Ranking:
    return Ranking(np.array(rows, np.int64), -np.arange(len(rows), dtype=np.float32))


@given(st.lists(st.integers(-3, 3), max_size=30), st.integers(1, 40))
def test_the_best_rows_and_of_equal_ones_the_earlier(values: list[int], k: int) -> None:
    """
    What a stable sort of everything gives.

    Inverse check: seen to fail with `argpartition`, which cuts through equal scores anywhere.
    """
    found = best(np.array(values, np.float32), k)
    expected = sorted(range(len(values)), key=lambda row: (-values[row], row))[:k]

    assert found.rows.tolist() == expected
    assert found.scores.tolist() == [values[row] for row in expected]


@given(ORDERS, st.integers(1, 20))
def test_fused_ranks_are_summed(orders: list[list[int]], k: int) -> None:
    """
    Sums of 1 / (60 + rank), exactly; of equal sums the earlier row first; the order of the rankings is nothing.

    Inverse check: seen to fail with ranks counted from 0.
    """
    sums: dict[int, Fraction] = {}
    for order in orders:
        for rank, row in enumerate(order, start=1):
            sums[row] = sums.get(row, Fraction(0)) + Fraction(1, 60 + rank)
    expected = sorted(sums, key=lambda row: (-np.float32(float(sums[row])), row))[:k]
    found = fuse([ranked(order) for order in orders], k)
    backwards = fuse([ranked(order) for order in reversed(orders)], k)

    assert found.rows.tolist() == expected == backwards.rows.tolist()
    assert found.scores.tolist() == pytest.approx([float(sums[row]) for row in expected])


def test_second_in_both_lists_wins() -> None:
    """What both kinds of search think well of stands before what one of them has first."""
    assert fuse([ranked([1, 7, 2]), ranked([3, 7, 4])], 3).rows.tolist() == [7, 1, 3]
