"""
Task `span_qa`: find the answer to a question in a text.

Rows are SQuAD's, 1.1 or 2.0: the nested JSON document, or flat lines
`{"context", "question", "answers": [{"text", "answer_start"}], "is_impossible"?, "id"?, "title"?}`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, JsonValue

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding, finding
from trilithon_finetune.metrics.answer_lists import LISTED, list_scores
from trilithon_finetune.metrics.squad import Question, best_threshold, evaluate
from trilithon_finetune.recipes.base import Context, Defaults, Head, Output, Sample
from trilithon_finetune.recipes.fields import Best, outputs_by_row
from trilithon_finetune.recipes.squad_rows import SquadRows, first_answer
from trilithon_server.tasks.pieces import word_pieces
from trilithon_server.tasks.spans import SpanFormat, merge_answers


class SpanOptions(Section):
    """Options of the task `span_qa`."""

    no_answer: bool = False
    """Questions may have no answer: rows may say `is_impossible`, and the model may say so too."""
    null_threshold: float | None = None
    """With `no_answer`: by how much "no answer" must score above the best answer to be said. None: what does best on
    the validation of the exported checkpoint; 0 until then, and where all of its questions have answers."""
    doc_stride: Annotated[int, Field(ge=1)] = 128
    """Tokens from the start of one window of a long context to the next."""
    max_question_tokens: Annotated[int, Field(ge=1)] = 64
    """Longer questions are cut."""
    max_answer_tokens: Annotated[int, Field(ge=1)] = 30
    """Longer answers are never given."""
    n_best: Annotated[int, Field(ge=1, le=100)] = 20
    """Answers that are weighed."""


class SpanQa(SquadRows):
    """The recipe of `span_qa`."""

    task = "span_qa"
    head: Head = "span"
    defaults = Defaults(
        lr_full=5e-5, dropout=0.1, head_lr_factor=10.0, batch_size=16, max_tokens=384, weight_decay=0.01
    )
    Options: type[Section] = SpanOptions
    best_metric: Best = ("f1", "max")

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """The head's two outputs."""
        return ("start", "end")

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> list[Sample] | list[Finding]:
        """One sample a window; a window without the answer learns [CLS]. Of several answers the first is learned."""
        impossible = bool(row.get("is_impossible", False))
        if impossible and not _options(context).no_answer:
            rule = "is_impossible is true, and the task is set to questions that have answers."
            hint = "Set options.no_answer to true, or leave such rows out."
            return [finding("E-DATA-008", rule, file=file, line=line, path="is_impossible", hint=hint)]
        format_ = _format(context)
        windows = format_.encode(row["question"], row["context"], word_pieces(context.tokenizer))
        targets = [(0, 0)] * len(windows)
        if not impossible:
            targets = [format_.target(window, *first_answer(row)) for window in windows]
            if not any(last for _, last in targets):
                rule = f"no window of {context.max_tokens} tokens (data.max_tokens) holds the whole answer."
                hint = "Raise data.max_tokens, lower options.doc_stride, or give a shorter answer."
                return [finding("E-DATA-021", rule, file=file, line=line, path="answers[0]", hint=hint)]
        return [
            Sample(
                window.encoded.tokens,
                types=window.encoded.types,
                columns={
                    "start": first,
                    "end": last,
                    "context_start": window.context[0],
                    "context_stop": window.context[1],
                },
                row=line,
                part=part,
            )
            for part, (window, (first, last)) in enumerate(zip(windows, targets, strict=True))
        ]

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """
        `exact` and `f1` as SQuAD has them, from 0 to 1. Where some questions have no answer also `has_answer_exact`,
        `has_answer_f1`, `no_answer_f1`, and `best_f1` at the `best_threshold` that `null_threshold` could have. Where
        none was chosen, all are told at the best: that is what an export of this step would say.

        Of the five likeliest answers to the questions that have one: `strict_accuracy`, `lenient_accuracy` and
        `mean_reciprocal_rank`, whatever is thought of "no answer".
        """
        format_, pieces = _format(context), word_pieces(context.tokenizer)
        questions, listed = [], []
        for line, values in outputs_by_row(outputs).items():
            row = rows[line]
            windows = format_.encode(row["question"], row["context"], pieces)
            found = format_.decode(row["context"], windows, values)
            golds = tuple(answer["text"] for answer in row["answers"])
            questions.append(Question(golds, found.best(None), found.null_margin))
            if questions[-1].answerable:
                likeliest, _ = merge_answers([found], n_best=LISTED)
                listed.append(([answer.text for answer in likeliest], golds))
        threshold = format_.null_threshold
        if _options(context).no_answer and _options(context).null_threshold is None:
            _, threshold = best_threshold(questions)
        return {**evaluate(questions, null_threshold=threshold), **list_scores(listed)}

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """What `SpanFormat` reads, with the threshold of "no answer" that did best, where none was chosen."""
        options, best = _options(context), numbers.get("best_threshold")
        if options.null_threshold is None and best is not None and math.isfinite(best):
            context = replace(context, options=options.model_copy(update={"null_threshold": best}))
        return _format(context).task_file()


def _options(context: Context) -> SpanOptions:
    options = context.options
    assert isinstance(options, SpanOptions)
    return options


def _format(context: Context) -> SpanFormat:
    options = _options(context)
    return SpanFormat(
        max_tokens=context.max_tokens,
        doc_stride=options.doc_stride,
        max_question_tokens=options.max_question_tokens,
        max_answer_tokens=options.max_answer_tokens,
        n_best=options.n_best,
        null_threshold=options.null_threshold or 0.0 if options.no_answer else None,
    )
