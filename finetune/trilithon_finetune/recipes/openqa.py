"""
Tasks `reader_individual` and `reader_joint`: an encoder-decoder that answers questions from retrieved passages, and the
retriever that finds them, trained together (arXiv 2101.00408, sections 2.2 and 2.3). Rows are

    {"question": "...", "answers": ["...", {"text": "..."}]}                  passages of `options.passages`
    {"question": "...", "answers": [...], "ctxs": [{"title", "text", "score"?}]}       passages of the row itself

The first answer is learned, any is accepted. With `options.retriever` and `options.passages` the passages of a question
are looked up while training, in an index of the encoder that is being trained. Else every row brings its own, with the
scores of whatever found them, and nothing is learned beside the reader.

A unit's first sample holds what its encoder and its decoder read of the question, end to end: `query` tokens of the
retriever, `question` tokens of the reader, and the answer. Behind it come the row's own passages, each with the bits of
its score. `own` is a number of the passage that the question was made from, which is not evidence; 0 for none.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, JsonValue, model_validator

from trilithon_finetune.config import Count, Section
from trilithon_finetune.data.findings import Finding, finding, shown
from trilithon_finetune.errors import refuse
from trilithon_finetune.recipes.base import IGNORE, Context, Defaults, Head, Output, Recipe, Sample
from trilithon_finetune.recipes.fields import Best, RowCheck
from trilithon_parallel.config import ModelConfig, Reads
from trilithon_parallel.contrast_terms import Contrast
from trilithon_parallel.shapes import STRENGTH
from trilithon_server.tasks.reader_format import ReaderFormat, ReaderKind, frame, passage_tokens

QUESTION = "question/answers"
KEYS = ("question", "answers", "ctxs", "id", "dataset")
PASSAGE_KEYS = ("title", "text", "id", "score", "hasanswer", "has_answer")


MAX_SCORE = 1e30
"""Of a passage that a row brings; a float32 holds it."""


class ReaderOptions(Section):
    """Options that all tasks of readers have."""

    retriever: str | None = None
    """The encoder that finds the passages and is trained too: a name as of `model`. None: rows have `ctxs`."""
    passages: str | None = None
    """The passages that it finds: a file id, of JSON lines `{"id", "title", "text"}` or of DPR's tsv."""
    top_k: Annotated[int, Field(ge=1, le=64)] = 8
    """Passages that a question is answered from."""
    reload_every: Count = 500
    """Steps after which the index is made again, by the retriever as it is then."""
    refresh: bool = True
    """False: the index stays that of the first step; the retriever is trained all the same."""
    max_question_tokens: Count = 64
    """Longer questions are cut."""
    max_answer_tokens: Annotated[int, Field(ge=2, le=256)] = 32
    """Longer answers are cut; the end counts."""
    written_answers: Annotated[int, Field(ge=0)] = 200
    """Validation questions, at most, that are answered in the reader's own words for `em` and `f1`; 0: none."""

    @property
    def has_null(self) -> bool:
        """Whether one of the `top_k` passages is the empty one, which says what is known without any."""
        return False

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.retriever is None) != (self.passages is None):
            raise ValueError("retriever and passages go together: an encoder, and what it finds")
        return self


class IndividualOptions(ReaderOptions):
    """Options of the task `reader_individual`."""

    marginal: Literal["sequence", "token"] = "sequence"
    """`sequence`: the sum over passages of whole answers' probabilities; `token`: token by token."""


class JointOptions(ReaderOptions):
    """Options of the task `reader_joint`."""

    strength: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """What p(z|q) is multiplied by at the first step, in the bias of the decoder's attention. 0: no bias yet."""
    freeze_strength: bool = False
    """It stays as it is. At 0 the retriever learns nothing."""


@dataclass(frozen=True)
class Asked:
    """
    One question of a row.

    Attributes:
        query: as the retriever reads it; empty without one. question: as the reader does. answer: with its end.
        own: see `own_key`; 0 for none.
    """

    query: Sequence[int]
    question: Sequence[int]
    answer: Sequence[int]
    own: int = 0


class Reader(Recipe):
    """What tasks of readers share."""

    head: Head = "reading"
    kind: ClassVar[ReaderKind]
    defaults = Defaults(
        lr_full=2e-5,
        head_lr_factor=100.0,
        epochs=10,
        batch_size=16,
        weight_decay=0.1,
        warmup_ratio=0.01,
        max_tokens=256,
    )
    best_metric: Best = ("valid_loss", "min")

    def rows_of(self, document: bytes, *, file: str) -> None:
        """JSON lines only."""

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """None."""
        return ()

    def unit(self, options: Section) -> int:
        """A question, and the passages that its row brings."""
        options = _reader_options(options)
        return 1 if options.retriever else 1 + options.top_k

    def unit_tokens(self, context: Context) -> int:
        """Sequences of the encoder, each as long as may be: which passages come is not known beforehand."""
        return _reader_options(context.options).top_k * context.max_tokens

    def trained(self, base: ModelConfig, options: Section, retriever: ModelConfig | None) -> ModelConfig:
        """The reader, its retriever, and the strength of its bias."""
        if not base.is_seq2seq:
            return base.alone()
        return replace(base, reads=Reads(retriever, has_strength=self.kind == "joint"))

    def contrast(self, context: Context) -> Contrast:
        """Of inner products of the retriever's vectors."""
        return Contrast() if context.retriever is None else Contrast(context.retriever.format.score_scale)

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> Sequence[Sample | Finding]:
        """The questions of a row, each with the passages that it brings."""
        options = _reader_options(context.options)
        passages: list[Sample] = []
        if options.retriever is None:
            found = row.get("ctxs", ())
            if len(found) < options.top_k:
                rule = f"must have at least options.top_k passages, {options.top_k}. Given: {len(found)}."
                hint = "Lower options.top_k, or give options.retriever and options.passages."
                return [finding("E-DATA-008", rule, file=file, line=line, path="ctxs", hint=hint)]
            passages = [
                _passage(item, line, part, context) for part, item in enumerate(found[: options.top_k], start=1)
            ]
        elif "ctxs" in row:
            rule = "must not be there: options.retriever finds the passages."
            return [finding("E-DATA-007", rule, file=file, line=line, path="ctxs", hint="Remove one of both.")]
        samples: list[Sample] = []
        for asked in self.asked(row, context):
            samples += [_question(asked, line, len(samples), context), *passages]
        return samples

    @abstractmethod
    def asked(self, row: Mapping[str, Any], context: Context) -> Sequence[Asked]:
        """The questions that a sound row asks."""

    @abstractmethod
    def golds(self, row: Mapping[str, Any], part: int, context: Context) -> list[str]:
        """What is right to answer to the question that is a row's sample number `part`."""

    def looked_for(self, row: Mapping[str, Any], part: int, context: Context) -> list[str]:
        """What a passage that helps holds one of: an answer."""
        return self.golds(row, part, context)

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """None: `train/reading_evaluation.py` measures readers."""
        return {}

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """What `ReaderFormat` reads."""
        return format_of(context, self.kind, strength=numbers.get(STRENGTH, 0.0)).task_file()


class _OpenReader(Reader):
    """What the tasks share whose rows are questions."""

    formats: tuple[str, ...] = (QUESTION,)

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By a question or answers."""
        return QUESTION if "question" in row or "answers" in row else None

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """A question, at least one answer, and passages with a text."""
        check = RowCheck(row, file=file, line=line)
        check.keys(KEYS)
        check.text("question")
        answers = check.value("answers", list)
        if answers is not None and not answers:
            check.add("E-DATA-015", "answers", "is empty.", "Give at least one answer, or remove the row.")
        for i, answer in enumerate(answers or ()):
            text = answer_text(answer)
            if text is None:
                rule = f'must be a text, or an object with "text". Given: {shown(answer)}.'
                check.add("E-DATA-008", f"answers[{i}]", rule)
            elif not text.strip():
                check.add("E-DATA-015", f"answers[{i}]", "is empty.")
        for i, item in enumerate(check.value("ctxs", list) or () if "ctxs" in row else ()):
            _check_passage(f"ctxs[{i}]", item, check)
        return check.findings

    def asked(self, row: Mapping[str, Any], context: Context) -> Sequence[Asked]:
        """The question, with its first answer."""
        format_, retriever = format_of(context, self.kind), context.retriever
        query = () if retriever is None else retriever.format.query(row["question"], retriever.tokenizer).tokens
        question = format_.question_tokens(row["question"], context.tokenizer)
        answer = format_.answer_tokens(answer_text(row["answers"][0]) or "", context.tokenizer)
        return [Asked(query, question, answer)]

    def golds(self, row: Mapping[str, Any], part: int, context: Context) -> list[str]:
        """The row's answers."""
        return [answer_text(answer) or "" for answer in row["answers"]]


class IndividualReader(_OpenReader):
    """The recipe of `reader_individual`."""

    task = "reader_individual"
    kind: ClassVar[ReaderKind] = "individual"
    Options: type[Section] = IndividualOptions


class JointReader(_OpenReader):
    """The recipe of `reader_joint`."""

    task = "reader_joint"
    kind: ClassVar[ReaderKind] = "joint"
    Options: type[Section] = JointOptions


def format_of(context: Context, kind: ReaderKind, *, strength: float = 0.0) -> ReaderFormat:
    """
    How a job's reader reads.

    Raises:
        FinetuneError: `invalid_config`, there is no room for a passage.
    """
    options = _reader_options(context.options)
    try:
        return ReaderFormat(
            kind=kind,
            max_question_tokens=options.max_question_tokens,
            max_passage_tokens=context.max_tokens,
            max_answer_tokens=options.max_answer_tokens,
            strength=strength,
        )
    except ValueError as error:
        hint = "max_passage_tokens is data.max_tokens, max_question_tokens an option of the task."
        raise refuse("invalid_config", str(error), param="data.max_tokens", hint=hint) from None


def own_key(text: str) -> int:
    """31 bits of an id, or of title and text, of a passage; never 0."""
    return max(1, int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") >> 1)


def score_of(sample: Sample) -> float:
    """The score of a passage that a row brought."""
    return float(np.array(sample.columns["score"], np.int32).view(np.float32))


def answer_text(answer: Any) -> str | None:
    """The text of an answer as rows have it."""
    text = answer.get("text") if isinstance(answer, dict) else answer
    return text if isinstance(text, str) else None


def _reader_options(options: Section) -> ReaderOptions:
    assert isinstance(options, ReaderOptions)
    return options


def _question(asked: Asked, line: int, part: int, context: Context) -> Sample:
    start = context.model.decoder_start_id
    if start is None:
        rule = "the base's config.json must say decoder_start_token_id: the token that answers begin with."
        raise refuse("invalid_config", rule, param="model", hint="Add it, or use another base.")
    before = (*asked.query, *asked.question)
    return Sample(
        (*before, start, *asked.answer[:-1]),
        targets=(*(IGNORE,) * len(before), *asked.answer),
        columns={"query": len(asked.query), "question": len(asked.question), "own": asked.own, "score": 0},
        row=line,
        part=part,
    )


def _passage(item: Mapping[str, Any], line: int, part: int, context: Context) -> Sample:
    """A passage of a row, with no more of it than any question leaves room for."""
    tokens = passage_tokens(item.get("title", ""), item["text"], context.tokenizer)[: context.max_tokens]
    tokens = tokens or [frame(context.tokenizer)[1]]  # a text of which the tokenizer makes nothing
    bits = int(np.array(item.get("score", 0.0), np.float32).view(np.int32))
    columns = {"query": 0, "question": 0, "own": 0, "score": bits}
    return Sample(tuple(tokens), targets=(IGNORE,) * len(tokens), columns=columns, row=line, part=part)


def _check_passage(path: str, item: Any, check: RowCheck) -> None:
    if not isinstance(item, dict):
        check.add("E-DATA-008", path, f"must be an object with title and text. Given: {shown(item)}.")
        return
    check.keys(PASSAGE_KEYS, row=item, path=path)
    if "title" in item:
        check.value(f"{path}.title", str, row=item)
    check.text(f"{path}.text", row=item)
    score = item.get("score", 0.0)
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= MAX_SCORE:
        rule = f"must be a number of at most {MAX_SCORE:g}, above or below 0. Given: {shown(score)}."
        check.add("E-DATA-008", f"{path}.score", rule)
