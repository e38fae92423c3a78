"""Rows of stories, as all tasks of stories take them: what is wrong with one, and its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trilithon_finetune.data.findings import Finding, shown
from trilithon_finetune.recipes.fields import RowCheck
from trilithon_server.knowledge.keywords import keywords

SENTENCES = "sentences"
KEYS = ("sentences", "title", "steps", "labelled_by", "id", "source")
LISTS = ("keywords", "facts", "ranked", "others")
"""Of a step."""
LABEL_FIRST = "Label the rows with `trilithon data stories`."


@dataclass(frozen=True, slots=True)
class Step:
    """
    A sentence to be learned, and what is known of it.

    Attributes:
        index: of the sentence among the row's, from 1: the first one is given.
        facts, ranked, others: as `StoryLabeller` has them; empty of a row that is not labelled.
    """

    index: int
    told: Sequence[str]
    sentence: str
    keywords: Sequence[str]
    facts: Sequence[str] = ()
    ranked: Sequence[str] = ()
    others: Sequence[str] = ()


def steps_of(row: Mapping[str, Any]) -> Iterator[Step]:
    """Every sentence of a sound row but the first; keywords are found where no label has them."""
    sentences = row["sentences"]
    labels = row.get("steps") or [{"keywords": keywords(sentence)} for sentence in sentences[1:]]
    for index, label in enumerate(labels, start=1):
        yield Step(index, sentences[:index], sentences[index], **label)


def check_story(row: Mapping[str, Any], *, file: str, line: int, labelled: bool = False) -> list[Finding]:
    """
    What is wrong with a row.

    Args:
        labelled: whether it must have steps.
    """
    check = RowCheck(row, file=file, line=line)
    check.keys(KEYS)
    sentences = _texts("sentences", check.value("sentences", list), check)
    if sentences is not None and len(sentences) < 2:
        rule = f"must hold at least 2 sentences: the first one is given. Given: {len(sentences)}."
        check.add("E-DATA-022", "sentences", rule)
    if "title" in row:
        check.value("title", str)
    if labelled and "steps" not in row:
        check.add("E-DATA-008", "steps", "is missing: nothing says which facts go with a sentence.", LABEL_FIRST)
    steps = check.value("steps", list) if "steps" in row else None
    if steps is None:
        return check.findings
    if sentences is not None and len(steps) != len(sentences) - 1:
        rule = f"must hold a step for each sentence but the first, {len(sentences) - 1}. Given: {len(steps)}."
        check.add("E-DATA-008", "steps", rule, LABEL_FIRST)
    for i, step in enumerate(steps):
        path = f"steps[{i}]"
        if not isinstance(step, dict):
            check.add("E-DATA-008", path, f"must be an object with keywords. Given: {shown(step)}.")
            continue
        check.keys(LISTS, row=step, path=path)
        for name in LISTS:
            if name in step or name == "keywords":
                _texts(f"{path}.{name}", check.value(f"{path}.{name}", list, row=step), check)
    return check.findings


def _texts(path: str, values: list[Any] | None, check: RowCheck) -> list[str] | None:
    """The values if they are texts; else None, with findings."""
    if values is None:
        return None
    sound = True
    for i, value in enumerate(values):
        if not isinstance(value, str):
            check.add("E-DATA-008", f"{path}[{i}]", f"must be text. Given: {shown(value)}.")
            sound = False
        elif not value.strip():
            check.add("E-DATA-015", f"{path}[{i}]", "is empty.")
            sound = False
    return values if sound else None
