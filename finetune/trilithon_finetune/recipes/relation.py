"""
Task `relation`: which relation two mentions of a sentence have.

Rows are `{"text", "a": {"start", "end", "type"}, "b": {...}, "label"}` with characters of the text; a model reads the
sentence that holds both, each replaced by a marker of its type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, JsonValue

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding, finding, shown
from trilithon_finetune.metrics.classification import class_scores, positive_scores
from trilithon_finetune.recipes.base import Context, Defaults, Head, Output, Recipe, Sample
from trilithon_finetune.recipes.fields import Best, RowCheck, label_findings
from trilithon_parallel.config import ModelError
from trilithon_server.tasks.pieces import word_pieces
from trilithon_server.tasks.relations import RelationFormat, marker_ids

ROWS = "text/a/b/label"
MENTION_KEYS = ("start", "end", "type", "text")

Pair = tuple[Annotated[str, Field(min_length=1)], Annotated[str, Field(min_length=1)]]


class RelationOptions(Section):
    """Options of the task `relation`."""

    pairs: Annotated[tuple[Pair, ...], Field(min_length=1)] = (("CHEMICAL", "GENE"),)
    """Types of the first and the second mention that may be related."""
    negative: Annotated[str, Field(min_length=1)] = "false"
    """The label that says that there is no relation; F1 leaves it out."""


@dataclass(frozen=True, slots=True)
class RowMention:
    """A mention as a row gives it."""

    start: int
    end: int
    type: str


class Relation(Recipe):
    """The recipe of `relation`."""

    task = "relation"
    head: Head = "sequence"
    formats: tuple[str, ...] = (ROWS,)
    defaults = Defaults(
        lr_full=5e-5, dropout=0.1, head_lr_factor=10.0, batch_size=32, max_tokens=128, weight_decay=0.01
    )
    Options: type[Section] = RelationOptions
    best_metric: Best = ("f1", "max")

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By one of the two mentions."""
        return ROWS if "a" in row or "b" in row else None

    def rows_of(self, document: bytes, *, file: str) -> Sequence[Mapping[str, Any]] | Sequence[Finding] | None:
        """Only JSON lines."""
        return None

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """A text, two mentions that lie in it side by side, and a label."""
        check = RowCheck(row, file=file, line=line)
        check.keys(("text", "a", "b", "label", "id"))
        text = check.text("text")
        check.text("label")
        places = [_place(name, text, check) for name in ("a", "b")]
        if places[0] and places[1]:
            (a_start, a_end), (b_start, b_end) = places[0], places[1]
            if a_start < b_end and b_start < a_end:
                rule = f"must not overlap a. Given: {b_start} to {b_end}, and a is {a_start} to {a_end}."
                check.add("E-DATA-041", "b", rule)
        return check.findings

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """In the order of their names."""
        return tuple(sorted({row["label"] for row in rows}))

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> list[Sample] | list[Finding]:
        """One sample; a long sentence is cut around the mentions."""
        if wrong := label_findings(row["label"], context.labels, file=file, line=line):
            return wrong
        try:
            format_ = _format(context)
        except ModelError as error:
            return [finding("E-DATA-008", error.message, file=file, line=line, hint=error.hint)]
        a, b = _mention(row["a"]), _mention(row["b"])
        if (a.type, b.type) not in format_.pairs:
            allowed = ", ".join(f"{x}-{y}" for x, y in format_.pairs)
            rule = f"types of a and b must be one of {allowed}. Given: {shown(f'{a.type}-{b.type}')}."
            return [finding("E-DATA-008", rule, file=file, line=line, path="a.type", hint="Set options.pairs.")]
        encoded = format_.encode(row["text"], a, b, word_pieces(context.tokenizer))
        columns = {"label": context.labels.index(row["label"])}
        return [Sample(encoded.tokens, columns=columns, row=line)]

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """`precision`, `recall` and `f1` over all labels but the negative one, and `f1/LABEL` of each. From 0 to 1."""
        format_ = _format(context)
        gold = [rows[output.sample.row]["label"] for output in outputs]
        predicted = [format_.decode(output.values).label for output in outputs]
        total = positive_scores(gold, predicted, negative=format_.negative)
        numbers = {"precision": total.precision, "recall": total.recall, "f1": total.f1}
        each = class_scores(gold, predicted)
        return numbers | {f"f1/{name}": score.f1 for name, score in each.items() if name != format_.negative}

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """What `RelationFormat` reads."""
        return _format(context).task_file()


def _format(context: Context) -> RelationFormat:
    options = context.options
    assert isinstance(options, RelationOptions)
    types = sorted({name for pair in options.pairs for name in pair})
    markers = marker_ids(types, word_pieces(context.tokenizer))
    return RelationFormat(context.labels, markers, options.pairs, options.negative, context.max_tokens)


def _mention(value: Mapping[str, Any]) -> RowMention:
    return RowMention(value["start"], value["end"], value["type"])


def _place(name: str, text: str | None, check: RowCheck) -> tuple[int, int] | None:
    """Where a mention is, if it is sound and in the text."""
    mention = check.value(name, dict)
    if mention is None:
        return None
    check.keys(MENTION_KEYS, row=mention, path=name)
    check.text(f"{name}.type", row=mention)
    start, end = (check.value(f"{name}.{key}", int, row=mention) for key in ("start", "end"))
    if start is None or end is None or text is None:
        return None
    if not 0 <= start < end <= len(text):
        rule = f"must be characters of the text, start below end, from 0 to {len(text)}. Given: {start} to {end}."
        check.add("E-DATA-041", name, rule)
        return None
    said = mention.get("text")
    if said is not None and said != text[start:end]:
        rule = f"characters {start} to {end} of the text are {shown(text[start:end])}. Given: {shown(said)}."
        check.add("E-DATA-041", f"{name}.text", rule, "Offsets count characters (code points), not bytes.")
    return start, end
