"""Blends: golden orders, proportions at every prefix, the published blend of MT-NLG."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon_parallel.data.blend import (
    MT_NLG_BLEND,
    MT_NLG_TOKENS,
    BlendIndex,
    blend,
    blend_exhaustively,
)
from trilithon_parallel.data.errors import DataError


@pytest.mark.parametrize(
    ("weights", "order"),
    [((0.5, 0.3, 0.2), [0, 1, 2, 0, 1, 0, 2, 0, 1, 0]), ((0.2, 0.3, 0.5), [2, 1, 0, 2, 1, 2, 0, 2, 1, 2])],
)
def test_golden_orders(weights: tuple[float, ...], order: list[int]) -> None:
    """Whole orders, weights of any scale. Inverse seen: without `max(k, 1)` the first sample comes from source 0."""
    assert blend(weights, 10).tolist() == order
    assert blend([100 * weight for weight in weights], 10).tolist() == order


def test_ties_go_to_the_first() -> None:
    """Equal sources take turns. Inverse seen: the last of equal errors."""
    assert blend((1, 1, 1), 7).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_mt_nlg_blend() -> None:
    """
    The published weights give exactly their counts in 100,000 samples, and stay within 1.05 samples all along.

    The epochs that follow from weights and sizes are the printed ones within 0.15.
    """
    weights = [source.weight for source in MT_NLG_BLEND]
    order = blend(weights, 100_000)

    assert sum(weights) == pytest.approx(100, abs=1e-9)
    assert np.bincount(order).tolist() == [round(1000 * weight) for weight in weights]
    drawn = np.cumsum(order[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, 100_001)[:, None] * (np.array(weights) / 100)
    assert np.abs(drawn - due).max() < 1.05
    for source in MT_NLG_BLEND:
        assert source.epochs_of(MT_NLG_TOKENS) == pytest.approx(source.epochs, abs=0.15), source.name


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 300))
def test_every_sample_has_its_place(weights: list[int], num_samples: int) -> None:
    """Each source's samples are taken in order without a gap, and a shorter blend begins a longer one."""
    order = blend(weights, num_samples)
    index = BlendIndex.of(order, len(weights))
    places = [index.locate(k) for k in range(num_samples)]

    for source in range(len(weights)):
        numbers = [number for place, number in places if place == source]
        assert numbers == list(range(index.num_samples(source)))
    assert np.array_equal(order, blend(weights, num_samples + 50)[:num_samples])


def test_places_across_blocks() -> None:
    """Counting starts anew in every block of the index; the numbers go on."""
    index = BlendIndex.of(blend((3, 1), 10_000), 2)

    assert [index.locate(k) for k in (0, 4095, 4096, 8191, 8192, 9999)] == [
        (int(index.sources[k]), int(np.count_nonzero(index.sources[:k] == index.sources[k])))
        for k in (0, 4095, 4096, 8191, 8192, 9999)
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_exhaustive_blend_takes_everything_once(sizes: list[int]) -> None:
    """Every sample of every source, no more."""
    assert np.bincount(blend_exhaustively(sizes), minlength=len(sizes)).tolist() == sizes


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ((), "must have from 1 to 256 sources. Given: 0"),
        ((1.0,) * 257, "Given: 257"),
        ((1.0, 0.0), "blend weight 1 must be a number above 0. Given: 0.0"),
        ((-1.0,), "blend weight 0 must be a number above 0. Given: -1.0"),
        ((float("nan"),), "Given: nan"),
        ((float("inf"),), "Given: inf"),
    ],
)
def test_R11_wrong_weights_are_explained(weights: tuple[float, ...], sentence: str) -> None:
    """A weight is a positive number."""
    with pytest.raises(DataError) as raised:
        blend(weights, 10)

    assert sentence in raised.value.message
