"""Schedule tables: complete, free of deadlock, as fast and as frugal as the formulas say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilithon_parallel.schedule import (
    SCHEDULES,
    Op,
    Recv,
    Run,
    Schedule,
    ScheduleError,
    Send,
    forward_only,
    gpipe,
    group_size,
    interleaved,
    is_legal_group,
    one_f_one_b,
    schedule,
    with_messages,
)
from trilithon_parallel.simulate import check_messages, check_order, chrome_trace, picture, simulate

SIZES = [(p, v, m) for p in range(1, 9) for v in range(1, 5) for m in range(1, 18)]

# Training time of a batch with forward 1 and backward 2, (p, m, v): makespan. Derived from the schedules' definitions.
MAKESPANS = {
    (2, 4, 1): 15.0,
    (4, 4, 1): 21.0,
    (4, 8, 1): 33.0,
    (2, 2, 2): 7.5,
    (2, 4, 2): 13.5,
    (4, 4, 2): 16.5,
    (4, 8, 2): 28.5,
    (2, 6, 3): 19.0,
    (4, 28, 3): 87.0,
    (8, 48, 2): 154.5,
    (12, 12, 4): 44.25,
    (12, 60, 4): 188.25,
    (16, 144, 2): 454.5,
    (35, 280, 3): 874.0,
    (2, 3, 2): 10.5,
    (4, 5, 2): 19.5,
    (4, 9, 2): 31.5,
    (4, 10, 2): 34.5,
    (4, 3, 2): 15.0,
}

# (p, v, m) of the rows of arXiv 2104.04473, table 1, that have a pipeline.
PAPER_ROWS = [(2, 1, 12), (4, 3, 28), (8, 2, 48), (16, 2, 144), (35, 3, 280), (64, 1, 512)]


def _tables(p: int, v: int, m: int) -> Iterator[Schedule]:
    """Every table of these sizes, the interleaved one with every legal group."""
    yield gpipe(p, v, m)
    yield forward_only(p, v, m)
    if v == 1:
        yield one_f_one_b(p, v, m)
    else:
        yield from (interleaved(p, v, m, group=g) for g in range(1, m + 1) if is_legal_group(p, m, g))


def _training(p: int, v: int, m: int) -> Schedule:
    return schedule("1f1b" if v == 1 else "interleaved", p, v, m)


def test_every_table_is_complete_and_runs() -> None:
    """Every F and B once, dependencies met, no deadlock, no mispairing; also where each side waits at every message."""
    for sizes in SIZES:
        for table in _tables(*sizes):
            simulate(table)
            check_messages(with_messages(table))


def test_gradients_accumulate_in_microbatch_order() -> None:
    """On every stage the backwards come in the order 0 to m - 1, so that sums are those of one process, bit for bit."""
    for p, v, m in SIZES:
        for table in _tables(p, v, m):
            for ops in table.ranks if table.has_backward else ():
                for chunk in range(v):
                    assert [op.microbatch for op in ops if op.kind == "B" and op.chunk == chunk] == list(range(m))


def test_bubble_is_the_formula() -> None:
    """
    (p - 1) / (v m), exactly, for 1F1B and interleaved at every m >= p.

    Inverse: one forward less in the warm-up of either table turns this red, one more turns the peaks red.
    """
    for p, v, m in [sizes for sizes in SIZES if sizes[2] >= sizes[0]] + PAPER_ROWS:
        assert simulate(_training(p, v, m)).bubble == Fraction(p - 1, v * m), (p, v, m)


@pytest.mark.parametrize(("sizes", "expected"), MAKESPANS.items(), ids=str)
def test_makespans(sizes: tuple[int, int, int], expected: float) -> None:
    """The simulated time of a batch, where p divides m, where it does not, and below p."""
    p, m, v = sizes

    assert simulate(_training(p, v, m)).makespan == Fraction(expected)


def test_gpipe_has_the_bubble_of_1f1b() -> None:
    """GPipe takes as long as 1F1B and keeps more."""
    for p, m in [(2, 4), (4, 8), (8, 16)]:
        plain, frugal = simulate(gpipe(p, 1, m)), simulate(one_f_one_b(p, 1, m))
        assert plain.bubble == frugal.bubble == Fraction(p - 1, m)
        assert max(frugal.peak_activations) == p < max(plain.peak_activations) == m


def test_peak_activations_are_the_formulas() -> None:
    """GPipe keeps m * v chunks, 1F1B min(m, p - r), interleaved min(m v, 2 (p - r - 1) + (v - 1) g + 1)."""
    for p, v, m in SIZES:
        assert simulate(gpipe(p, v, m)).peak_activations == (m * v,) * p
        assert simulate(forward_only(p, v, m)).peak_activations == (0,) * p
        if v == 1:
            assert simulate(one_f_one_b(p, 1, m)).peak_activations == tuple(min(m, p - r) for r in range(p))
        for g in [g for g in range(1, m + 1) if v > 1 and is_legal_group(p, m, g)]:
            expected = tuple(min(m * v, 2 * (p - r - 1) + (v - 1) * g + 1) for r in range(p))
            assert simulate(interleaved(p, v, m, group=g)).peak_activations == expected, (p, v, m, g)


def test_golden_table_of_two_ranks_with_two_chunks() -> None:
    """The table of p=2, v=2, m=4, op by op."""
    rank0, rank1 = (" ".join(map(str, ops)) for ops in schedule("interleaved", 2, 2, 4).ranks)

    assert rank0 == "F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0"
    assert rank1 == "F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0"


def test_group_sizes() -> None:
    """The least group of p or more without a short last group; all micro-batches where they are fewer than p."""
    sizes = {(5, 4): 5, (9, 4): 5, (5, 2): 3, (17, 8): 9, (8, 4): 4, (3, 4): 3}

    assert {(m, p): group_size(p, m) for m, p in sizes} == sizes


def test_short_last_group_deadlocks() -> None:
    """Five micro-batches in groups of four, on four ranks: the simulator says who waits for what."""
    with pytest.raises(ScheduleError, match=r"deadlocks: rank 0 before F4\.2, .* rank 3 before B0\.1") as caught:
        simulate(interleaved(4, 3, 5, group=4))

    assert caught.value.code == "schedule_deadlock"


def test_one_channel_for_both_kinds_would_mispair_between_two_ranks() -> None:
    """Why gradients have a channel of their own: with one, p = 2 mispairs at g > 2 and nothing else does."""
    mispaired = []
    for p, v, m in SIZES:
        for g in [g for g in range(1, m + 1) if p > 1 and v > 1 and is_legal_group(p, m, g)]:
            try:
                check_order(interleaved(p, v, m, group=g), shared_channel=True)
            except ScheduleError as error:
                mispaired.append((p, g, error.code))

    assert mispaired
    assert all(p == 2 and g > 2 and code == "schedule_mispaired" for p, g, code in mispaired)


def test_incomplete_tables_are_named() -> None:
    """A missing and a doubled op are both reported."""
    good = schedule("1f1b", 2, 1, 3)
    ops = tuple(Op("F", 0, 0) if op == Op("F", 1, 0) else op for op in good.ranks[1])

    with pytest.raises(ScheduleError, match=r"rank 1 .*F0\.0, F1\.0") as caught:
        simulate(replace(good, ranks=(good.ranks[0], ops)))

    assert caught.value.code == "schedule_incomplete"


def test_mispaired_order_is_named() -> None:
    """A rank that uses micro-batches in another order than its neighbour makes them."""
    good = gpipe(2, 1, 2)
    swapped = (good.ranks[1][1], good.ranks[1][0], *good.ranks[1][2:])

    with pytest.raises(ScheduleError, match="from rank 0 to rank 1: the activation of micro-batch 0") as caught:
        simulate(replace(good, ranks=(good.ranks[0], swapped)))

    assert caught.value.code == "schedule_mispaired"


def test_message_tables_are_checked_too() -> None:
    """Two receives in another order than the sends mispair; receives of each side before its sends deadlock."""
    tables = with_messages(gpipe(2, 1, 2))
    receives = [i for i, step in enumerate(tables[1]) if isinstance(step, Recv)]
    first, second = receives[:2]
    swapped = list(tables[1])
    swapped[first], swapped[second] = swapped[second], swapped[first]
    with pytest.raises(ScheduleError) as mispaired:
        check_messages([tables[0], swapped])
    late = [sorted(steps, key=lambda step: isinstance(step, Send)) for steps in tables]
    with pytest.raises(ScheduleError) as deadlock:
        check_messages(late)

    assert mispaired.value.code == "schedule_mispaired"
    assert deadlock.value.code == "schedule_deadlock"


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    pp=st.integers(1, 12),
    virtual=st.integers(1, 4),
    num_microbatches=st.integers(1, 40),
)
def test_messages_stand_between_their_ops(name: str, pp: int, virtual: int, num_microbatches: int) -> None:
    """A tensor is sent after it was made and received before it is used; taking the messages away gives the table."""
    virtual = {"1f1b": 1, "interleaved": max(virtual, 2)}.get(name, virtual)
    table = schedule(name, pp, virtual, num_microbatches)

    for rank, steps in enumerate(with_messages(table)):
        assert tuple(step.op for step in steps if isinstance(step, Run)) == table.ranks[rank]
        there = set()
        for step in steps:
            if isinstance(step, Recv):
                there.add(step.message)
            elif isinstance(step, Send):
                assert step.message in there
            else:
                assert step.takes is None or step.takes in there
                there.add(step.makes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zigzag", 2, 1, 4), "schedule must be one of gpipe, 1f1b, interleaved, forward_only. Given: 'zigzag'."),
        (("1f1b", 2, 2, 4), "Given: virtual = 2. Use interleaved"),
        (("interleaved", 2, 1, 4), "Given: virtual = 1. Use 1f1b"),
        (("gpipe", 0, 1, 4), "pp must be 1 or more. Given: 0."),
        (("gpipe", 2, 1, 0), "num_microbatches must be 1 or more. Given: 0."),
    ],
)
def test_sizes_that_no_schedule_has(arguments: tuple[str, int, int, int], message: str) -> None:
    """Wrong sizes are refused with the value and what to do."""
    with pytest.raises(ScheduleError, match=message) as caught:
        schedule(*arguments)

    assert caught.value.code == "schedule_invalid"


def test_times_may_be_any_fractions() -> None:
    """Stage times scale the timeline; only their ratio shapes it."""
    table = schedule("interleaved", 4, 2, 8)
    third = simulate(table, forward=Fraction(1, 3), backward=Fraction(2, 3))

    assert third.makespan == simulate(table).makespan / 3
    assert simulate(table, forward=1, backward=1).makespan == Fraction(19)
    with pytest.raises(ScheduleError, match="above 0"):
        simulate(table, forward=0)


def test_picture_of_interleaved_chunks() -> None:
    """One row per chunk; dots are idle."""
    expected = """\
rank 0 chunk 0  01  ..  .  0=1=
       chunk 1    01..0=.1=
rank 1 chunk 0  .01      0=1=..
       chunk 1  .  00=11=    .."""

    assert picture(simulate(schedule("interleaved", 2, 2, 2))) == expected


def test_trace_opens_in_chrome() -> None:
    """Every op is one complete event on its rank's row, in microseconds."""
    table = schedule("interleaved", 2, 2, 4)
    events = json.loads(chrome_trace(simulate(table)))["traceEvents"]
    runs = [event for event in events if event["ph"] == "X"]

    assert len(runs) == 2 * 2 * 2 * 4
    assert max(event["ts"] + event["dur"] for event in runs) == 13_500
    assert [event["name"] for event in runs if event["tid"] == 0] == [str(op) for op in table.ranks[0]]
