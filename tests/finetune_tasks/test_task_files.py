"""Task files: what they describe comes back, and what is no task file is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trilithon_parallel.config import ModelError
from trilithon_server.tasks import FORMATS, TASK_FILE, read_task, task_format
from trilithon_server.tasks.answer_spans import AnswerFormat
from trilithon_server.tasks.classes import ClassFormat
from trilithon_server.tasks.dialogue_format import DialogueFormat
from trilithon_server.tasks.question_format import QuestionFormat
from trilithon_server.tasks.reader_format import ReaderFormat
from trilithon_server.tasks.relations import RelationFormat
from trilithon_server.tasks.retrieval import RetrievalFormat
from trilithon_server.tasks.spans import SpanFormat
from trilithon_server.tasks.story_format import KeywordFormat, RankerFormat, SentenceFormat
from trilithon_server.tasks.tagging import TaggingFormat

SAMPLES = [
    TaggingFormat(("Chemical", "Disease"), method="whole", max_tokens=128, stride=16),
    SpanFormat(max_tokens=200, null_threshold=1.5),
    SpanFormat(),
    RelationFormat(("CPR:4", "false"), {"CHEMICAL": 1, "GENE": 2}, max_tokens=64),
    ClassFormat(("no", "yes"), max_tokens=99),
    DialogueFormat(markers="tokens", roles="types", positions="restart", order="knowledge", max_knowledge=0),
    AnswerFormat(max_tokens=99, max_answer_tokens=4),
    QuestionFormat(roles="types", context="whole"),
    RetrievalFormat(),
    KeywordFormat(max_story=77),
    SentenceFormat(max_knowledge=9),
    RankerFormat(),
    ReaderFormat(strength=1.5),
    ReaderFormat(kind="individual", max_answer_tokens=9),
]


@pytest.mark.parametrize("format_", SAMPLES, ids=lambda value: type(value).__name__)
def test_a_format_survives_its_file(tmp_path: Path, format_: Any) -> None:
    """Written as JSON beside a model and read again, it is the same."""
    (tmp_path / TASK_FILE).write_text(json.dumps(format_.task_file()), encoding="utf-8")

    assert read_task(tmp_path) == format_


def test_a_directory_without_a_task_file_has_no_task(tmp_path: Path) -> None:
    """Most models are no task models."""
    assert read_task(tmp_path) is None


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, r"task must be one of ner, span_qa, .*\. Given: None"),
        ({"task": "sft"}, "Given: 'sft'"),
        ({"task": "classify", "labels": ["a"]}, "of a classify model must have max_tokens"),
        ({"task": "classify", "labels": ["a"], "max_tokens": "many"}, "a value of the wrong kind"),
        ({**SAMPLES[0].task_file(), "method": "last"}, "method must be one of first, whole"),
        ({**SAMPLES[3].task_file(), "pairs": [["A"]]}, "a value of the wrong kind"),
        ({**DialogueFormat().task_file(), "markers": "words"}, "markers: .* 'text' or 'tokens'. Given: 'words'"),
        ({**DialogueFormat().task_file(), "max_conversation": 0}, "max_conversation: .* greater than or equal to 1"),
        ({**QuestionFormat().task_file(), "max_question": "48"}, "max_question: .* a valid integer. Given: '48'"),
        ({**RankerFormat().task_file(), "max_fact": True}, "max_fact: .* a valid integer. Given: True"),
        (
            {**SAMPLES[-1].task_file(), "strength": 2.0},
            r"strength must be 0 where each .* alone\. Given: 2",
        ),
        ({**SAMPLES[-2].task_file(), "max_passage_tokens": 70}, r"max_question_tokens \+ 16. Given: 70 and 64"),
        ({"task": "answer_gen", "max_tokens": 99}, "of a answer_gen model must have doc_stride"),
    ],
)
def test_what_is_no_task_file_is_refused(document: dict[str, Any], message: str) -> None:
    """What is missing or wrong is named."""
    with pytest.raises(ModelError, match=message) as caught:
        task_format(document)
    assert caught.value.code == "task_invalid"


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    """Also bytes that are no text, and nesting without end."""
    (tmp_path / TASK_FILE).write_bytes(content)

    with pytest.raises(ModelError, match=TASK_FILE):
        read_task(tmp_path)


def test_every_task_has_a_format() -> None:
    """The table holds each once."""
    assert {type(item) for item in SAMPLES} == set(FORMATS.values())
