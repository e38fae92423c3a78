"""Torch's own tensor, sequence and sharded data parallelism against ours, in fp64; the cases are in peer_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ranks import LIMIT_S

# Relative to each tensor's largest value: sums of a few thousand fp64 products in another order.
TOLERANCE = 1e-12


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("case", ["tensor_parallel", "sequence_parallel", "sharded_data_parallel"])
def test_E8_equals_torch(case: str, on_ranks: Callable[[str, int, str], list[Any]]) -> None:
    """
    DTensor TP, DTensor TP with SP, FSDP2: loss, norm, gradients and weights after AdamW are ours at two ranks.

    Inverse checks: norms' gradients not summed under SP; replicated parameters counted by every rank in the norm; the
    mean over dp instead of the sum; losses divided by the micro-batches; f and g exchanged; 1 / N rounded to fp32.
    """
    reports = on_ranks("peer_cases.py", 2, case)

    assert {key: value for report in reports for key, value in report.items() if value > TOLERANCE} == {}
