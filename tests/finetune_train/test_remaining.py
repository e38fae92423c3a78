"""How long a run still takes, told from what was seen of it."""

from __future__ import annotations

import pytest

from trilithon_finetune.train.remaining import Remaining


class Run:
    """A run whose steps take 2 s, evaluations 30 s and checkpoints behind them 1 s of the step that follows."""

    def __init__(self, total: int, every: int, *, first: int = 1) -> None:
        self.now, self.total, self.every = 100.0, total, every
        self.remaining = Remaining(total, every, clock=lambda: self.now)
        self.told: dict[int, int | None] = {}
        self.ended: dict[int, float] = {}
        for step in range(first, total + 1):
            self.now += 2.0
            if step % every == 0 or step == total:
                self.now += 30.0
            self.told[step] = self.remaining.after(step, step_s=2.0)
            self.ended[step] = self.now

    def left(self, step: int) -> float:
        return self.now - self.ended[step]


@pytest.mark.parametrize(("total", "every"), [(40, 10), (43, 10), (40, 100), (12, 1)])
def test_evaluations_to_come_count_once_one_was_seen(total: int, every: int) -> None:
    """
    Before ten steps nothing is told; from the first evaluation on it is exact where all take what they took.

    Inverse checks: the last step's evaluation left out, or counted twice where the total is a multiple.
    """
    run = Run(total, every)
    assert [run.told[step] for step in range(1, 10)] == [None] * 9
    seen = [step for step in range(10, total + 1) if step >= every]
    assert [run.told[step] for step in seen] == [run.left(step) for step in seen]
    assert run.told[total] == 0


def test_a_resumed_run_counts_from_where_it_goes_on() -> None:
    """Its first steps are its own: what the attempt before took is not known."""
    run = Run(40, 10, first=16)
    assert [run.told[step] for step in range(16, 25)] == [None] * 9
    assert run.told[25] == run.left(25) == 15 * 2 + 2 * 30


def test_what_a_checkpoint_holds_up_counts_too() -> None:
    """A pause behind steps without an evaluation is spread over the steps to come; a slow step is not: the median."""
    now = 0.0
    remaining = Remaining(20, 20, clock=lambda: now)
    told: int | None = None
    for step in range(1, 11):
        now += 2.0 + (5.0 if step == 4 else 0.0)
        told = remaining.after(step, step_s=2.0)
    assert told == round(10 * 2.0 + 9 * 0.5)
    slow = Remaining(20, 20, clock=lambda: 0.0)
    assert [slow.after(step, step_s=90.0 if step == 3 else 1.0) for step in range(1, 11)][-1] == 10
