"""Answers that an export writes by itself: exact match and F1 of the task `answer_qa`."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_jobs import JobDir, make_job, write_rows
from tiny import tiny_llama

from trilithon_finetune.phases.written import prompt_of
from trilithon_finetune.recipes.answer_qa import AnswerOptions, AnswerQa
from trilithon_finetune.recipes.base import Context, Sample
from trilithon_finetune.setup import open_base, read_job
from trilithon_finetune.train.work import open_work
from trilithon_server.prompts import Sequenced
from trilithon_server.tasks.answer_format import answer_prompt

ANSWERS = {"ball": "red", "tree": "green wood", "cup": "blue", "hat": "old", "stone": "quite small", "house": "new"}
LEARNED: list[dict[str, Any]] = [
    {"question": f"What is the {thing} like?", "answers": [answer]} for thing, answer in ANSWERS.items()
]
ASKED: list[dict[str, Any]] = [{**row, "answers": [*row["answers"], "nothing of the kind"]} for row in LEARNED]
WRONG: list[dict[str, Any]] = [*ASKED[:-1], {**ASKED[-1], "answers": ["rather old"]}]

MakeAsked = Callable[..., JobDir]


@pytest.fixture
def asked(tmp_path: Path, decoder_dir: Path) -> MakeAsked:
    """Makes and verifies a job that learns the answers by heart."""

    def make(valid: list[dict[str, Any]], *, base: Path = decoder_dir, **config: Any) -> JobDir:
        made = make_job(
            tmp_path,
            base,
            write_rows(tmp_path / "train.jsonl", LEARNED),
            write_rows(tmp_path / "valid.jsonl", valid),
            task="answer_qa",
            **{
                "training": {"epochs": 60, "batch_size": 6},
                "tuning": {"kind": "full"},
                "optimizer": {"lr": 5e-3},
                "eval": {"every_steps": 60},
                **config,
            },
        )
        return made.walk()

    return make


def numbers_of(made: JobDir) -> dict[str, float]:
    """What the phase `verify` measured."""
    numbers: dict[str, float] = made.outcome("verify")["data"]["numbers"]
    return numbers


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_model_that_knows_all_answers_writes_them(asked: MakeAsked, tmp_path: Path, kind: str) -> None:
    """
    Learned by heart, every answer is written to its end and no further: exact match is 1, of an adapter as of a model.

    The numbers stand in the record, the table, the events and the phase's outcome. Inverse checks: prompts a token too
    short; without the adapter.
    """
    base = tiny_llama(tmp_path / "base")  # frozen, so its embedding must be large enough to tell tokens apart
    made = asked(ASKED, base=base, tuning={"kind": kind}, optimizer={"lr": 1e-2})
    expected = {"exact_match": 1.0, "f1": 1.0, "written_answers": 6.0}
    (*_, told) = made.events("eval")
    with (made.root / "results" / "step_metrics.csv").open(encoding="utf-8", newline="") as file:
        (*_, row) = csv.DictReader(file)

    assert numbers_of(made) == expected
    assert told["data"] == {"step": 60, **expected}
    assert {name: float(row[name]) for name in expected} == expected
    assert float(row["valid_loss"]) > 0


def test_a_wrong_answer_is_counted_as_one(asked: MakeAsked) -> None:
    """Of six answers one isn't what is wanted: five sixths match, and F1 counts nothing of the other."""
    made = asked(WRONG)

    assert numbers_of(made) == pytest.approx({"exact_match": 5 / 6, "f1": 5 / 6, "written_answers": 6.0})


@pytest.mark.parametrize(("most", "expected"), [(0, None), (2, 2.0)])
def test_as_many_are_written_as_the_owner_wants(asked: MakeAsked, most: int, expected: float | None) -> None:
    """`written_answers` bounds how many questions are asked; 0 asks none, and nothing is told."""
    made = asked(ASKED, options={"written_answers": most}, training={"epochs": 1, "batch_size": 6})

    assert numbers_of(made).get("written_answers") == expected
    assert [("exact_match" in event["data"]) for event in made.events("eval")] == [False, *([True] if most else [])]


def test_the_model_is_asked_what_it_has_learned_to_answer(asked: MakeAsked) -> None:
    """The prompt of a sample is the server's text of its question, token by token."""
    made = asked(ASKED, training={"epochs": 1, "batch_size": 6})
    work = open_work(read_job(made.root))
    tokenizer = open_base(work.job).context.tokenizer
    samples = [work.prepared.valid.sample(index) for index in range(6)]

    expected = [tokenizer.encode(answer_prompt(row["question"]), add_special_tokens=True) for row in ASKED]
    assert [list(prompt_of(sample).ids) for sample in samples] == expected
    assert prompt_of(Sample((5, 6, 7), (6, 7, -1))) == Sequenced(ids=(5,))
    typed = Sample((5, 6, 7), (-1, 7, -1), types=(0, 3, 2), positions=(4, 0, 1))
    assert prompt_of(typed) == Sequenced(ids=(5, 6), types=(0, 3), positions=(4, 0), answer_type=2)


def test_answers_are_judged_as_squad_judges_them() -> None:
    """Case, articles and stops don't matter, any of the answers will do, and F1 counts shared words."""
    rows = {
        3: {"answers": ["nobody", {"text": "The Red Ball."}]},
        4: {"answers": ["two green hats"]},
        5: {"answers": ["blue"]},
    }
    texts = {3: " a red  ball\n", 4: " green hats", 5: " old"}
    context: Context = None  # type: ignore[assignment]  # nothing of it matters here
    found = AnswerQa().judge(texts, rows, context)

    assert found == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 0.8 + 0) / 3, "written_answers": 3.0})
    assert AnswerOptions().written_answers == 200
