"""Task `classify`: one label for a text or a pair of texts. Rows are `{"text", "text_pair"?, "label"}`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding, finding
from trilithon_finetune.metrics.classification import accuracy, class_scores, macro_f1
from trilithon_finetune.recipes.base import Context, Defaults, Head, Output, Recipe, Sample
from trilithon_finetune.recipes.fields import Best, RowCheck, label_findings
from trilithon_server.tasks.classes import ClassFormat
from trilithon_server.tasks.pieces import word_pieces

ROWS = "text/label"


class ClassifyOptions(Section):
    """Options of the task `classify`: none."""


class Classify(Recipe):
    """The recipe of `classify`."""

    task = "classify"
    head: Head = "sequence"
    formats: tuple[str, ...] = (ROWS,)
    defaults = Defaults(
        lr_full=5e-5, dropout=0.1, head_lr_factor=10.0, batch_size=32, max_tokens=512, weight_decay=0.01
    )
    Options: type[Section] = ClassifyOptions
    best_metric: Best = ("accuracy", "max")

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By a label, or a second text."""
        return ROWS if "label" in row or "text_pair" in row else None

    def rows_of(self, document: bytes, *, file: str) -> Sequence[Mapping[str, Any]] | Sequence[Finding] | None:
        """Only JSON lines."""
        return None

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """Texts that are not empty, and a label."""
        check = RowCheck(row, file=file, line=line)
        check.keys(("text", "text_pair", "label", "id"))
        check.text("text")
        if "text_pair" in row:
            check.text("text_pair")
        check.text("label")
        return check.findings

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """In the order of their names."""
        return tuple(sorted({row["label"] for row in rows}))

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> list[Sample] | list[Finding]:
        """One sample; of a row that is too long and may be cut, the longer text loses its end."""
        if wrong := label_findings(row["label"], context.labels, file=file, line=line):
            return wrong
        format_, pieces = ClassFormat(context.labels, context.max_tokens), word_pieces(context.tokenizer)
        encoded = format_.encode(row["text"], pieces, row.get("text_pair"))
        cut = max(0, len(encoded.tokens) - context.max_tokens)
        if cut and context.on_long != "truncate":
            rule = f"{len(encoded.tokens)} tokens, at most {context.max_tokens} allowed (data.max_tokens)."
            hint = "Set data.on_long to truncate or drop, or raise data.max_tokens."
            return [finding("E-DATA-021", rule, file=file, line=line, hint=hint)]
        if cut:
            encoded = format_.cut(row["text"], pieces, row.get("text_pair"))
        columns = {"label": context.labels.index(row["label"])}
        return [Sample(encoded.tokens, types=encoded.types, columns=columns, row=line, cut=cut)]

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """`accuracy`, `macro_f1`, and `f1/LABEL` of each label. From 0 to 1."""
        format_ = ClassFormat(context.labels, context.max_tokens)
        gold = [rows[output.sample.row]["label"] for output in outputs]
        predicted = [format_.decode(output.values).label for output in outputs]
        numbers = {"accuracy": accuracy(gold, predicted), "macro_f1": macro_f1(gold, predicted)}
        return numbers | {f"f1/{name}": score.f1 for name, score in class_scores(gold, predicted).items()}

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """What `ClassFormat` reads."""
        return ClassFormat(context.labels, context.max_tokens).task_file()
