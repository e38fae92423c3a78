"""
SQuAD 1.1 and 2.0: `{"data": [{"title", "paragraphs": [{"context", "qas": [{"question", "answers"}]}]}]}`.

Flat rows are `{"context", "question", "answers": [{"text", "answer_start"}], "id"?, "title"?, "is_impossible"?,
"plausible_answers"?}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from trilithon_finetune.data.findings import Finding, finding, shown
from trilithon_finetune.data.placed import PlacedRow

ANSWER_KEYS = ("text", "answer_start")


def read_squad(document: bytes, *, file: str) -> list[PlacedRow] | list[Finding] | None:
    """
    Questions as flat rows that know their path in the document; or what is wrong with its frame. None where the
    document is not one JSON object with `data`.
    """
    try:
        tree = json.loads(document)
    except (ValueError, RecursionError):
        return None
    if not isinstance(tree, dict) or "data" not in tree:
        return None
    rows: list[PlacedRow] = []
    broken: list[Finding] = []
    for path, title, paragraph in _paragraphs(tree, broken, file):
        for place, question in _items(paragraph, "qas", path, broken, file):
            row = PlacedRow({"context": paragraph.get("context")}, path=place)
            row |= {"title": title} if isinstance(title, str) else {}
            row |= {key: question[key] for key in ("id", "question", "is_impossible") if key in question}
            answers = question.get("answers", [])
            if isinstance(answers, list):
                answers = [_answer(item) for item in answers]
            row["answers"] = answers
            plausible = question.get("plausible_answers")
            if isinstance(plausible, list):
                row["plausible_answers"] = [_answer(item) for item in plausible]
            rows.append(row)
    return broken or rows


def _answer(item: Any) -> Any:
    return {key: item[key] for key in ANSWER_KEYS if key in item} if isinstance(item, dict) else item


def _paragraphs(
    tree: Mapping[str, Any], broken: list[Finding], file: str
) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    for article_path, article in _items(tree, "data", "", broken, file):
        for path, paragraph in _items(article, "paragraphs", article_path, broken, file):
            yield path, article.get("title"), paragraph


def _items(
    holder: Mapping[str, Any], key: str, path: str, broken: list[Finding], file: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a list with their paths; what is none is a finding."""
    name = f"{path}.{key}" if path else key
    items = holder.get(key)
    if not isinstance(items, list):
        broken.append(finding("E-DATA-008", f"must be a list. Given: {shown(items)}.", file=file, path=name))
        return
    for i, item in enumerate(items):
        if isinstance(item, dict):
            yield f"{name}[{i}]", item
        else:
            rule = f"must be an object. Given: {shown(item)}."
            broken.append(finding("E-DATA-008", rule, file=file, path=f"{name}[{i}]"))
