"""
Task `answer_qa`: answer questions in own words. Rows are

    {"question": "...", "answers": ["...", {"text": "..."}], "context": "..."}

with the context left out where the model is to answer from memory. The first answer is learned; of the answers that the
exported model writes to validation questions any is accepted. The text around them is that of
`trilithon_server.tasks.answer_format`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, JsonValue

from trilithon_finetune.config import Section
from trilithon_finetune.converters.squad import read_squad
from trilithon_finetune.data.findings import Finding, shown
from trilithon_finetune.data.placed import PlacedRow
from trilithon_finetune.metrics.squad import best_of, exact_match, token_f1
from trilithon_finetune.recipes.base import Context, Defaults, Head, Output, Recipe, Sample, Writing
from trilithon_finetune.recipes.fields import Best, RowCheck
from trilithon_finetune.recipes.questions import encode_question
from trilithon_server.tasks.answer_format import ANSWER_END, answer_prompt, answer_text, read_answer

QUESTION = "question/answers"
NESTED = "data/paragraphs/qas"

KEYS = ("question", "answers", "context", "id", "title", "document_id", "is_impossible")


class AnswerOptions(Section):
    """Options of the task `answer_qa`."""

    written_answers: Annotated[int, Field(ge=0)] = 200
    """Validation questions, at most, that the export answers in its own words, for `exact_match` and `f1`; 0: none."""


class AnswerQa(Recipe):
    """The recipe of `answer_qa`."""

    task = "answer_qa"
    head: Head = "vocabulary"
    formats: tuple[str, ...] = (QUESTION, NESTED)
    defaults = Defaults(lr_full=2e-5, max_tokens=512, warmup_ratio=0.05, betas=(0.9, 0.95))
    Options: type[Section] = AnswerOptions
    best_metric: Best = ("valid_loss", "min")

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By a question or answers; rows of a nested document know their path."""
        if isinstance(row, PlacedRow):
            return NESTED
        return QUESTION if "question" in row or "answers" in row else None

    def rows_of(self, document: bytes, *, file: str) -> Sequence[Mapping[str, Any]] | Sequence[Finding] | None:
        """Questions of a nested SQuAD document."""
        return read_squad(document, file=file)

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """A question with at least one answer."""
        check = RowCheck(row, file=file, line=line, prefix=row.path if isinstance(row, PlacedRow) else "")
        check.keys(KEYS)
        check.text("question")
        if "context" in row:
            check.value("context", str)
        answers = check.value("answers", list)
        if answers is None:
            return check.findings
        if not answers:
            check.add("E-DATA-015", "answers", "is empty.", "Give at least one answer, or remove the row.")
        for i, answer in enumerate(answers):
            text = _text(answer)
            if text is None:
                rule = f'must be a text, or an object with "text". Given: {shown(answer)}.'
                check.add("E-DATA-008", f"answers[{i}]", rule)
            elif not text.strip():
                check.add("E-DATA-015", f"answers[{i}]", "is empty.")
        return check.findings

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """None."""
        return ()

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> Sequence[Sample | Finding]:
        """The question with its first answer supervised."""
        answer = answer_text(_text(row["answers"][0]) or "")

        def prompt(passage: str) -> str:
            return answer_prompt(row["question"], passage)

        return encode_question(prompt, row.get("context", ""), answer, context, file=file, line=line, path="answers[0]")

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """The loss says it all while training; exact match and F1 need answers that the export writes."""
        return {}

    def writing(self, context: Context) -> Writing | None:
        """So many questions, each answered on one line."""
        options = context.options
        assert isinstance(options, AnswerOptions)
        return Writing(options.written_answers, (ANSWER_END,)) if options.written_answers else None

    def judge(
        self, texts: Mapping[int, str], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """`exact_match` and `f1` as SQuAD 1.1 has them, from 0 to 1, and how many `written_answers` they are of."""
        golds = {line: [_text(answer) or "" for answer in rows[line]["answers"]] for line in texts}
        said = {line: read_answer(text) for line, text in texts.items()}
        return {
            "exact_match": sum(best_of(exact_match, said[line], golds[line]) for line in texts) / len(texts),
            "f1": sum(best_of(token_f1, said[line], golds[line]) for line in texts) / len(texts),
            "written_answers": float(len(texts)),
        }

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """Nothing: a caller writes the prompt."""
        return {}


def _text(answer: Any) -> str | None:
    text = answer.get("text") if isinstance(answer, dict) else answer
    return text if isinstance(text, str) else None
