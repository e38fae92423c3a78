"""Jobs that learn to ask: by heart, and with token types in place of marks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_jobs import JobDir, make_job, write_rows
from tiny import tiny_llama

from trilithon_finetune import merging
from trilithon_finetune.recipes.squad_rows import first_answer
from trilithon_parallel.config import load_config
from trilithon_server import LLM, SamplingParams
from trilithon_server.tasks import read_task
from trilithon_server.tasks.question_format import QuestionFormat, read_question

MakeJob = Callable[..., JobDir]

ASKED = [
    ("The old mason set two stones upright.", "two stones", "What did the old mason set upright?"),
    ("The miller counted 12 sacks before noon.", "12", "How many sacks did the miller count?"),
    ("The river froze in winter and ran in spring.", "winter", "When did the river freeze?"),
    ("Ada wrote the letter twice, once in pencil.", "Ada", "Who wrote the letter twice?"),
    ("Noor walked two days to reach the sea.", "the sea", "Where did Noor walk to?"),
    ("The child asked why the stone did not fall.", "The child", "Who asked about the stone?"),
    ("The market opens every Friday at nine.", "Friday", "On which day does the market open?"),
    ("The baker sold his bread for a silver coin.", "a silver coin", "What did the bread cost?"),
]


def _row(context: str, answer: str, question: str) -> dict[str, Any]:
    return {
        "context": context,
        "question": question,
        "answers": [{"text": answer, "answer_start": context.index(answer)}],
    }


@pytest.fixture(scope="module")
def small_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 layers of width 128."""
    path = tmp_path_factory.mktemp("decoder") / "m"
    return tiny_llama(path, hidden=128, layers=4, heads=4, groups=4, ffn=256, scale=0.2)


def test_acc_E04_questions_are_learned_by_heart(tmp_path: Path, small_decoder: Path) -> None:
    """
    After learning 8 passages the export asks at least 90 % of their questions, word for word, greedily, and its own
    numbers say so. Inverse seen red: prompts whose answer is the text's first word.
    """
    rows = [_row(*item) for item in ASKED]
    made = make_job(
        tmp_path,
        small_decoder,
        write_rows(tmp_path / "train.jsonl", rows),
        write_rows(tmp_path / "valid.jsonl", [{**row, "title": "again"} for row in rows]),
        task="question_gen",
        training={"epochs": 40, "batch_size": 8},
        tuning={"kind": "full"},
        optimizer={"lr": 4e-3},
        eval={"every_steps": 40},
        checkpoint={"every_steps": 40},
    ).walk()
    format_ = read_task(made.root / "export")
    assert isinstance(format_, QuestionFormat)
    with LLM(made.root / "export", dtype="float32") as llm:
        prompts = [list(format_.pack(row["context"], first_answer(row), llm.tokenizer).tokens) for row in rows]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=format_.max_question))
    asked = [read_question(output.choices[0].text) for output in outputs]
    right = sum(question == row["question"] for question, row in zip(asked, rows, strict=True))
    numbers = made.outcome("verify")["data"]["numbers"]

    assert right / len(rows) >= 0.9
    assert numbers["rouge_l"] >= 0.9
    assert numbers["parsed"] == 1.0


def test_a_merged_adapter_keeps_its_task(job: MakeJob, decoder_dir: Path, tmp_path: Path) -> None:
    """The model that an adapter is merged into is asked in the format that the adapter learned."""
    made = job("question_gen").walk()
    code = merging.main([str(decoder_dir), str(made.root / "export"), str(tmp_path / "merged")])

    assert code == 0
    assert isinstance(read_task(tmp_path / "merged"), QuestionFormat)
    assert read_task(tmp_path / "merged") == read_task(made.root / "export")


def test_token_types_are_trained_with_all_of_the_model(job: MakeJob) -> None:
    """The export has a table of three types that began at zero and learned, and its task file says how to read it."""
    made = job("question_gen", tuning={"kind": "full"}, options={"roles": "types"}, optimizer={"lr": 5e-3}).walk()
    export = made.root / "export"

    assert load_config(export).token_types == 3
    assert json.loads((export / "task.json").read_text("utf-8"))["roles"] == "types"
    assert made.losses()[-1] < made.losses()[0]


def test_R11_an_adapter_has_no_place_for_token_types(job: MakeJob) -> None:
    """One sentence, before anything is trained."""
    made = job("question_gen", options={"roles": "types"})
    outcome = made.try_phase("validate")

    assert outcome["error"]["code"] == "lora_not_servable"
    assert "options.roles" in outcome["error"]["hint"]
