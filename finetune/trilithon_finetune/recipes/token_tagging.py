"""
Task `ner`: find entities. Rows are `{"tokens": [...], "tags": [...]}` in IOB2, or a CoNLL file, `token<TAB>tag` a line.

Every type that the training rows have gets a B and an I label beside O. A validation compares whole entities with the
rows as they are, not with what a window left of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, JsonValue

from trilithon_finetune.config import Section
from trilithon_finetune.converters.conll import read_conll
from trilithon_finetune.data.findings import Finding, finding, shown
from trilithon_finetune.data.placed import PlacedRow
from trilithon_finetune.metrics.span_f1 import micro, span_scores
from trilithon_finetune.recipes.base import Context, Defaults, Head, Output, Recipe, Sample
from trilithon_finetune.recipes.fields import Best, RowCheck, outputs_by_row, unknown_label
from trilithon_server.tasks.pieces import word_pieces
from trilithon_server.tasks.tagging import Method, TaggingFormat, labels_of, legal, types_of

CONLL = "token<TAB>tag"
ROWS = "tokens/tags"


class TaggingOptions(Section):
    """Options of the task `ner`."""

    method: Method = "first"
    """Which pieces of a word are learned: the `first`, or the `whole` word."""
    stride: Annotated[int, Field(ge=0)] = 32
    """Words that two windows of a long text share."""


class TokenTagging(Recipe):
    """The recipe of `ner`."""

    task = "ner"
    head: Head = "tokens"
    formats: tuple[str, ...] = (ROWS, CONLL)
    defaults = Defaults(
        lr_full=5e-5, dropout=0.1, head_lr_factor=10.0, batch_size=32, max_tokens=256, weight_decay=0.01
    )
    Options: type[Section] = TaggingOptions
    best_metric: Best = ("f1", "max")

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By `tokens` or `tags`; rows of a CoNLL file know their place."""
        if "tokens" not in row and "tags" not in row:
            return None
        return CONLL if isinstance(row, PlacedRow) else ROWS

    def rows_of(self, document: bytes, *, file: str) -> Sequence[Mapping[str, Any]] | Sequence[Finding] | None:
        """Sentences of a CoNLL file."""
        first = document.lstrip().partition(b"\n")[0]
        try:
            return None if isinstance(json.loads(first), dict) else read_conll(document, file=file)
        except (ValueError, RecursionError):
            return read_conll(document, file=file)

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """Tokens that are not empty, one tag each, and tags in IOB2."""
        check = RowCheck(row, file=file, line=line)
        check.keys(("tokens", "tags", "id"))
        tokens, tags = check.value("tokens", list), check.value("tags", list)
        if tokens is None or tags is None:
            return check.findings
        if not tokens:
            check.add("E-DATA-015", "tokens", "is empty.")
        if len(tokens) != len(tags):
            check.add("E-DATA-008", "tags", f"must hold one tag a token, {len(tokens)}. Given: {len(tags)}.")
        for i, token in enumerate(tokens):
            if not isinstance(token, str):
                check.add("E-DATA-008", f"tokens[{i}]", f"must be text. Given: {shown(token)}.")
            elif not token.strip():
                rule = f"is empty. Given: {shown(token)}."
                check.add("E-DATA-015", f"tokens[{i}]", rule, "Leave out it and its tag.")
        _check_tags(tags, check, on_lines=isinstance(row, PlacedRow))
        return check.findings

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """O, then B and I of each type in the order of their names."""
        return labels_of(sorted({tag[2:] for row in rows for tag in row["tags"] if tag != "O"}))

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> list[Sample] | list[Finding]:
        """One sample a window."""
        if not types_of(context.labels):
            rule = "the training file has no entity: every tag is O."
            return [finding("E-DATA-022", rule, file=file, line=line, path="tags")]
        unknown = sorted({tag for tag in row["tags"] if tag not in context.labels})
        if unknown:
            return [unknown_label(tag, context.labels, path="tags", file=file, line=line) for tag in unknown]
        format_ = _format(context)
        windows = format_.encode(row["tokens"], word_pieces(context.tokenizer))
        return [
            Sample(window.encoded.tokens, format_.targets(window, row["tags"]), row=line, part=part)
            for part, window in enumerate(windows)
        ]

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """`precision`, `recall` and `f1` of all entities, and `f1/TYPE` of each type. From 0 to 1."""
        format_, pieces = _format(context), word_pieces(context.tokenizer)
        gold, predicted = [], []
        for line, values in outputs_by_row(outputs).items():
            windows = format_.encode(rows[line]["tokens"], pieces)
            gold.append(rows[line]["tags"])
            predicted.append(format_.decode(windows, values)[0])
        scores = span_scores(gold, predicted)
        total = micro(scores)
        numbers = {"precision": total.precision, "recall": total.recall, "f1": total.f1}
        return numbers | {f"f1/{name}": score.f1 for name, score in scores.items()}

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """What `TaggingFormat` reads."""
        return _format(context).task_file()


def _format(context: Context) -> TaggingFormat:
    options = context.options
    assert isinstance(options, TaggingOptions)
    return TaggingFormat(types_of(context.labels), options.method, context.max_tokens, options.stride)


def _check_tags(tags: Sequence[Any], check: RowCheck, *, on_lines: bool) -> None:
    """Note every tag that is none, and every I that no entity goes on with; `on_lines`: each has a line of its own."""
    for i, tag in enumerate(tags):
        if not isinstance(tag, str):
            check.add("E-DATA-008", f"tags[{i}]", f"must be text. Given: {shown(tag)}.")
        elif tag != "O" and (tag[:2] not in ("B-", "I-") or len(tag) == 2):
            hint = "From IOBES make B- of S- and I- of E-." if tag[:2] in ("S-", "E-") else ""
            check.add(
                "E-DATA-042",
                f"tags[{i}]",
                f"must be O, B-TYPE or I-TYPE. Given: {shown(tag)}.",
                hint,
                below=i * on_lines,
            )
    if any(finding.path.startswith("tags[") for finding in check.findings):
        return
    for i, (tag, right) in enumerate(zip(tags, legal(tags), strict=True)):
        if tag != right:
            before = shown(tags[i - 1]) if i else "the start"
            hint = f"An entity begins with B: write {right}. A file in IOB1 begins it with I; convert it to IOB2."
            check.add("E-DATA-042", f"tags[{i}]", f"{shown(tag)} must not follow {before}.", hint, below=i * on_lines)
