"""
Task `answer_gen`: propose what a text could be asked for, as one choice among all spans of it.

Rows are SQuAD's, nested or flat: the context and its first answer are learned, the question is not read.

Source: arXiv 2002.09599, section 2.1 (the joint model of start and end).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field, JsonValue

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding, finding
from trilithon_finetune.metrics.questions import proposal_recall
from trilithon_finetune.recipes.base import Context, Defaults, Head, Output, Sample
from trilithon_finetune.recipes.fields import Best, outputs_by_row
from trilithon_finetune.recipes.squad_rows import SquadRows, first_answer
from trilithon_server.tasks.answer_spans import AnswerFormat
from trilithon_server.tasks.pieces import word_pieces

PROPOSALS = 5
"""Answers of a text that validation compares with those that people asked for."""


class AnswerGenOptions(Section):
    """Options of the task `answer_gen`."""

    doc_stride: Annotated[int, Field(ge=1)] = 128
    """Tokens from the start of one window of a long context to the next."""
    max_answer_tokens: Annotated[int, Field(ge=2, le=64)] = 16
    """Longer answers are never proposed, and rows that have one can't be learned."""


class AnswerGen(SquadRows):
    """The recipe of `answer_gen`."""

    task = "answer_gen"
    head: Head = "joint_span"
    defaults = Defaults(
        lr_full=5e-5, dropout=0.1, head_lr_factor=10.0, batch_size=16, max_tokens=256, weight_decay=0.01
    )
    Options: type[Section] = AnswerGenOptions
    best_metric: Best = ("answer_recall", "max")

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """The lengths that a span may have."""
        assert isinstance(options, AnswerGenOptions)
        return AnswerFormat(max_answer_tokens=options.max_answer_tokens).labels

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> list[Sample] | list[Finding]:
        """One sample for each window that holds the answer; to judge, the other windows too."""
        if not row["answers"]:
            hint = "Leave rows without an answer out."
            return [finding("E-DATA-008", "has no answer to propose.", file=file, line=line, path="answers", hint=hint)]
        format_ = _format(context)
        windows = format_.encode(row["context"], word_pieces(context.tokenizer))
        places = [format_.target(window, *first_answer(row)) for window in windows]
        if not any(places):
            rule = (
                f"must have at most {format_.max_answer_tokens} tokens (options.max_answer_tokens) and stand whole in "
                f"a window of {context.max_tokens} (data.max_tokens)."
            )
            hint = "Raise options.max_answer_tokens, or set data.on_long to drop."
            return [finding("E-DATA-021", rule, file=file, line=line, path="answers[0]", hint=hint)]
        return [
            Sample(
                window.encoded.tokens,
                columns={
                    "start": place[0] if place else window.context[0],
                    "end": place[1] if place else window.context[0],
                    "context_start": window.context[0],
                    "context_stop": window.context[1],
                    "only_scored": int(place is None),
                },
                row=line,
                part=part,
            )
            for part, (window, place) in enumerate(zip(windows, places, strict=True))
            if place or context.validating
        ]

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """
        `answer_recall`: of the different answers that rows have to a text, how many are among its five likeliest spans,
        compared as SQuAD compares answers; `candidate_share`: the probability of those five, on average over texts.
        """
        format_, pieces = _format(context), word_pieces(context.tokenizer)
        golds: defaultdict[str, list[str]] = defaultdict(list)
        proposed: dict[str, list[str]] = {}
        shares: list[float] = []
        for line, values in outputs_by_row(outputs).items():
            text = rows[line]["context"]
            golds[text].append(rows[line]["answers"][0]["text"])
            if text not in proposed:
                candidates = format_.decode(format_.encode(text, pieces), values)
                likeliest = candidates.worded(text).sample(PROPOSALS, seed=0, temperature=0)
                proposed[text] = [text[item.start : item.end] for item in likeliest]
                shares.append(sum(item.probability for item in likeliest))
        return {
            "answer_recall": proposal_recall([(proposed[text], golds[text]) for text in proposed]),
            "candidate_share": float(np.mean(shares)),
        }

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """What `AnswerFormat` reads."""
        return _format(context).task_file()


def _format(context: Context) -> AnswerFormat:
    options = context.options
    assert isinstance(options, AnswerGenOptions)
    return AnswerFormat(
        max_tokens=context.max_tokens, doc_stride=options.doc_stride, max_answer_tokens=options.max_answer_tokens
    )
