"""
Whole samples into bins of so many tokens. A bin is what a rank holds at once: attention never crosses the borders of
its samples, which travel beside the tokens, so packing changes the speed of learning and nothing else.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from trilithon_parallel.data.errors import DataError


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """
    Pack whole samples into bins, best fit first.

    >>> pack([3, 5, 2], capacity=5)
    [[1], [0, 2]]

    Args:
        lengths: tokens per sample, each from 1 to `capacity`.
        capacity: tokens per bin.
    Returns:
        Sample indices per bin; bins in the order they were opened.
    Raises:
        DataError: E-DATA-021, a sample is longer than `capacity`.
    Source: best-fit decreasing (Johnson et al. 1974).
    """
    if lengths and max(lengths) > capacity:
        at = max(range(len(lengths)), key=lengths.__getitem__)
        raise DataError(
            f"sample {at} must have at most {capacity} tokens to be packed. Given: {lengths[at]}.",
            code="E-DATA-021",
            hint="Raise the capacity, or shorten the sample.",
        )
    bins: list[list[int]] = []
    # (room, bin) of every bin, rising: the first with enough room is the fullest that fits.
    rooms: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, (lengths[index], -1))
        if at == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(at)
        bins[number].append(index)
        bisect.insort(rooms, (room - lengths[index], number))
    return [sorted(items) for items in bins]


def pack_shuffled(lengths: Sequence[int], capacity: int, *, window: int, seed: int) -> list[list[int]]:
    """
    Pack samples in a random order, `window` of them at a time, so that a bin's samples are not alike in length alone.

    >>> pack_shuffled([2, 2, 2, 2], capacity=4, window=2, seed=0)
    [[2, 3], [1, 0]]

    Args:
        lengths, capacity: as for `pack`.
        window: samples that are packed together.
        seed: of the order.
    Returns:
        Sample indices per bin, each index once.
    Raises:
        DataError: as `pack`.
    """
    order = np.random.RandomState(seed).permutation(len(lengths)).tolist()
    bins: list[list[int]] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        bins += [[part[i] for i in items] for items in pack([lengths[i] for i in part], capacity)]
    return bins


def efficiency(lengths: Sequence[int], bins: Sequence[Sequence[int]], capacity: int) -> float:
    """
    The share of the bins' room that tokens fill.

    >>> efficiency([3, 5, 2], [[1], [0, 2]], 5)
    1.0
    """
    return sum(lengths) / (len(bins) * capacity) if bins else 0.0
