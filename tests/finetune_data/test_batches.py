"""Packing and the order of training: each sample once, nothing too full, and the same whatever the layout."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon_finetune.data.batches import MicroBatch, Order, heaviest, in_order, share
from trilithon_finetune.data.packing import efficiency, pack, pack_shuffled
from trilithon_parallel.data.errors import DataError

CAPACITY = 32
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=60)
LONG_OR_SHORT = st.lists(st.integers(1, 2 * CAPACITY), min_size=1, max_size=40)


@settings(deadline=None)
@given(lengths=LENGTHS, window=st.integers(1, 20), seed=st.integers(0, 99))
def test_bins_hold_each_sample_once_and_no_more_than_fits(lengths: list[int], window: int, seed: int) -> None:
    """
    Packing loses no sample, cuts none and overfills no bin, and the same seed packs alike.

    Inverse check: a bin found by `bisect_right` at one token less room is overfull here.
    """
    for bins in (pack(lengths, CAPACITY), pack_shuffled(lengths, CAPACITY, window=window, seed=seed)):
        assert sorted(index for items in bins for index in items) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in items) <= CAPACITY for items in bins)
    assert pack_shuffled(lengths, CAPACITY, window=window, seed=seed) == bins


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_bins_are_at_least_half_full_on_average(lengths: list[int]) -> None:
    """Two half-empty bins would have been one, so there are at most twice as many as the tokens need."""
    least = -(-sum(lengths) // CAPACITY)

    assert len(pack(lengths, CAPACITY)) <= 2 * max(1, least)
    assert 0.0 <= efficiency(lengths, pack(lengths, CAPACITY), CAPACITY) <= 1.0


def test_a_sample_beyond_the_capacity_is_named() -> None:
    """A sample that fits no bin is an error that says which one it is."""
    with pytest.raises(DataError, match=r"sample 1 must have at most 4 tokens to be packed\. Given: 9\.") as raised:
        pack([1, 9], 4)

    assert raised.value.code == "E-DATA-021"


@settings(deadline=None)
@given(num_units=st.integers(1, 40), batch_size=st.integers(1, 12), seed=st.integers(0, 2**31 - 1), data=st.data())
def test_every_epoch_sees_every_unit_once(num_units: int, batch_size: int, seed: int, data: st.DataObject) -> None:
    """The steps of an epoch are a permutation of all units, the last batch kept, and each epoch has its own."""
    order = Order(num_units, batch_size, seed)
    epoch = data.draw(st.integers(0, 3))
    first = epoch * order.steps_per_epoch
    steps = [order.units(step) for step in range(first, first + order.steps_per_epoch)]

    assert sorted(unit for units in steps for unit in units) == list(range(num_units))
    assert all(len(units) == batch_size for units in steps[:-1])
    assert {order.epoch(step) for step in range(first, first + order.steps_per_epoch)} == {epoch}


def test_E9_a_step_needs_no_history() -> None:
    """What a step sees depends on the seed and its number alone, and epochs and seeds differ."""
    order = Order(50, 8, 7)
    seen = [order.units(step) for step in range(20)]

    assert [Order(50, 8, 7).units(step) for step in reversed(range(20))] == list(reversed(seen))
    assert order.units(0) != order.units(order.steps_per_epoch)
    assert order.units(0) != Order(50, 8, 8).units(0)


@settings(deadline=None)
@given(lengths=LONG_OR_SHORT, dp=st.integers(1, 5), multiple=st.integers(1, 3))
def test_E8_micro_batches_share_a_step(lengths: list[int], dp: int, multiple: int) -> None:
    """
    Whatever the layout, each unit of a step counts once, rows have as many micro-batches, and none is overfull but one
    that holds a single long unit. What is repeated does not count, and only where units are too few.

    Inverse check: without `_split` rows differ in their number here.
    """
    units = list(range(100, 100 + len(lengths)))
    rows = share(units, lengths, dp=dp, micro_batch_tokens=CAPACITY, multiple_of=multiple)
    counting = [micro for row in rows for micro in row if micro.counts]

    assert len(rows) == dp
    assert len({len(row) for row in rows}) == 1
    assert len(rows[0]) % multiple == 0
    assert sorted(unit for micro in counting for unit in micro.units) == units
    for micro in counting:
        assert sum(lengths[unit - 100] for unit in micro.units) <= CAPACITY or len(micro.units) == 1
        assert list(micro.units) == sorted(micro.units)
    for row in rows:
        repeated = sum(not micro.counts for micro in row)
        assert not repeated or all(len(micro.units) == 1 for micro in row)


def test_rows_have_about_as_many_tokens() -> None:
    """The longest units are dealt first, back and forth, so that no row waits long for another."""
    lengths = list(range(1, 41))
    rows = share(range(40), lengths, dp=4, micro_batch_tokens=64)
    tokens = [sum(lengths[unit] for micro in row for unit in micro.units) for row in rows]

    assert max(tokens) - min(tokens) <= 4


def test_too_few_units_are_repeated_without_weight() -> None:
    """A row that gets no unit repeats one that does not count, so that its pipeline runs."""
    rows = share([5], [3], dp=2, micro_batch_tokens=8)

    assert rows == [[MicroBatch((5,))], [MicroBatch((5,), counts=False)]]
    assert in_order([3, 3], 3, dp=1) == [[MicroBatch((0,)), MicroBatch((1,))]]


def test_the_heaviest_step_holds_the_longest_unit() -> None:
    """The step to try out first is that of the longest unit, where that is longer than a micro-batch."""
    lengths = [4] * 30
    lengths[17] = 90
    order = Order(30, 5, 3)

    found = heaviest(order, lengths, num_steps=6, dp=2, micro_batch_tokens=16)

    assert 17 in order.units(found.step)
    assert found.tokens == 90


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 50), min_size=40, max_size=120), seed=st.integers(0, 99), dp=st.integers(1, 2))
def test_the_heaviest_micro_batch_of_all_epochs_is_found(lengths: list[int], seed: int, dp: int) -> None:
    """
    As large as any that the run makes, whether a step is one micro-batch or several.

    Inverse seen: with the first epoch alone looked at, a later one holds a larger batch.
    """
    order, steps = Order(len(lengths), 2 * dp, seed), 5 * -(-len(lengths) // (2 * dp))

    def largest(capacity: int) -> int:
        rows = (
            share(units, [lengths[u] for u in units], dp=dp, micro_batch_tokens=capacity)
            for units in map(order.units, range(steps))
        )
        return max(sum(lengths[u] for u in micro.units) for dealt in rows for row in dealt for micro in row)

    for capacity in (1000, 64):
        found = heaviest(order, lengths, num_steps=steps, dp=dp, micro_batch_tokens=capacity)
        assert found.tokens == largest(capacity)
