"""What the server knows of an encoder that was finetuned for a task: its text format and its words, checked."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trilithon.errors import FailedPrecondition
from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.tasks import HEADS, TASK_FILE, HeadFormat, TaskFormat, read_task
from trilithon_server.tasks.answer_spans import AnswerFormat
from trilithon_server.tasks.classes import ClassFormat
from trilithon_server.tasks.pieces import WordPieces
from trilithon_server.tasks.reader_format import ReaderFormat, frame
from trilithon_server.tasks.relations import RelationFormat
from trilithon_server.tasks.spans import SpanFormat
from trilithon_server.tasks.tagging import TaggingFormat

TaskCapability = Literal["annotate", "relations", "answer", "classify", "propose"]

CAPABILITIES: Mapping[type[HeadFormat], TaskCapability] = {
    TaggingFormat: "annotate",
    RelationFormat: "relations",
    SpanFormat: "answer",
    ClassFormat: "classify",
    AnswerFormat: "propose",
}
_HEADS = {
    TaggingFormat: "tokens",
    RelationFormat: "sequence",
    SpanFormat: "span",
    ClassFormat: "sequence",
    AnswerFormat: "joint_span",
}


@dataclass(frozen=True)
class TaskModel:
    """
    Attributes:
        format: how texts are written and answers read.
        pieces: the tokenizer, word by word.
        num_labels: columns of the head's logits.
    """

    format: HeadFormat
    pieces: WordPieces
    num_labels: int

    @property
    def capability(self) -> TaskCapability:
        """What requests call it."""
        return CAPABILITIES[type(self.format)]


def known_capabilities(task: str) -> list[str]:
    """
    What a model can do that a job of this task made; empty for other tasks, where its directory must be read.

    >>> known_capabilities("ner"), known_capabilities("sft")
    (['annotate', 'embed', 'tokenize'], [])
    """
    return [CAPABILITIES[HEADS[task]], "embed", "tokenize"] if task in HEADS else []


@functools.lru_cache(maxsize=256)
def adapter_task(directory: str, digest: str) -> TaskFormat | None:
    """
    The task that an adapter was trained for; None where its directory names none.

    Args:
        digest: of the adapter's version, which has one task for ever.
    Raises:
        FailedPrecondition: `task_invalid`, the task file is broken.
    """
    try:
        return read_task(Path(directory))
    except ModelError as error:
        raise FailedPrecondition(error.message, code=error.code, hint=error.hint) from None


def load_reader(task: ReaderFormat, config: ModelConfig, tokenizer: Tokenizer, max_context: int) -> ReaderFormat:
    """
    The format of a reader, where it fits the model.

    Raises:
        ModelError: `task_invalid`, it is another model's; `task_tokenizer`, the tokenizer cannot part a question from
            a passage.
    """
    frame(tokenizer)
    for name, holds, rule, given in (
        ("task", config.is_seq2seq, "reader needs an encoder-decoder", config.architecture),
        ("max_passage_tokens", task.max_passage_tokens <= max_context, f"must be at most {max_context}, the window",
         task.max_passage_tokens),
        ("max_answer_tokens", task.max_answer_tokens < max_context, f"must be below {max_context}, the window",
         task.max_answer_tokens),
    ):  # fmt: skip
        if not holds:
            raise _not_its(f"{name} {rule}. Given: {given}.")
    return task


def load_task(directory: Path, *, config: ModelConfig, tokenizer: Tokenizer, max_context: int) -> TaskModel | None:
    """
    The task of a model directory; None where it has no head, or no task file that is one of a head's, and only embeds.

    Args:
        max_context: tokens that the model may be given here.
    Raises:
        ModelError: `task_invalid`, the task file is broken, or is not this model's; `task_tokenizer`.
    """
    head = config.task_head
    task = read_task(directory) if head is not None else None
    if head is None or not isinstance(task, HeadFormat):
        return None
    labels = head.labels if isinstance(task, SpanFormat) else task.labels
    size = task.max_tokens
    rules: tuple[tuple[str, bool, str, object], ...] = (
        ("task", _HEADS[type(task)] == head.kind, f"must fit a model that labels {head.kind}", type(task).__name__),
        ("labels", labels == head.labels, f"must be those of config.json, {', '.join(head.labels)}", list(labels)),
        ("max_tokens", 8 <= size <= max_context, f"must be from 8 to {max_context}, the window", size),
    )
    if isinstance(task, RelationFormat):
        ids = sorted(task.markers.values())
        fits = bool(ids) and ids[0] >= 0 and ids[-1] < config.vocab_size
        rules = (*rules, ("markers", fits, f"must be token ids below {config.vocab_size}", dict(task.markers)))
    for name, holds, rule, given in rules:
        if not holds:
            raise _not_its(f"{name} {rule}. Given: {given}.")
    return TaskModel(task, WordPieces(tokenizer), len(head.labels))


def _not_its(message: str) -> ModelError:
    hint = "Export the model again, or copy the file that came with it."
    return ModelError(f"{TASK_FILE} {message}", code="task_invalid", hint=hint)
