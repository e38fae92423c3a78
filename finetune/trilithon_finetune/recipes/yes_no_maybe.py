"""
Task `yes_no_maybe`: answer questions about a text with yes, no or maybe. Rows are PubMedQA's (arXiv 1909.06146):

    {"question": "...", "contexts": ["...", "..."], "answer": "yes"}

The answer is learned as text behind the prompt; a validation takes the likeliest of the three continuations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import JsonValue

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding, nearest, shown
from trilithon_finetune.metrics.classification import accuracy, macro_f1
from trilithon_finetune.recipes.base import Context, Defaults, Head, Output, Recipe, Sample
from trilithon_finetune.recipes.fields import Best, RowCheck, outputs_by_row
from trilithon_finetune.recipes.questions import encode_question
from trilithon_server.tasks.yes_no_maybe import ANSWERS, likeliest, yes_no_prompt, yes_no_text

QUESTION = "question/contexts/answer"
KEYS = ("question", "contexts", "answer", "pmid", "id", "labels", "long_answer")


class YesNoOptions(Section):
    """Task `yes_no_maybe` has no options."""


class YesNoMaybe(Recipe):
    """The recipe of `yes_no_maybe`."""

    task = "yes_no_maybe"
    head: Head = "vocabulary"
    formats: tuple[str, ...] = (QUESTION,)
    defaults = Defaults(lr_full=2e-5, max_tokens=512, warmup_ratio=0.05, betas=(0.9, 0.95))
    Options: type[Section] = YesNoOptions
    best_metric: Best = ("accuracy", "max")

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By a question or contexts."""
        return QUESTION if "question" in row or "contexts" in row else None

    def rows_of(self, document: bytes, *, file: str) -> None:
        """JSON lines only."""

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """A question, texts, and one of three answers."""
        check = RowCheck(row, file=file, line=line)
        check.keys(KEYS)
        check.text("question")
        contexts = check.value("contexts", list)
        for i, text in enumerate(contexts or ()):
            if not isinstance(text, str):
                check.add("E-DATA-008", f"contexts[{i}]", f"must be a text. Given: {shown(text)}.")
        answer = check.text("answer")
        if answer is not None and answer not in ANSWERS:
            rule = f"must be one of {', '.join(ANSWERS)}. Given: {shown(answer)}."
            check.add("E-DATA-008", "answer", rule, nearest(answer, ANSWERS).strip())
        return check.findings

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """The three answers."""
        return ANSWERS

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> Sequence[Sample | Finding]:
        """
        The question with its answer supervised, as part 0. To judge it, the other two answers follow, in the order of
        `ANSWERS`, and no loss counts them. `label` is the number of the sample's answer.
        """

        def prompt(passage: str) -> str:
            return yes_no_prompt(row["question"], [passage])

        passage = " ".join(row["contexts"])
        others = [answer for answer in ANSWERS if answer != row["answer"]] if context.validating else []
        samples: list[Sample | Finding] = []
        warnings: list[Finding] = []
        for part, answer in enumerate([row["answer"], *others]):
            found = encode_question(prompt, passage, yes_no_text(answer), context, file=file, line=line, path="answer")
            if not isinstance(found[0], Sample):
                return found
            columns = {"label": ANSWERS.index(answer), "only_scored": int(part > 0)}
            samples.append(replace(found[0], columns=columns, part=part))
            if part == 0:
                warnings = [item for item in found if isinstance(item, Finding)]
        return [*samples, *warnings]

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """Accuracy and macro-F1 of the likeliest answers."""
        gold, predicted = [], []
        labels = {(o.sample.row, o.sample.part): o.sample.columns["label"] for o in outputs}
        for row, values in outputs_by_row(outputs).items():
            logprobs = {labels[row, part]: float(value[0]) for part, value in enumerate(values)}
            gold.append(ANSWERS[labels[row, 0]])
            predicted.append(likeliest([logprobs[i] for i in range(len(ANSWERS))]))
        return {"accuracy": accuracy(gold, predicted), "macro_f1": macro_f1(gold, predicted)}

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """Nothing: a caller writes the prompt and compares."""
        return {}
