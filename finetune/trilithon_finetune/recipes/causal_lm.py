"""
Task `lm`: go on with a text. Rows are `{"text"}`.

A text longer than `data.max_tokens` becomes several samples, and none of its tokens is lost: each but the first is
learned once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding
from trilithon_finetune.recipes.base import IGNORE, Context, Defaults, Head, Output, Recipe, Sample
from trilithon_finetune.recipes.fields import Best, RowCheck
from trilithon_finetune.recipes.texts import nothing_learned

TEXT = "text"
KEYS = ("text", "id", "title")


class LmOptions(Section):
    """Task `lm` has no options."""


class CausalLm(Recipe):
    """The recipe of `lm`."""

    task = "lm"
    head: Head = "vocabulary"
    formats: tuple[str, ...] = (TEXT,)
    defaults = Defaults(
        lr_full=2e-5, epochs=1, max_tokens=1024, schedule="cosine", warmup_ratio=0.05, betas=(0.9, 0.95)
    )
    Options: type[Section] = LmOptions
    best_metric: Best = ("valid_loss", "min")

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By the key `text`."""
        return TEXT if "text" in row else None

    def rows_of(self, document: bytes, *, file: str) -> None:
        """JSON lines only."""

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """A text that is not empty."""
        check = RowCheck(row, file=file, line=line)
        check.keys(KEYS)
        check.text("text")
        return check.findings

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """None."""
        return ()

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> Sequence[Sample | Finding]:
        """Windows of the text with the end token behind it."""
        ends = context.tokenizer.eos_ids[:1]
        tokens = (*context.tokenizer.encode(row["text"], add_special_tokens=True), *ends)
        if len(tokens) < 2:
            return [nothing_learned(context, file=file, line=line, path="text")]
        starts = range(0, len(tokens) - 1, context.max_tokens)
        samples = []
        for part, start in enumerate(starts):
            window = tokens[start : start + context.max_tokens]
            targets = tokens[start + 1 : start + 1 + len(window)]
            padding = (IGNORE,) * (len(window) - len(targets))
            samples.append(Sample(window, (*targets, *padding), row=line, part=part))
        return samples

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """The loss says it all."""
        return {}

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """Nothing: it is served as any decoder."""
        return {}
