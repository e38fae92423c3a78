"""What a training step sends against the cost model, to the element; the cases are in volume_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ranks import LIMIT_S

OnRanks = Callable[[str, int, str], list[Any]]

pytestmark = pytest.mark.timeout(LIMIT_S + 60)


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_volume(size: int, on_ranks: OnRanks) -> None:
    """
    A layer sends 8 b s h (t - 1) / t elements a micro-batch, with sequence parallelism too; more if recomputed.

    Inverse check: one more all-reduce in the row-parallel product fails here.
    """
    for report in on_ranks("volume_cases.py", size, "tensor_parallel"):
        for result in report:
            assert result["measured"] == result["model"], result["case"]


@pytest.mark.parametrize("size", [2, 4])
def test_data_parallel_volume(size: int, on_ranks: OnRanks) -> None:
    """A step sends 2 (d - 1) / d of its parameters, padding included, once a batch and not once a micro-batch."""
    for report in on_ranks("volume_cases.py", size, "data_parallel"):
        for result in report:
            assert result["measured"] == result["model"]


def test_pipeline_volume(on_ranks: OnRanks) -> None:
    """Every border of chunks sends b s h / t elements a micro-batch in each direction, whichever way it is cut."""
    for report in on_ranks("volume_cases.py", 4, "pipeline"):
        for result in report:
            assert result["forward"] == result["forward model"]
            assert result["backward"] == result["backward model"]
