"""Batch-size ramps and learning rates by consumed samples, against the published recipes."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.ramp import BatchSchedule, LearningRate, Stage

GPT3 = {"start": 16, "increment": 16, "samples": 5_859_375, "batch_size": 1536}
MT_NLG = {"start": 32, "increment": 32, "samples": 5_859_375, "batch_size": 1920}
GPT3_RATE = LearningRate(peak=6e-5, floor=6e-6, warmup_samples=183_105, decay_samples=126_953_125)


def test_gpt3_ramp() -> None:
    """95 steps from 16 to 1536, each of the same number of samples."""
    schedule = BatchSchedule.ramp(**GPT3)

    assert len(schedule.stages) == 96
    assert [schedule.batch_at(c) for c in (0, 61_677, 61_678, 5_859_374, 5_859_375, 146_000_000)] == [
        16,
        16,
        32,
        1520,
        1536,
        1536,
    ]


def test_mt_nlg_ramp_fits_8_replicas_only() -> None:
    """The ramp of MT-NLG divides over dp 8, and over neither 10 nor 12: the first batch of 32 is named."""
    schedule = BatchSchedule.ramp(**MT_NLG)

    assert len(schedule.stages) == 60
    schedule.check_layout(dp=8, micro_batch=1)
    for dp in (10, 12):
        with pytest.raises(
            DataError, match=rf"batch size 32 \(stage 0 .*multiple of dp x micro-batch\. Given: {dp} x 1 = {dp}"
        ):
            schedule.check_layout(dp=dp, micro_batch=1)


@settings(max_examples=100, deadline=None)
@given(
    start=st.integers(1, 20), increment=st.integers(1, 20), steps=st.integers(1, 20), samples=st.integers(20, 10_000),
    consumed=st.integers(0, 20_000),
)  # fmt: skip
def test_ramp_is_the_formula(start: int, increment: int, steps: int, samples: int, consumed: int) -> None:
    """`start + floor(consumed / (samples / steps)) * increment`, and the last batch size afterwards."""
    last = start + steps * increment
    schedule = BatchSchedule.ramp(start=start, increment=increment, samples=samples, batch_size=last)

    expected = last if consumed > samples else start + consumed * steps // samples * increment
    assert schedule.batch_at(consumed) == expected


def test_list_of_batches() -> None:
    """`TOKENS:BATCH` with units; a border inside a sample takes effect after it."""
    schedule = BatchSchedule.parse("0:768 250B:1536 1.5T:3072", seq_len=2048)

    assert schedule.stages == (Stage(0, 768), Stage(122_070_313, 1536), Stage(732_421_875, 3072))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 12)), max_size=4, unique_by=lambda entry: entry[0]),
    st.integers(1, 400),
)
def test_steps_of_a_run(later: list[tuple[int, int]], train_samples: int) -> None:
    """Steps follow each other without a gap, from any cursor; their number is known without walking them."""
    text = " ".join(f"{tokens}:{batch}" for tokens, batch in [(0, 5), *sorted(later)])
    schedule = BatchSchedule.parse(text, seq_len=1)
    steps = list(schedule.steps(train_samples))

    assert steps[0].consumed == 0
    assert all(b.consumed == a.consumed + a.batch_size and b.step == a.step + 1 for a, b in pairwise(steps))
    assert schedule.whole_run(train_samples) == (len(steps), steps[-1].consumed + steps[-1].batch_size)
    middle = steps[len(steps) // 2]
    resumed = schedule.steps(train_samples, consumed=middle.consumed, step=middle.step)
    assert list(resumed) == steps[len(steps) // 2 :]


@pytest.mark.parametrize(
    "make",
    [
        lambda: BatchSchedule.ramp(start=16, increment=15, samples=100, batch_size=64),
        lambda: BatchSchedule.ramp(start=64, increment=16, samples=100, batch_size=64),
        lambda: BatchSchedule.ramp(start=16, increment=0, samples=100, batch_size=64),
        lambda: BatchSchedule.ramp(start=16, increment=16, samples=2, batch_size=64),
        lambda: BatchSchedule.parse("0:768 250X:1536", seq_len=8),
        lambda: BatchSchedule.parse("8:768", seq_len=8),
        lambda: BatchSchedule.parse("0:768 80:8 40:9", seq_len=8),
        lambda: BatchSchedule.parse("", seq_len=8),
        lambda: BatchSchedule.constant(0),
    ],
)
def test_R11_wrong_schedules_are_explained(make: object) -> None:
    """Each says what it must be and what was given."""
    with pytest.raises(DataError, match="Given: ") as raised:
        make()  # type: ignore[operator]

    assert raised.value.code == "batch_ramp"


def test_gpt3_learning_rate() -> None:
    """Warm-up from 0, a cosine from the end of the warm-up, the floor from 260B tokens on."""
    rate = GPT3_RATE
    middle = (183_105 + 126_953_125) / 2

    assert rate.at(0) == 0
    assert rate.at(183_105) == pytest.approx(6e-5, rel=1e-12)
    assert rate.at(round(183_105 / 2)) == pytest.approx(3e-5, rel=1e-4)
    assert rate.at(int(middle)) == pytest.approx(3.3e-5, rel=1e-6)
    quarter = 183_105 + round((126_953_125 - 183_105) / 4)
    assert rate.at(quarter) == pytest.approx(6e-6 + 0.5 * (1 + math.cos(math.pi / 4)) * 5.4e-5, rel=1e-6)
    assert rate.at(126_953_125) == rate.at(146_484_375) == 6e-6


def test_other_learning_rates() -> None:
    """Linear, constant, and warm-up-stable-decay."""
    linear = LearningRate(peak=1.0, floor=0.1, warmup_samples=10, decay_samples=110, kind="linear")
    constant = LearningRate(peak=1.0, floor=0.0, warmup_samples=10, decay_samples=0, kind="constant")
    wsd = LearningRate(peak=1.0, floor=0.2, warmup_samples=10, decay_samples=110, kind="wsd", cooldown_samples=40)

    assert [linear.at(c) for c in (5, 10, 60, 110, 200)] == pytest.approx([0.5, 1, 0.55, 0.1, 0.1])
    assert [constant.at(c) for c in (5, 10, 10**9)] == [0.5, 1, 1]
    assert [wsd.at(c) for c in (5, 10, 70, 90, 110, 200)] == pytest.approx([0.5, 1, 1, 0.6, 0.2, 0.2])


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["cosine", "linear", "constant", "wsd"]), st.integers(0, 50), st.integers(1, 200), st.data()
)  # fmt: skip
def test_learning_rate_rises_then_falls(kind: str, warmup: int, rest: int, data: st.DataObject) -> None:
    """Between 0 and the peak; never falling before the end of the warm-up, never rising after it; no jump there."""
    cooldown = data.draw(st.integers(1, rest)) if kind == "wsd" else 0
    rate = LearningRate(3.0, 1.0, warmup, warmup + rest, kind, cooldown)  # type: ignore[arg-type]
    rates = [rate.at(c) for c in range(warmup + rest + 5)]

    assert rates[warmup] == 3.0
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[-1] == (3.0 if kind == "constant" else 1.0)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@given(batch=st.integers(1, 9), warm=st.integers(0, 9), rest=st.integers(1, 20))
def test_a_warm_up_that_is_a_batch_ahead_wastes_no_step(kind: str, batch: int, warm: int, rest: int) -> None:
    """Step s of w has `peak * s / w`; what follows the warm-up is as it is without being ahead, and above 0."""
    plain = LearningRate(3.0, 0.0, warm * batch, (warm + rest) * batch, kind)  # type: ignore[arg-type]
    ahead = replace(plain, ahead_samples=batch)
    rates = [ahead.at(step * batch) for step in range(warm + rest)]

    assert rates[:warm] == pytest.approx([3.0 * s / warm for s in range(1, warm + 1)])
    assert rates[warm:] == [plain.at(step * batch) for step in range(warm, warm + rest)]
    assert min(rates) > 0


def test_R11_all_faults_of_a_learning_rate_are_listed() -> None:
    """One error names every field that is wrong."""
    with pytest.raises(DataError) as raised:
        LearningRate(1.0, 2.0, warmup_samples=-1, decay_samples=-5, kind="wsd", cooldown_samples=0, ahead_samples=-1)

    for name in ("floor", "warmup_samples", "decay_samples", "cooldown_samples", "ahead_samples"):
        assert name in raised.value.message
