"""Flat buckets and the optimizer's state over ranks; what takes several processes is in optimizer_cases.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import LIMIT_S

from trilithon_parallel.buckets import rectangles

OnRanks = Callable[[str, int, str], list[Any]]

pytestmark = pytest.mark.timeout(LIMIT_S + 60)


@given(shape=st.lists(st.integers(1, 12), min_size=1, max_size=2), data=st.data())
def test_rectangles_are_the_elements_in_order(shape: list[int], data: st.DataObject) -> None:
    """A flat range is at most three rectangles whose elements, one after another, are its own."""
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(0, total))
    numbers = torch.arange(total).view(shape)

    found = rectangles(shape, start, stop)

    assert len(found) <= 3
    assert [int(x) for part in found for x in numbers[part].flatten()] == list(range(start, stop))


def test_E7_ranks_give_every_element_once(on_ranks: OnRanks) -> None:
    """
    Weights, masters and moments of all ranks tile every tensor: with padding, tied heads, replicas, ZeRO or not.

    Inverse check: letting every dp rank give what all of them hold fails here.
    """
    on_ranks("optimizer_cases.py", 4, "coverage")


def test_E7_resumed_at_another_layout(on_ranks: OnRanks) -> None:
    """
    What one layout's ranks gave another layout's take: the next step is the same, and padding is zero throughout.

    Inverse checks: buckets that start as anything but zero, so that a resumed rank's padding is not; gradients of
    key/value copies summed twice.
    """
    for padding in on_ranks("optimizer_cases.py", 4, "resume"):
        assert min(padding) > 0


def test_tied_copies_stay_equal(on_ranks: OnRanks) -> None:
    """
    Copies of the embedding, and of T5's tables, on several stages have the same bits after 20 steps.

    Inverse check: not summing their gradients over the stages fails here.
    """
    on_ranks("optimizer_cases.py", 4, "ties")


def test_E8_encoder_decoder_equals_one_process(on_ranks: OnRanks) -> None:
    """
    T5, whose stages share three tensors in different orders: losses, norms, weights and moments of three steps.

    Inverse check: summing shared tensors in each stage's own order, ranks wait for each other without an end.
    """
    on_ranks("optimizer_cases.py", 4, "seq2seq")


def test_sums_start_while_the_backward_pass_runs(on_ranks: OnRanks) -> None:
    """
    Sums over dp start before the last tensor-parallel sum of the last backward, in one order on all ranks.

    Inverse check: buckets in the order of their kinds, where all norms come first, start none before the end.
    """
    reports = on_ranks("optimizer_cases.py", 4, "order")

    for calls in reports:
        sums = [index for index, call in enumerate(calls) if call.startswith("gradients reduce_scatter")]
        last = max(index for index, call in enumerate(calls) if call.startswith("f.backward"))
        micro_batches = 4
        in_one_backward = sum(call.startswith("f.backward") for call in calls) // micro_batches
        assert sum(call.startswith("f.backward") for call in calls[: sums[0]]) > in_one_backward * (micro_batches - 1)
        assert sum(index < last for index in sums) > len(sums) // 2
    assert [[call for call in calls if call.startswith("gradients ")] for calls in reports] == [
        [call for call in reports[0] if call.startswith("gradients ")]
    ] * len(reports)


def test_bucket_size_does_not_matter(on_ranks: OnRanks) -> None:
    """Buckets of one parameter, of a few and of all give the same bits, as do distributed and replicated states."""
    on_ranks("optimizer_cases.py", 2, "bucket_sizes")
