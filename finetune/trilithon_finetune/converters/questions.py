"""Question sets as JSON lines, as rows of the recipes: QED, COVID-QA windows, PubMedQA."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Row = dict[str, Any]

SPAN_KEYS = ("id", "title", "context", "question", "answers")


def json_lines(document: bytes) -> Iterator[Row]:
    """Objects of JSON lines. Only line feeds end a line: abstracts hold other characters that `splitlines` cuts at."""
    for line in document.decode("utf-8").split("\n"):
        if line.strip():
            yield json.loads(line)


def span_row(row: Mapping[str, Any]) -> Row:
    """A row of the task `span_qa` from one of QED or COVID-QA, which hold further keys."""
    return {key: row[key] for key in SPAN_KEYS if key in row}


def pubmedqa_row(row: Mapping[str, Any]) -> Row:
    """A row of the task `classify`: the question, the abstract without its conclusion, and yes, no or maybe."""
    return {"text": row["question"], "text_pair": " ".join(row["contexts"]), "label": row["answer"], "id": row["pmid"]}
