"""Rows of SQuAD, which several tasks learn from: how they are known, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trilithon_finetune.converters.squad import read_squad
from trilithon_finetune.data.findings import Finding, shown
from trilithon_finetune.data.placed import PlacedRow
from trilithon_finetune.recipes.base import Recipe
from trilithon_finetune.recipes.fields import RowCheck
from trilithon_server.tasks.pieces import Span

NESTED = "data/paragraphs/qas"
ROWS = "context/question/answers"

KEYS = ("context", "question", "answers", "is_impossible", "plausible_answers", "id", "title")


class SquadRows(Recipe):
    """
    Of SQuAD 1.1 or 2.0: the nested JSON document, or flat lines
    `{"context", "question", "answers": [{"text", "answer_start"}], "is_impossible"?, "plausible_answers"?, "id"?,
    "title"?}`. Plausible answers are those of a question without one, which only look right.
    """

    formats: tuple[str, ...] = (ROWS, NESTED)

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By a question and a context or answers; rows of a nested document know their place."""
        if "question" not in row or not ("context" in row or "answers" in row):
            return None
        return NESTED if isinstance(row, PlacedRow) else ROWS

    def rows_of(self, document: bytes, *, file: str) -> Sequence[Mapping[str, Any]] | Sequence[Finding] | None:
        """Questions of a nested SQuAD document."""
        return read_squad(document, file=file)

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """A context, a question, and answers that stand where they are said to."""
        prefix = row.path if isinstance(row, PlacedRow) else ""
        check = RowCheck(row, file=file, line=line, prefix=prefix)
        check.keys(KEYS)
        context = check.text("context")
        check.text("question")
        impossible = check.value("is_impossible", bool) if "is_impossible" in row else False
        answers = check.value("answers", list)
        if answers is None or impossible is None:
            return check.findings
        if impossible and answers:
            rule = f"must be empty where is_impossible is true. Given: {len(answers)} answers."
            check.add("E-DATA-008", "answers", rule)
        if not impossible and not answers:
            hint = "Give at least one, or set is_impossible to true if the context has none."
            check.add("E-DATA-015", "answers", "is empty.", hint)
        plausible = check.value("plausible_answers", list) if "plausible_answers" in row else []
        if plausible and not impossible:
            check.add("E-DATA-008", "plausible_answers", "must be empty where the question has answers.")
        for name, found in (("answers", answers), ("plausible_answers", plausible or ())):
            for i, answer in enumerate(found):
                _check_answer(f"{name}[{i}]", answer, context, check)
        return check.findings


def first_answer(row: Mapping[str, Any], *, name: str = "answers") -> Span:
    """Characters of the context that are the first answer, or plausible answer, without spaces around it."""
    start, text = row[name][0]["answer_start"], row[name][0]["text"]
    return start + len(text) - len(text.lstrip()), start + len(text.rstrip())


def _check_answer(path: str, answer: Any, context: str | None, check: RowCheck) -> None:
    if not isinstance(answer, dict):
        check.add("E-DATA-008", path, f"must be an object with text and answer_start. Given: {shown(answer)}.")
        return
    check.keys(("text", "answer_start"), row=answer, path=path)
    text = check.text(f"{path}.text", row=answer)
    start = check.value(f"{path}.answer_start", int, row=answer)
    if text is None or start is None or context is None:
        return
    if start < 0 or start + len(text) > len(context):
        rule = f"must be within the context of {len(context)} characters. Given: {start}, for {len(text)} characters."
        check.add("E-DATA-041", f"{path}.answer_start", rule, _where(text, context))
    elif context[start : start + len(text)] != text:
        there = shown(context[start : start + len(text)])
        rule = f"the context has {there} at character {start}. Given: {shown(text)}."
        check.add("E-DATA-041", f"{path}.answer_start", rule, _where(text, context))


def _where(text: str, context: str) -> str:
    """Says where the answer stands in truth."""
    start = context.find(text)
    if start < 0:
        return "The context does not hold this text; answers must be copied out of it."
    again = context.find(text, start + 1) >= 0
    return f"It first stands at {start}." if again else f"It stands at {start}."
