"""
Task `sft`: learn to answer. Rows are conversations, as OpenAI has them, or plain texts.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "tools": [...]}
    {"prompt": "Hi\\n", "completion": "Hello"}

Messages go through the model's chat template; a prompt is taken as it stands, as the completions route takes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding
from trilithon_finetune.recipes.base import Context, Defaults, Head, Output, Recipe, Sample
from trilithon_finetune.recipes.fields import Best, RowCheck
from trilithon_finetune.recipes.messages import Place, check_messages, check_tools, encode_messages
from trilithon_finetune.recipes.texts import answered, continuation, untrained_end

MESSAGES = "messages"
COMPLETION = "prompt/completion"

_KEYS = {MESSAGES: ("messages", "tools", "id"), COMPLETION: ("prompt", "completion", "id")}


class SftOptions(Section):
    """Task `sft` has no options."""


class Chat(Recipe):
    """The recipe of `sft`."""

    task = "sft"
    head: Head = "vocabulary"
    formats: tuple[str, ...] = (MESSAGES, COMPLETION)
    defaults = Defaults(lr_full=2e-5, max_tokens=1024, schedule="cosine", warmup_ratio=0.05, betas=(0.9, 0.95))
    Options: type[Section] = SftOptions
    best_metric: Best = ("valid_loss", "min")

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By the key `messages`, or one of `prompt` and `completion`."""
        if "messages" in row:
            return MESSAGES
        return COMPLETION if "prompt" in row or "completion" in row else None

    def rows_of(self, document: bytes, *, file: str) -> None:
        """JSON lines only."""

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """Sound messages that the assistant answers, or two texts that are not empty."""
        check = RowCheck(row, file=file, line=line)
        check.keys(_KEYS[format])
        if format == COMPLETION:
            check.text("prompt")
            check.text("completion")
            return check.findings
        messages = check.value("messages", list)
        if messages is not None:
            check_messages(check, messages, path="messages")
        if "tools" in row:
            check_tools(check, row["tools"], path="tools")
        return check.findings

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """None."""
        return ()

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> Sequence[Sample | Finding]:
        """The conversation with the assistant's turns supervised, or the prompt with its completion supervised."""
        if "messages" in row:
            return encode_messages(row["messages"], context, Place(file, line), tools=row.get("tools"))
        head, answer = continuation(context.tokenizer, row["prompt"], row["completion"])
        found = answered(head, answer, context, file=file, line=line, path="completion")
        return [found, *untrained_end(context, file=file, line=line)] if isinstance(found, Sample) else [found]

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """The loss says it all."""
        return {}

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """Nothing: the chat template says how it is served."""
        return {}
