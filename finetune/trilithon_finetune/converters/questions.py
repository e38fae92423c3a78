"""Question sets as JSON lines, as rows of the recipes: QED, COVID-QA windows, PubMedQA, FairytaleQA."""

from __future__ import annotations

import json
import re
from collections import Counter
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


def fairytale_rows(questions: bytes, stories: bytes, dropped: Counter[str]) -> Iterator[Row]:
    """
    Rows of SQuAD's form: the sections that a question is about, in one line, and its answer where it first stands there
    as whole words, in any case.

    Args:
        questions: `{"story", "sections": ["1", ...], "question", "answers", "explicit"}`. stories: `{"story",
            "sections": [text, ...]}`.
        dropped: counts questions whose answer is no part of the text, under the reason.
    Raises:
        ValueError: a question is about a story or section that there is none of.
    """
    told = {row["story"]: row["sections"] for row in json_lines(stories)}
    for row in json_lines(questions):
        try:
            sections = [told[row["story"]][int(number) - 1] for number in row["sections"]]
        except (KeyError, IndexError):
            raise ValueError(f"story {row['story']!r} has no sections {row['sections']} in the second file.") from None
        context = " ".join(" ".join(sections).split())
        answers = [" ".join(answer.split()).strip(". ") for answer in row["answers"]]
        found = [match for answer in answers if answer and (match := _words(answer).search(context))]
        if row["explicit"] != "explicit":
            dropped["questions whose answer is implied"] += 1
        elif found:
            places = [{"text": found[0][0], "answer_start": found[0].start()}]
            yield {"title": row["story"], "context": context, "question": row["question"], "answers": places}
        elif any(answer and answer.lower() in context.lower() for answer in answers):
            dropped["questions whose answer is a part of a word"] += 1
        else:
            dropped["questions whose answer is said in other words"] += 1


def _words(answer: str) -> re.Pattern[str]:
    """The answer as whole words, in any case."""
    return re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)
