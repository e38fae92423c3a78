"""
Task `question_gen`: ask what a text answers with a span of it.

Rows are SQuAD's, nested or flat: from the context and its first answer the question is learned; with
`options.unanswerable` also one that has none, from its first plausible answer (SQuAD 2.0). The sequence is that of
`trilithon_server.tasks.question_format`, which a server prompts with.

Source: arXiv 2002.09599, section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding, finding
from trilithon_finetune.metrics.questions import rouge_l
from trilithon_finetune.recipes.base import Context, Defaults, Head, Needs, Output, Sample, Writing
from trilithon_finetune.recipes.fields import Best
from trilithon_finetune.recipes.squad_rows import SquadRows, first_answer
from trilithon_finetune.recipes.texts import next_token_targets, too_long, untrained_end
from trilithon_server.tasks.question_format import NUM_TYPES, QuestionFormat, read_question


class QuestionGenOptions(Section):
    """Options of the task `question_gen`."""

    roles: Literal["markers", "types"] = "markers"
    """How the answer is told from its text: by words, which any model reads, or by token types, a table that is trained
    with all of the model and needs this server."""
    loss_on: Literal["question", "all"] = "question"
    """Learn to ask, or to write the text and the answer too."""
    context: Literal["near", "whole"] = "near"
    """The sentences of the answer with one on either side, or all of the text."""
    context_tokens: Annotated[int, Field(ge=16)] = 160
    """Of the text, at most: what is far from the answer goes."""
    question_tokens: Annotated[int, Field(ge=8)] = 48
    """That a server lets a question have, at most."""
    unanswerable: bool = False
    """Learn both kinds, each under its name: rows of SQuAD 2.0 without an answer count, where they have a plausible
    one."""
    written_answers: Annotated[int, Field(ge=0)] = 40
    """Validation questions, at most, that the export writes itself, for `rouge_l`; 0: none."""


class QuestionGen(SquadRows):
    """The recipe of `question_gen`."""

    task = "question_gen"
    head: Head = "vocabulary"
    defaults = Defaults(lr_full=2e-5, max_tokens=256, warmup_ratio=0.05, betas=(0.9, 0.95))
    Options: type[Section] = QuestionGenOptions
    best_metric: Best = ("valid_loss", "min")

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """None."""
        return ()

    def needs(self, options: Section) -> Needs:
        """With `roles: types`: those of the format."""
        assert isinstance(options, QuestionGenOptions)
        return Needs(token_types=NUM_TYPES if options.roles == "types" else 0)

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> Sequence[Sample | Finding]:
        """The packed sequence; the question is learned, with `loss_on: all` everything, but to judge."""
        kind = "answers" if row["answers"] or not _options(context).unanswerable else "plausible_answers"
        if not row.get(kind):
            hint = "Leave rows without an answer out." if kind == "answers" else "Leave such rows out."
            what = "answer" if kind == "answers" else "plausible answer"
            return [finding("E-DATA-008", f"has no {what} to ask for.", file=file, line=line, path=kind, hint=hint)]
        try:
            packed = _format(context).pack(
                row["context"],
                first_answer(row, name=kind),
                context.tokenizer,
                question=row["question"],
                answerable=kind == "answers",
            )
        except ValueError as error:
            hint = "Raise options.context_tokens, or use a tokenizer with an end token."
            return [finding("E-DATA-021", f"{error}", file=file, line=line, path=f"{kind}[0]", hint=hint)]
        if len(packed.tokens) > context.max_tokens:
            return [too_long(len(packed.tokens), context, file=file, line=line)]
        start, stop = packed.question
        learned = _options(context).loss_on == "all" and not context.validating
        supervised = [learned or start <= i < stop for i in range(len(packed.tokens))]
        targets = next_token_targets(packed.tokens, supervised)
        return [
            Sample(packed.tokens, targets, types=packed.types, row=line),
            *untrained_end(context, file=file, line=line),
        ]

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """The loss says it all while training."""
        return {}

    def writing(self, context: Context) -> Writing | None:
        """So many questions, in words: of token types a plain prompt knows nothing."""
        options = _options(context)
        return Writing(options.written_answers) if options.written_answers and options.roles == "markers" else None

    def judge(
        self, texts: Mapping[int, str], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """
        `rouge_l` against the row's own question, where what can't be read counts 0; the shares that can be read
        (`parsed`) and that end in a question mark (`asking`); `written_answers`.
        """
        read = {line: read_question(text) for line, text in texts.items()}
        return {
            "rouge_l": sum(rouge_l(text or "", rows[line]["question"]) for line, text in read.items()) / len(read),
            "parsed": sum(text is not None for text in read.values()) / len(read),
            "asking": sum(text is not None and text.endswith("?") for text in read.values()) / len(read),
            "written_answers": float(len(read)),
        }

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """What `QuestionFormat` reads."""
        return _format(context).task_file()


def _options(context: Context) -> QuestionGenOptions:
    options = context.options
    assert isinstance(options, QuestionGenOptions)
    return options


def _format(context: Context) -> QuestionFormat:
    options = _options(context)
    return QuestionFormat(
        roles=options.roles,
        context=options.context,
        max_context=options.context_tokens,
        max_question=options.question_tokens,
        unanswerable=options.unanswerable,
    )
