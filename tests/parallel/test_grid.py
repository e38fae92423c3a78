"""The rank grid as pure data."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilithon_parallel.grid import Grid, axis_groups, rank_of

SIZES = st.integers(1, 5)


def test_groups_of_the_worked_example() -> None:
    """Order tp-dp-pp at (2, 3, 4): the data-parallel groups are those of the specification."""
    groups = axis_groups(tp=2, dp=3, pp=4)

    assert groups["dp"][0] == (0, 2, 4)
    assert groups["dp"][1] == (1, 3, 5)
    assert groups["dp"][-1] == (19, 21, 23)
    assert groups["tp"][:2] == [(0, 1), (2, 3)]
    assert groups["pp"][0] == (0, 6, 12, 18)


@given(tp=SIZES, pp=SIZES, dp=SIZES)
def test_groups_of_an_axis_partition_the_world(tp: int, pp: int, dp: int) -> None:
    """Each rank is in exactly one group of every axis. (Inverse: swapping two strides in `rank_of` fails it.)"""
    for axis, size in (("tp", tp), ("pp", pp), ("dp", dp)):
        groups = axis_groups(tp=tp, pp=pp, dp=dp)[axis]

        assert {len(group) for group in groups} == {size}
        assert sorted(rank for group in groups for rank in group) == list(range(tp * pp * dp))


@given(tp=SIZES, pp=SIZES, dp=SIZES)
def test_places_and_ranks_are_one_to_one(tp: int, pp: int, dp: int) -> None:
    """No two places of the grid share a rank."""
    ranks = {rank_of(t, d, p, tp=tp, dp=dp) for t in range(tp) for d in range(dp) for p in range(pp)}

    assert ranks == set(range(tp * pp * dp))


def test_a_grid_of_thousands_is_cheap() -> None:
    """3072 ranks as (8, 64, 6) take under a second."""
    began = time.monotonic()
    groups = axis_groups(tp=8, pp=64, dp=6)

    assert len(groups["tp"]) == 384
    assert time.monotonic() - began < 1.0


def test_one_process_needs_no_group() -> None:
    """`Grid.single()` stands at every axis' only place."""
    grid = Grid.single()

    assert grid.is_first_stage
    assert grid.is_last_stage
    assert (grid.rank, grid.world_size, grid.last_stage_rank) == (0, 1, 0)


def test_a_grid_that_is_not_the_world_is_refused() -> None:
    """The message says how many ranks the layout needs."""
    with pytest.raises(ValueError, match=r"Given: 2 \* 2 \* 1 and 1 ranks. Start 4 ranks"):
        Grid.build(tp=2, pp=2)
