"""
Which samples each step sees, and how the ranks of a layout share them.

Both are pure functions: of (seed, step) the first, of the step's samples and the layout the second. So a run that
resumes needs no state beside its step, and one that resumes on another layout sees the same samples in every step.

A unit is what stays together: one sample, or a pair of neighbours (chosen and rejected).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trilithon_finetune.data.packing import pack


@dataclass(frozen=True)
class Order:
    """
    The order of training: a permutation of all units per epoch, cut into batches; the last one may be smaller.

    Attributes:
        num_units: at least 1.
        batch_size: units of a step.
        seed: of the permutations.
    """

    num_units: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every unit once."""
        return -(-self.num_units // self.batch_size)

    def units(self, step: int) -> tuple[int, ...]:
        """
        The units of a step.

        Args:
            step: from 0, over all epochs.
        """
        epoch, at = divmod(step, self.steps_per_epoch)
        order = _permutation(self.num_units, self.seed, epoch)
        return tuple(order[at * self.batch_size : (at + 1) * self.batch_size].tolist())

    def epoch(self, step: int) -> int:
        """Which pass over the data a step belongs to, from 0."""
        return step // self.steps_per_epoch


@functools.lru_cache(maxsize=2)
def _permutation(num_units: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.RandomState([seed, epoch]).permutation(num_units)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """
    What one rank holds at once.

    Attributes:
        units: rising in the order of the step.
        counts: False where its units are another rank's or an earlier micro-batch's, repeated with no weight: a
            pipeline needs as many micro-batches on every rank, and there were too few units.
    """

    units: tuple[int, ...]
    counts: bool = True


def share(
    units: Sequence[int], lengths: Sequence[int], *, dp: int, micro_batch_tokens: int, multiple_of: int = 1
) -> list[list[MicroBatch]]:
    """
    Cut the units of a step into micro-batches for each data-parallel row.

    Rows get their units like cards, the longest first and back and forth, so that they have about as many tokens. A
    row packs them best fit, and splits its largest micro-batches until all rows have as many.

    >>> [[m.units for m in row] for row in share([7, 8, 9], [4, 3, 2], dp=2, micro_batch_tokens=8)]
    [[(7,)], [(8, 9)]]

    Args:
        units: of the step.
        lengths: tokens of each.
        dp: data-parallel rows.
        micro_batch_tokens: of a micro-batch, at most; a longer unit goes alone.
        multiple_of: the number of micro-batches is a multiple of it (an interleaved pipeline needs that).
    Returns:
        [dp][micro-batch], as many in every row; each unit counts once.
    """
    assert units
    dealt: list[list[int]] = [[] for _ in range(dp)]
    for turn, index in enumerate(sorted(range(len(units)), key=lambda i: -lengths[i])):
        lap, seat = divmod(turn, dp)
        dealt[seat if lap % 2 == 0 else dp - 1 - seat].append(index)
    rows = [_cut(sorted(hand), lengths, micro_batch_tokens) for hand in dealt]
    number = max(map(len, rows))
    number += -number % multiple_of
    return [
        [
            *(MicroBatch(tuple(units[i] for i in part)) for part in _split(row, lengths, number)),
            *[MicroBatch((units[min(range(len(units)), key=lengths.__getitem__)],), counts=False)]
            * (number - sum(map(len, row))),
        ]
        for row in rows
    ]


@dataclass(frozen=True, slots=True)
class Heaviest:
    """
    The step with the largest micro-batch.

    Attributes:
        tokens: of that micro-batch. micro_batches: that a rank holds in the step.
    """

    step: int
    tokens: int
    micro_batches: int


_LOOKED_AT = 2000  # steps whose micro-batches are made to find the heaviest; they are those with the most tokens


def heaviest(
    order: Order, lengths: Sequence[int], *, num_steps: int, dp: int, micro_batch_tokens: int, multiple_of: int = 1
) -> Heaviest:
    """
    What memory must hold, found without making the micro-batches of every step.

    Where a step is one micro-batch, it is the one with the most tokens. Else micro-batches are filled to the brim, and
    the largest is found among the first so many steps by their tokens, and the one with the longest unit.

    Args:
        lengths: tokens of every unit.
        num_steps: of the run.
        dp, micro_batch_tokens, multiple_of: as for `share`.
    """
    held = np.asarray(lengths, dtype=np.int64)
    sums = np.concatenate([_batch_sums(order, held, epoch) for epoch in range(order.epoch(num_steps - 1) + 1)])
    steps = {int(step) for step in np.argsort(-sums[:num_steps], kind="stable")[:_LOOKED_AT]}
    at = int(np.flatnonzero(_permutation(order.num_units, order.seed, 0) == held.argmax())[0])
    steps.add(min(at // order.batch_size, num_steps - 1))

    def look(step: int) -> Heaviest:
        units = order.units(step)
        rows = share(
            units, [lengths[u] for u in units], dp=dp, micro_batch_tokens=micro_batch_tokens, multiple_of=multiple_of
        )
        tokens = max(sum(int(lengths[u]) for u in micro.units) for row in rows for micro in row)
        return Heaviest(step, tokens, len(rows[0]))

    return max(map(look, sorted(steps)), key=lambda found: (found.tokens, found.micro_batches))


def _batch_sums(order: Order, lengths: npt.NDArray[np.int64], epoch: int) -> npt.NDArray[np.int64]:
    """Tokens of every step of an epoch."""
    permuted = lengths[_permutation(order.num_units, order.seed, epoch)]
    sums: npt.NDArray[np.int64] = np.add.reduceat(permuted, np.arange(0, order.num_units, order.batch_size))
    return sums


def in_order(lengths: Sequence[int], micro_batch_tokens: int, *, dp: int) -> list[list[MicroBatch]]:
    """
    All units in micro-batches for a validation, as `share` cuts them.

    Args:
        lengths: tokens of every unit, at least one unit.
    """
    return share(range(len(lengths)), lengths, dp=dp, micro_batch_tokens=micro_batch_tokens)


def _cut(indices: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit micro-batches; what is beyond the capacity goes alone."""
    long = [i for i in indices if lengths[i] > capacity]
    fitting = [i for i in indices if lengths[i] <= capacity]
    bins = pack([lengths[i] for i in fitting], capacity)
    return [[i] for i in long] + [[fitting[i] for i in items] for items in bins]


def _split(parts: list[list[int]], lengths: Sequence[int], number: int) -> Iterator[list[int]]:
    """As many parts as asked for, or as there are units: the largest that has two units is halved until it is so."""
    parts = list(parts)
    while len(parts) < number and any(len(part) > 1 for part in parts):
        largest = max((p for p in parts if len(p) > 1), key=lambda part: sum(lengths[i] for i in part))
        parts.remove(largest)
        parts += _halves(largest, lengths)
    yield from sorted(parts)


def _halves(part: Sequence[int], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Two parts of about as many tokens, neither empty."""
    first: list[int] = []
    second: list[int] = []
    for index in sorted(part, key=lambda i: -lengths[i]):
        lighter = min(first, second, key=lambda half: sum(lengths[i] for i in half))
        lighter.append(index)
    return sorted(first), sorted(second)
