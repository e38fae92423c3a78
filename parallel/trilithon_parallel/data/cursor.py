"""
Which samples a rank takes: arithmetic on the number of samples consumed so far, the only thing a checkpoint keeps.

A step takes the next samples of the one global stream. Within it, micro-batch j of dp rank r takes samples
`[consumed + j * b * dp + r * b, ... + b)`. So neither dp nor the micro-batch size b changes which samples a step has.
"""

from __future__ import annotations


def micro_batch_samples(consumed: int, *, number: int, micro_batch: int, dp_rank: int, dp: int) -> range:
    """
    The sample ids of one micro-batch.

    >>> [micro_batch_samples(8, number=j, micro_batch=2, dp_rank=1, dp=2) for j in range(2)]
    [range(10, 12), range(14, 16)]

    Args:
        consumed: samples before this step.
        number: of the micro-batch within the step, from 0.
        micro_batch: samples in it.
        dp_rank, dp: place and size of the data-parallel axis.
    """
    assert 0 <= dp_rank < dp, f"dp rank {dp_rank} of {dp}"
    begin = consumed + (number * dp + dp_rank) * micro_batch
    return range(begin, begin + micro_batch)


def step_samples(consumed: int, *, batch_size: int, micro_batch: int, dp_rank: int, dp: int) -> list[range]:
    """
    The sample ids of every micro-batch that a dp rank has in a step, in order.

    Args:
        batch_size: samples of the step on all ranks together; a multiple of `micro_batch * dp`.
    """
    assert batch_size % (micro_batch * dp) == 0, f"a batch of {batch_size} over {dp} ranks by {micro_batch}"
    return [
        micro_batch_samples(consumed, number=number, micro_batch=micro_batch, dp_rank=dp_rank, dp=dp)
        for number in range(batch_size // (micro_batch * dp))
    ]
