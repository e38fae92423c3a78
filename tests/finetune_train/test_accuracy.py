"""The share of tokens that a model says by itself, as a job tells it, against what others make of its export."""

from __future__ import annotations

import csv
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from finetune_jobs import JobDir

from trilithon_finetune.recipes.base import IGNORE
from trilithon_finetune.setup import read_job
from trilithon_finetune.train.work import Work, open_work

MakeJob = Callable[..., JobDir]

READERS = {
    "sft": transformers.AutoModelForCausalLM,
    "ner": transformers.AutoModelForTokenClassification,
    "mlm": transformers.AutoModelForMaskedLM,
}


def finished(made: JobDir) -> JobDir:
    """The job, up to its export."""
    made.phase("validate")
    made.phase("prepare")
    made.train_here()
    made.phase("export")
    return made


def rows_of(made: JobDir) -> list[dict[str, str]]:
    """The table of numbers that a job's owner gets."""
    with (made.root / "results" / "step_metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def accuracy_by_transformers(work: Work, model: Any) -> float:
    """Of every validation sample alone: the share of targets that argmax finds."""
    right = judged = 0
    for index in range(len(work.prepared.valid)):
        assert work.config.seed is not None
        sample = work.recipe.dress(work.prepared.valid.sample(index), seed=work.config.seed, epoch=0)
        types = {"token_type_ids": torch.tensor([sample.types])} if sample.types else {}
        with torch.inference_mode():
            logits_TV = model(input_ids=torch.tensor([sample.tokens]), **types).logits[0]
        targets_T = torch.tensor(sample.targets)
        right += int((logits_TV.argmax(-1) == targets_T).sum())
        judged += int((targets_T != IGNORE).sum())
    return right / judged


@pytest.mark.parametrize("task", sorted(READERS))
def test_validation_accuracy_is_what_transformers_finds(job: MakeJob, task: str) -> None:
    """
    `valid_mean_token_accuracy` is the share of learned tokens that argmax over transformers' logits gives.

    Inverse check: counting tokens that aren't learned too.
    """
    made = finished(job(task, tuning={"kind": "full"}, optimizer={"lr": 5e-3}, training={"epochs": 4}))
    model = READERS[task].from_pretrained(made.root / "export", dtype=torch.float32).eval()
    step = made.outcome("export")["data"]["step"]
    found = next(row for row in rows_of(made) if int(row["step"]) == step)

    expected = accuracy_by_transformers(open_work(read_job(made.root)), model)

    assert 0 < expected < 1
    assert float(found["valid_mean_token_accuracy"]) == pytest.approx(expected, rel=1e-12)


def test_columns_say_what_was_measured(job: MakeJob) -> None:
    """
    Each step has its accuracy; an evaluation reads the whole validation, so both of its pairs say the same; checkpoints
    carry all four.
    """
    made = finished(job("sft", optimizer={"lr": 5e-3}))
    rows = rows_of(made)
    checked = [row for row in rows if row["valid_loss"]]
    (*_, saved) = made.events("checkpoint_saved")

    assert all(0 <= float(row["train_mean_token_accuracy"]) <= 1 for row in rows)
    assert [row["step"] for row in checked] == ["3", "6"]
    assert all(row["valid_mean_token_accuracy"] == row["full_valid_mean_token_accuracy"] != "" for row in checked)
    assert all(row["valid_loss"] == row["full_valid_loss"] for row in checked)
    names = ("train_mean_token_accuracy", "valid_mean_token_accuracy", "full_valid_mean_token_accuracy")
    assert [saved["data"]["metrics"][name] for name in names] == [float(checked[-1][name]) for name in names]
    assert not any(row["valid_mean_token_accuracy"] for row in rows if row not in checked)


@pytest.mark.parametrize("task", ["dpo", "relation", "classify", "span_qa"])
def test_what_is_learned_as_a_whole_has_no_tokens_to_judge(job: MakeJob, task: str) -> None:
    """Pairs, texts and spans leave the columns of tokens empty."""
    rows = rows_of(finished(job(task)))

    for name in ("train_mean_token_accuracy", "valid_mean_token_accuracy", "full_valid_mean_token_accuracy"):
        assert {row[name] for row in rows} == {""}
    assert any(row["full_valid_loss"] for row in rows)
