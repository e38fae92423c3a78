"""The cut cross-entropy and the pairs of tensor parallelism against torch; the cases are in loss_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ranks import LIMIT_S

OnRanks = Callable[[str, int, str], list[Any]]

pytestmark = pytest.mark.timeout(LIMIT_S + 60)


@pytest.mark.parametrize("size", [2, 4])
def test_E8_cross_entropy_equals_torch(size: int, on_ranks: OnRanks) -> None:
    """
    Sum, log-probabilities and gradient of a vocabulary of 50257 in padded cuts: 1e-12 in fp64, 1e-5 in fp32. Every
    rank knows which targets have the largest logit of all, shared first places among them.

    Columns that are padding are NaN in the test: they reach nothing and get no gradient.

    Inverse check: not setting the gradient of padding columns to zero fails here, and so does comparing a target with
    the largest logit of this rank's columns.
    """
    on_ranks("loss_cases.py", size, "cross_entropies")


def test_E8_pairs_have_each_others_gradients(on_ranks: OnRanks) -> None:
    """
    f and g, and the gathers and reduce-scatters of sequence parallelism, pass torch's gradcheck at two ranks.

    Inverse check: all-reducing in g's backward instead of f's fails here.
    """
    on_ranks("loss_cases.py", 2, "gradients")


def test_pairs_leave_their_inputs_alone(on_ranks: OnRanks) -> None:
    """Autograd may need a tensor again: no pair overwrites what it was given."""
    on_ranks("loss_cases.py", 2, "inputs_stay")
