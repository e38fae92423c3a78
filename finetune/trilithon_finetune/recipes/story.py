"""
Tasks `story_keywords` and `story_generator`: say what a story's next sentence is to be about, and write it. Rows are

    {"sentences": ["...", "...", ...], "title": "..."}

and, labelled by the job (`options.concepts`, `options.encoder`) or by `trilithon data stories`, a step for each
sentence but the first:

    "steps": [{"keywords": ["..."], "facts": ["..."], "ranked": ["..."], "others": ["..."]}, ...]

Each sentence but the first is a sample. Keywords of a row without steps are found as a label would have them; without
steps there are no facts, and the generator learns to write by keywords alone. A title is not learned.

Source: arXiv 2010.00840 (Megatron-CNTRL).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding, finding
from trilithon_finetune.metrics.texts import num_words
from trilithon_finetune.recipes.base import Context, Defaults, Head, Output, Recipe, Sample
from trilithon_finetune.recipes.fields import Best
from trilithon_finetune.recipes.story_rows import SENTENCES, LabelSources, Step, check_story, labelled, steps_of
from trilithon_finetune.recipes.texts import next_token_targets, nothing_learned, untrained_end
from trilithon_server.tasks.story_format import KeywordFormat, NoRoom, Packed, SentenceFormat


class StoryOptions(Section):
    """Options of the tasks `story_keywords` and `story_generator`."""

    markers: Literal["text", "tokens"] = "text"
    """What parts a sequence: words, or special tokens, which the base's vocabulary must have."""
    names: Literal["words", "tags"] = "words"
    """`tags`: people of the story are [MALE], [FEMALE] or [NEUTRAL], special tokens that the base's vocabulary must
    have; the server puts their names back."""
    story_tokens: Annotated[int, Field(ge=16)] = 160
    """Of the story so far, at most: its last whole sentences."""


class GeneratorOptions(StoryOptions, LabelSources):
    """Options of the task `story_generator`."""

    facts: Annotated[int, Field(ge=0)] = 3
    """Shown with a sentence, at most."""
    knowledge_tokens: Annotated[int, Field(ge=0)] = 64
    """Of all facts, at most."""
    with_keywords: bool = True
    """Show the keywords too, and not only what is known of them."""
    predicted_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of sentences learned with the facts that a server would choose, which has not seen the sentence."""


class _Story(Recipe):
    """What both tasks share."""

    head: Head = "vocabulary"
    formats: tuple[str, ...] = (SENTENCES,)
    defaults = Defaults(lr_full=2e-5, max_tokens=256, warmup_ratio=0.05, betas=(0.9, 0.95))
    Options: type[Section] = StoryOptions
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
        """None."""
        return ()

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> Sequence[Sample | Finding]:
        """A sample for each sentence but the first."""
        if found := self._unmarked(context, file=file, line=line):
            return [found]
        try:
            packed = [(step, self.packed(step, context)) for step in steps_of(labelled(row, context))]
        except NoRoom as error:
            rule = f"{error} (data.max_tokens {context.max_tokens})"
            return [finding("E-DATA-021", rule, file=file, line=line, path="sentences", hint="Raise data.max_tokens.")]
        except ValueError as error:  # characters that the tokenizer needs for itself
            return [finding("E-DATA-022", f"{error}.", file=file, line=line, path="sentences", hint="Take it out.")]
        samples = [_sample(step, one, line) for step, one in packed if one is not None]
        if not samples:
            return [nothing_learned(context, file=file, line=line, path="sentences")]
        return [*samples, *untrained_end(context, file=file, line=line)]

    def _unmarked(self, context: Context, *, file: str, line: int) -> Finding | None:
        try:
            self.format(context).check(context.tokenizer)
        except ValueError as error:
            hint = "Set options.markers to text and options.names to words, or take a base that has it."
            return finding("E-DATA-022", f"cannot be learned: {error}", file=file, line=line, hint=hint)
        return None

    def format(self, context: Context) -> KeywordFormat | SentenceFormat:
        """How sequences are written."""
        raise NotImplementedError

    def packed(self, step: Step, context: Context) -> Packed | None:
        """The sequence of one sentence; None where it has nothing to learn."""
        raise NotImplementedError

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """The loss says it all."""
        return {}

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """What the format reads."""
        return self.format(context).task_file()


class StoryKeywords(_Story):
    """The recipe of `story_keywords`."""

    task = "story_keywords"

    def format(self, context: Context) -> KeywordFormat:
        """By the options."""
        options = context.options
        assert isinstance(options, StoryOptions)
        return KeywordFormat(options.markers, max_story=options.story_tokens, names=options.names)

    def packed(self, step: Step, context: Context) -> Packed | None:
        """Sentences of stop words alone have no keywords."""
        if not step.keywords:
            return None
        return self.format(context).pack(step.told, context.tokenizer, keywords=step.keywords, room=context.max_tokens)


class StoryGenerator(_Story):
    """The recipe of `story_generator`."""

    task = "story_generator"
    Options: type[Section] = GeneratorOptions

    def format(self, context: Context) -> SentenceFormat:
        """By the options."""
        options = context.options
        assert isinstance(options, GeneratorOptions)
        return SentenceFormat(
            options.markers,
            max_story=options.story_tokens,
            names=options.names,
            max_knowledge=options.knowledge_tokens,
            with_keywords=options.with_keywords,
        )

    def packed(self, step: Step, context: Context) -> Packed | None:
        """With the facts of its label, or with those that a server would choose: to judge, with these alone."""
        options = context.options
        assert isinstance(options, GeneratorOptions)
        is_predicted = context.validating or _drawn(step) < options.predicted_share
        return self.format(context).pack(
            step.told,
            context.tokenizer,
            keywords=step.keywords,
            knowledge=(step.ranked if is_predicted else step.facts)[: options.facts],
            answer=step.sentence,
            room=context.max_tokens,
        )

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """`word_perplexity`: of the sentences, by what stands between spaces."""
        said = sum(float(output.values[0]) for output in outputs)
        words = num_words([rows[output.sample.row]["sentences"][output.sample.part] for output in outputs])
        return {"word_perplexity": math.exp(-said / words)} if words else {}


def _sample(step: Step, packed: Packed, line: int) -> Sample:
    start, stop = packed.answer
    supervised = [start <= at < stop for at in range(len(packed.tokens))]
    return Sample(packed.tokens, next_token_targets(packed.tokens, supervised), row=line, part=step.index)


def _drawn(step: Step) -> float:
    """From 0 to 1, by the texts alone: every time the same."""
    drawn = hashlib.blake2b("\n".join([*step.told, step.sentence]).encode(), digest_size=8).digest()
    return int.from_bytes(drawn, "little") / math.ldexp(1, 64)
