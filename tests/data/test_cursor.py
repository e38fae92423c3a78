"""The cursor: which samples a rank takes, whatever the layout, and after any stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon_parallel.data.batches import Source, TrainingData
from trilithon_parallel.data.cursor import micro_batch_samples, step_samples
from trilithon_parallel.data.objectives import CausalLM
from trilithon_parallel.data.ramp import BatchSchedule


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_a_step_takes_the_next_samples_once(consumed: int, dp: int, micro_batch: int, num_micro: int) -> None:
    """All micro-batches of all ranks together are the next `batch_size` samples, each once; micro-batch by
    micro-batch the ranks' shares lie side by side."""
    batch_size = dp * micro_batch * num_micro
    shares = [
        step_samples(consumed, batch_size=batch_size, micro_batch=micro_batch, dp_rank=rank, dp=dp)
        for rank in range(dp)
    ]

    assert [len(share) for share in shares] == [num_micro] * dp
    taken = [sample for number in range(num_micro) for share in shares for sample in share[number]]
    assert taken == list(range(consumed, consumed + batch_size))
    for rank, share in enumerate(shares):
        for number, samples in enumerate(share):
            assert samples[0] == consumed + number * micro_batch * dp + rank * micro_batch


def _tokens_of_steps(
    data: TrainingData, schedule: BatchSchedule, layouts: Callable[[int], tuple[int, int]], train_samples: int
) -> list[np.ndarray]:
    """The tokens of each step, in the order of sample ids, as its ranks take them."""
    found = []
    for step in schedule.steps(train_samples):
        dp, micro_batch = layouts(step.step)
        batches = [
            data.micro_batch(samples)
            for rank in range(dp)
            for samples in step_samples(
                step.consumed, batch_size=step.batch_size, micro_batch=micro_batch, dp_rank=rank, dp=dp
            )
        ]
        rows = {i: row for b in batches for i, row in zip(b.sample_ids, b.tokens.reshape(-1, 16), strict=True)}
        found.append(np.concatenate([rows[i] for i in sorted(rows)]))
    return found


@pytest.fixture
def data(write_tokens: Callable[..., Path], tmp_path: Path) -> TrainingData:
    """A blend of two files, cut to 16 tokens."""
    sources = [Source(write_tokens("a", seed=1), 0.7), Source(write_tokens("b", seed=2), 0.3)]
    return TrainingData(
        sources, objective=CausalLM(), seq_len=16, seed=5, num_samples=200, vocab_size=100, cache_dir=tmp_path / "c"
    )


def test_E9_changing_dp_mid_run_leaves_the_stream_unchanged(data: TrainingData) -> None:
    """
    Steps hold the same tokens at dp 1, 2 and 4, at any micro-batch, and when they change on the way.

    Row 16 of what users of the neighbours hit (torchtitan#811, #816: a changed dp breaks the loader).
    Inverse seen: without `* dp` where a micro-batch begins, ranks take samples twice.
    """
    schedule = BatchSchedule.ramp(start=4, increment=4, samples=60, batch_size=16)
    one = _tokens_of_steps(data, schedule, lambda step: (1, 1), 180)
    changing = _tokens_of_steps(data, schedule, lambda step: [(1, 2), (2, 1), (4, 1), (2, 2), (1, 4)][step % 5], 180)

    assert len(one) == len(changing) > 10
    assert all(np.array_equal(a, b) for a, b in zip(one, changing, strict=True))


def test_E9_stopping_at_any_step_repeats_and_skips_nothing(data: TrainingData) -> None:
    """From the consumed samples of any step on, a new start sees exactly the samples that were left."""
    schedule = BatchSchedule.ramp(start=4, increment=4, samples=60, batch_size=16)
    steps = list(schedule.steps(180))
    expected = [list(range(step.consumed, step.consumed + step.batch_size)) for step in steps]

    for stop in range(len(steps)):
        resumed = schedule.steps(180, consumed=steps[stop].consumed, step=stop)
        taken = [
            [
                sample
                for rank in range(2)
                for samples in step_samples(s.consumed, batch_size=s.batch_size, micro_batch=2, dp_rank=rank, dp=2)
                for sample in samples
            ]
            for s in resumed
        ]
        assert [sorted(samples) for samples in taken] == expected[stop:]


def test_ids_go_on_beyond_32_bits() -> None:
    """A cursor is any whole number."""
    assert micro_batch_samples(2**40, number=1, micro_batch=4, dp_rank=1, dp=2) == range(2**40 + 12, 2**40 + 16)
