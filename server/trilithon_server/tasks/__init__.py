"""
The text formats of tasks: what a model reads and what it says means. No torch.

A recipe trains with the same functions with which the server answers. What a model was trained with is stored beside
it as `task.json`, which each format writes (`task_file`) and reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from trilithon_parallel.config import ModelError
from trilithon_server.tasks.answer_spans import AnswerFormat
from trilithon_server.tasks.classes import ClassFormat
from trilithon_server.tasks.dialogue_format import DialogueFormat
from trilithon_server.tasks.msdp_format import MsdpFile, MsdpFormat
from trilithon_server.tasks.question_format import QuestionFormat
from trilithon_server.tasks.reader_format import ReaderFormat
from trilithon_server.tasks.relations import RelationFormat
from trilithon_server.tasks.retrieval import RetrievalFormat
from trilithon_server.tasks.spans import SpanFormat
from trilithon_server.tasks.story_format import KeywordFormat, RankerFormat, SentenceFormat, StoryFormat
from trilithon_server.tasks.tagging import TaggingFormat

TASK_FILE = "task.json"

HeadFormat: TypeAlias = TaggingFormat | SpanFormat | RelationFormat | ClassFormat | AnswerFormat
"""Of encoders with a task head."""

TrainedFormat: TypeAlias = HeadFormat | DialogueFormat | RetrievalFormat | StoryFormat | QuestionFormat | ReaderFormat
"""Of models that were trained for a task."""

TaskFormat: TypeAlias = TrainedFormat | MsdpFormat

HEADS: dict[str, type[HeadFormat]] = {
    "ner": TaggingFormat,
    "span_qa": SpanFormat,
    "relation": RelationFormat,
    "classify": ClassFormat,
    "answer_gen": AnswerFormat,
}
"""Format by the name of a task that ends in a head."""

FORMATS: dict[str, type[TrainedFormat]] = {
    **HEADS,
    "dialogue": DialogueFormat,
    "retrieval": RetrievalFormat,
    **{kind.task: kind for kind in (KeywordFormat, SentenceFormat, RankerFormat)},
    "question_gen": QuestionFormat,
    "reader": ReaderFormat,
}
"""Format by what a task file calls its task."""


def task_format(document: Mapping[str, Any]) -> TrainedFormat | MsdpFile:
    """
    The format that a task file describes.

    Raises:
        ModelError: `task_invalid`.
    """
    task = document.get("task")
    if task not in FORMATS:
        raise _invalid(f"{TASK_FILE} task must be one of {', '.join(FORMATS)}. Given: {task!r}.")
    try:
        if task == MsdpFile.task and "msdp" in document:
            return MsdpFile.from_task_file(document)
        return FORMATS[task].from_task_file(document)
    except KeyError as error:
        raise _invalid(f"{TASK_FILE} of a {task} model must have {error.args[0]}. Given: {sorted(document)}.") from None
    except (TypeError, ValueError) as error:
        raise _invalid(f"{TASK_FILE} of a {task} model has a value of the wrong kind: {error}.") from None


def read_task(model_dir: Path) -> TaskFormat | None:
    """
    The task of a model's or an adapter's directory; None where it has no task file.

    Raises:
        ModelError: `task_invalid`, the file is there and is not a task file.
    """
    path = model_dir / TASK_FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _invalid(f"{TASK_FILE} is not JSON: {error}.") from None
    if not isinstance(document, dict):
        raise _invalid(f"{TASK_FILE} must hold a JSON object. Given: {type(document).__name__}.")
    task = task_format(document)
    if not isinstance(task, MsdpFile):
        return task
    try:
        return task.beside(model_dir)
    except ValueError as error:
        hint = "Mend the file of examples, which lies beside the task file."
        raise ModelError(f"{TASK_FILE} {error}.", code="task_invalid", hint=hint) from None


def _invalid(message: str) -> ModelError:
    return ModelError(message, code="task_invalid", hint="Export the model again, or copy the file that came with it.")
