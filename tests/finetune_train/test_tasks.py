"""Every task from its rows to a verified export."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from finetune_jobs import JobDir
from task_rows import DECODER_TASKS, ENCODER_TASKS

MakeJob = Callable[..., JobDir]


@pytest.mark.parametrize("task", [*DECODER_TASKS, *ENCODER_TASKS])
def test_a_task_learns_and_its_export_is_verified(job: MakeJob, task: str) -> None:
    """Each task's rows are checked, learned and exported, the loss falls, and the export says what the trainer said."""
    made = job(task, optimizer={"lr": 5e-3 if task in DECODER_TASKS else 1e-3})
    report = made.phase("validate")["report"]
    made.phase("prepare")
    made.train_here()
    exported = made.phase("export")
    verified = made.phase("verify")

    assert report["ok"]
    assert report["rows"] == 20
    losses = made.losses()
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert exported["kind"] == ("adapter" if task in DECODER_TASKS else "model")
    assert verified["max_abs"] <= 1e-4
    assert {event["kind"] for event in made.events()} >= {"running", "step", "eval", "checkpoint_saved", "verified"}
