"""
Task `story_ranker`: an encoder whose vectors bring a story and the facts that its next sentence needs together. Rows
are stories with labels, or the job makes them, see `story.py`.

Facts that go with the sentence are told from candidates of the same sentence that do not, as they will have to be, by
cross-entropy or by a margin. The story's side never sees the sentence, but its keywords: what a server has, too, when
it asks for facts of them.

Stories have an encoder of their own, which begins as that of facts. That one stays as it is unless the job says
otherwise: what a server has made of a fact serves every ranker of the same base.

Source: arXiv 2010.00840 (Megatron-CNTRL), which has two encoders, and the margin. Its stories ask without keywords.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, JsonValue, model_validator

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding, finding
from trilithon_finetune.recipes.base import Context, Defaults, Head, Output, Recipe, Sample
from trilithon_finetune.recipes.fields import Best
from trilithon_finetune.recipes.retriever import check_joins
from trilithon_finetune.recipes.story_rows import (
    LABEL_FIRST,
    SENTENCES,
    LabelSources,
    Step,
    check_story,
    labelled,
    spread,
    steps_of,
)
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.contrast_terms import ANSWER, NOTHING, OTHER, QUERY, Contrast
from trilithon_server.tasks.pieces import Encoded
from trilithon_server.tasks.retrieval import RetrievalFormat
from trilithon_server.tasks.story_format import RankerFormat

MARGIN = 0.5
_MORE_FACTS = "Give more concepts, or leave such rows out: data.bad_rows_allowed."


class RankerOptions(LabelSources):
    """Options of the task `story_ranker`."""

    story_tokens: Annotated[int, Field(ge=8)] = 128
    """Of the story so far, at most: its last ones."""
    fact_tokens: Annotated[int, Field(ge=8)] = 64
    """Of a fact, at most: its first ones."""
    with_keywords: bool = True
    """Ask with the next sentence's keywords behind the story. The paper's asks with the story alone."""
    positives: Annotated[int, Field(ge=1, le=10)] = 5
    """Facts of a sentence that are learned, at most: spread over the ranks of those that fit."""
    negatives: Annotated[int, Field(ge=1, le=15)] = 7
    """Candidates of the sentence that each is told from."""
    in_batch: bool = False
    """Whether each is told from the facts of all other sentences of the global batch, too."""
    loss: Literal["cross_entropy", "max_margin"] = "cross_entropy"
    """`cross_entropy`: of the fact among all others. `max_margin`: how far each other is within a margin, summed."""
    margin: Annotated[float, Field(gt=0)] | None = None
    """Of `max_margin`, in scaled inner products. None: 0.5."""
    shared: bool = False
    """Whether one encoder reads stories and facts. Else each has its own."""
    train_facts: bool = False
    """Of two encoders, whether that of facts learns, too. Else it stays the base."""
    score_scale: Annotated[float, Field(gt=0)] | None = None
    """
    Of inner products. None: 1 / sqrt(hidden size), or, where vectors have length 1, 20 before a softmax and 1 with a
    margin.
    """

    @model_validator(mode="after")
    def _margin(self) -> Self:
        if self.margin is not None and self.loss != "max_margin":
            raise ValueError(f"margin {self.margin:g} must come with loss max_margin: {self.loss} has none")
        return self

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if self.train_facts and self.shared:
            raise ValueError("train_facts true must come with shared false: one encoder learns as a whole")
        return self


class StoryRanker(Recipe):
    """The recipe of `story_ranker`."""

    task = "story_ranker"
    head: Head = "vectors"
    formats: tuple[str, ...] = (SENTENCES,)
    defaults = Defaults(lr_full=2e-5, batch_size=32, max_tokens=128, weight_decay=0.01, dropout=0.1)
    Options: type[Section] = RankerOptions
    best_metric: Best = ("valid_loss", "min")

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By its sentences."""
        return SENTENCES if "sentences" in row else None

    def rows_of(self, document: bytes, *, file: str) -> None:
        """JSON lines only."""

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """Sentences, and steps where there are any."""
        return check_story(row, file=file, line=line)

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """None: the head is a vector."""
        return ()

    def unit(self, options: Section) -> int:
        """A story, the facts that fit, and the candidates that they are told from."""
        assert isinstance(options, RankerOptions)
        return 1 + options.positives + options.negatives

    def trained(self, base: ModelConfig, options: Section, retriever: ModelConfig | None) -> ModelConfig:
        """One encoder or two."""
        assert isinstance(options, RankerOptions)
        if options.shared:
            check_joins(base)
        return replace(base, has_twin=not options.shared)

    def trains_passages(self, context: Context) -> bool:
        """Facts are what passages are to a question."""
        options = _options(context)
        return options.shared or options.train_facts

    def contrast(self, context: Context) -> Contrast:
        """As the options say."""
        options, model = _options(context), context.model
        known = RetrievalFormat.for_encoder(
            normalize=model.normalize, hidden_size=model.hidden_size, max_context=context.max_tokens
        )
        by_margin = options.loss == "max_margin"
        return Contrast(
            options.score_scale or (1.0 if by_margin and model.normalize else known.score_scale),
            (options.margin or MARGIN) if by_margin else None,
            within=not options.in_batch,
        )

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> Sequence[Sample | Finding]:
        """For each sentence the story, facts that fit, and candidates; empty ones where there are too few."""
        row = labelled(row, context)
        if "steps" not in row:
            rule = "is missing: nothing says which facts go with a sentence."
            return [finding("E-DATA-008", rule, file=file, line=line, path="steps", hint=LABEL_FIRST)]
        samples: list[Sample] = []
        for step in steps_of(row):
            if step.facts and step.others:
                samples += self._group(step, context, line=line, first=len(samples))
        if samples:
            return samples
        rule = "teach nothing: no sentence has facts that fit it and others that do not."
        return [finding("E-DATA-022", rule, file=file, line=line, path="steps", hint=_MORE_FACTS)]

    def _group(self, step: Step, context: Context, *, line: int, first: int) -> list[Sample]:
        options, format_, tokenizer = _options(context), _format(context), context.tokenizer
        size = self.unit(options)
        facts = [(ANSWER, text) for text in spread(step.facts, options.positives)]
        facts += [(OTHER, text) for text in spread(step.others, options.negatives)]
        parts: list[tuple[int, Encoded, int]] = [
            (QUERY, format_.story(step.told, tokenizer, keywords=step.keywords), 0)
        ]
        parts += [(role, format_.fact(text, tokenizer), _key(text)) for role, text in facts]
        parts += [(NOTHING, format_.fact("", tokenizer), 0)] * (size - len(parts))
        return [
            Sample(
                encoded.tokens,
                columns={"role": role, "pair": first // size, "key": key, "supervised": int(role == QUERY)},
                row=line,
                part=first + at,
            )
            for at, (role, encoded, key) in enumerate(parts)
        ]

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """`r_precision`: of a sentence's facts, as many as fit it come first; the mean share of them that do fit."""
        shares = [len(set(first) & fitting) / len(fitting) for first, fitting in _first_facts(outputs)]
        return {"r_precision": float(np.mean(shares))} if shares else {}

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """What `RankerFormat` reads."""
        return _format(context).task_file()


def _first_facts(outputs: Sequence[Output]) -> Iterator[tuple[list[int], set[int]]]:
    """Of each sentence the keys of its own facts, best first and as many as fit it, and the keys of those that fit."""
    groups: defaultdict[tuple[int, int], list[Output]] = defaultdict(list)
    for output in outputs:
        if output.sample.columns["role"] != NOTHING:
            groups[output.sample.row, output.sample.columns["pair"]].append(output)
    for group in groups.values():
        (story,) = (output.values for output in group if output.sample.columns["role"] == QUERY)
        facts = [output for output in group if output.sample.columns["role"] != QUERY]
        scores = np.stack([output.values for output in facts]).astype(np.float64) @ story.astype(np.float64)
        order = np.argsort(-scores, kind="stable")
        fitting = {fact.sample.columns["key"] for fact in facts if fact.sample.columns["role"] == ANSWER}
        yield [facts[at].sample.columns["key"] for at in order[: len(fitting)]], fitting


def _options(context: Context) -> RankerOptions:
    options = context.options
    assert isinstance(options, RankerOptions)
    return options


def _format(context: Context) -> RankerFormat:
    options = _options(context)
    return RankerFormat(
        max_story=min(options.story_tokens, context.max_tokens),
        max_fact=min(options.fact_tokens, context.max_tokens),
        with_keywords=options.with_keywords,
        reads="passages" if context.model.has_twin else "both",
    )


def _key(text: str) -> int:
    """31 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") >> 1
