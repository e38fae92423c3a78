"""Rows of stories, as all tasks of stories take them: what is wrong with one, its steps, and who labels it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding, shown
from trilithon_finetune.recipes.base import Context
from trilithon_finetune.recipes.fields import RowCheck
from trilithon_server.knowledge.keywords import keywords

SENTENCES = "sentences"
KEYS = ("sentences", "title", "steps", "labelled_by", "id", "source")
LISTS = ("keywords", "facts", "ranked", "others")
"""Of a step."""
LABEL_FIRST = "Set options.concepts and options.encoder, or label the rows with `trilithon data stories`."


class LabelSources(Section):
    """Options of tasks whose rows the job labels itself, where they come without labels."""

    concepts: Annotated[str, Field(min_length=1)] | None = None
    """Facts: the name of the server's concepts, or a path (command line only). None: rows have their labels."""
    encoder: Annotated[str, Field(min_length=1)] | None = None
    """Its cosines say which facts go with a sentence: a model like `model`. Given with `concepts`, and only then."""

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.concepts is None) != (self.encoder is None):
            raise ValueError("concepts and encoder must be given together: one has the facts, the other ranks them")
        return self


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


def spread(texts: Sequence[str], most: int) -> list[str]:
    """At most so many of them, evenly from the first on."""
    kept = min(most, len(texts))
    return [texts[i * len(texts) // kept] for i in range(kept)]


def steps_of(row: Mapping[str, Any]) -> Iterator[Step]:
    """Every sentence of a sound row but the first; keywords are found where no label has them."""
    sentences = row["sentences"]
    labels = row.get("steps") or [{"keywords": keywords(sentence)} for sentence in sentences[1:]]
    for index, label in enumerate(labels, start=1):
        yield Step(index, sentences[:index], sentences[index], **label)


def labelled(row: Mapping[str, Any], context: Context) -> Mapping[str, Any]:
    """The row, with the labels that the job makes where it came without."""
    return row if context.label is None or "steps" in row else context.label(row)


def check_story(row: Mapping[str, Any], *, file: str, line: int) -> list[Finding]:
    """What is wrong with a row."""
    check = RowCheck(row, file=file, line=line)
    check.keys(KEYS)
    sentences = _texts("sentences", check.value("sentences", list), check)
    if sentences is not None and len(sentences) < 2:
        rule = f"must hold at least 2 sentences: the first one is given. Given: {len(sentences)}."
        check.add("E-DATA-022", "sentences", rule)
    if "title" in row:
        check.value("title", str)
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
