"""
A conversation as text and as tokens, the same for a prompt and for training.

What somebody wrote in a message is text, whatever it spells: special tokens come from the template alone. And what an
assistant is to learn is where the template itself puts an assistant's turn, never what a search finds in the text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trilithon_parallel.literals import alternation
from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.text.template import ChatTemplate, Message
from trilithon_server.validation import invalid


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation; `literals` are the ranges of it, in characters, that must not be read as tokens."""

    text: str
    literals: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """
    What a model writes when it is an assistant's turn: [start, stop) of the text, what closes the turn included.

    `message` counts from 0.
    """

    message: int
    start: int
    stop: int


class TurnsDiffer(ValueError):
    """The template renders `message`, an assistant's turn, differently when the conversation ends there or before."""

    def __init__(self, message: int) -> None:
        super().__init__(f"messages[{message}]")
        self.message = message


def render_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> Rendered:
    """
    Render a conversation; the arguments are those of `ChatTemplate.render`.

    Raises:
        InvalidArgument: the template refuses the messages, or takes special token text in them apart.
    """

    def render(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> str:
        return template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    text = render(messages, tools)
    pattern = special_pattern(tokenizer)
    if pattern is None or not any(spelled(pattern, item) for item in (messages, tools)):
        return Rendered(text)
    # The same conversation with letters in the place of each such text: where the two differ, a message stands.
    shadow = render(_blotted(pattern, messages), _blotted(pattern, tools))
    if len(shadow) != len(text):
        rule = "hold special token text that the model's chat template takes apart"
        raise invalid("messages", rule, code="chat_template_failed", todo="Remove it.")
    return Rendered(text, tuple(_differing(text, shadow)))


def encode_chat(tokenizer: Tokenizer, rendered: Rendered) -> tuple[list[int], list[tuple[int, int]]]:
    """
    The token ids of a rendered conversation, and the characters that each came from.

    Raises:
        InvalidArgument: its special token text cannot be encoded as text.
    """
    try:
        return tokenizer.encode_with_literals(rendered.text, rendered.literals)
    except ValueError as error:
        raise invalid("messages", f"cannot be encoded: the text {error}", code="chat_special_text") from None


def assistant_turns(
    template: ChatTemplate, messages: Sequence[Message], text: str, *, tools: Sequence[dict[str, Any]] | None = None
) -> Iterator[Turn]:
    """
    The assistant's turns of a conversation, in order, found as they are asked for.

    A turn begins where the prompt for it ends and ends where the conversation up to it ends, both rendered; or it is
    what the template marks by `{% generation %}`.

    Args:
        text: the whole conversation, rendered without a prompt for a further turn.
    Raises:
        TurnsDiffer: one of these is not the beginning of the whole.
        InvalidArgument: the template refuses a part of the conversation.
    """
    at = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if template.marks_generation:
        _, spans = template.generated(messages, tools=tools)
        if len(spans) != len(at):
            raise TurnsDiffer(at[min(len(spans), len(at) - 1)])
        yield from (Turn(i, *span) for i, span in zip(at, spans, strict=True))
        return
    for i in at:
        prompt = template.render(messages[:i], tools=tools)
        closed = template.render(messages[: i + 1], tools=tools, add_generation_prompt=False)
        if not (text.startswith(closed) and closed.startswith(prompt)):
            raise TurnsDiffer(i)
        yield Turn(i, len(prompt), len(closed))


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """What finds the texts of a tokenizer's special tokens."""
    return _pattern_of(tokenizer)  # type: ignore[arg-type]  # tokenizers are told apart by identity


def spelled(pattern: re.Pattern[str], value: Any) -> str | None:
    """The first special token text within a message, or a list or object of any depth; None where there is none."""
    if isinstance(value, str):
        found = pattern.search(value)
        return found.group() if found else None
    items = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return next((text for item in items if (text := spelled(pattern, item))), None)


@functools.lru_cache(maxsize=16)
def _pattern_of(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    return alternation(tokenizer.id_to_piece(token) for token in tokenizer.special_ids)


def _blotted(pattern: re.Pattern[str], value: Any) -> Any:
    """The same value with every special token text replaced by as many letters, none equal to the one it replaces."""
    if isinstance(value, str):
        return pattern.sub(lambda found: "".join("y" if c == "x" else "x" for c in found.group()), value)
    if isinstance(value, dict):
        return {_blotted(pattern, key): _blotted(pattern, item) for key, item in value.items()}
    return [_blotted(pattern, item) for item in value] if isinstance(value, list | tuple) else value


def _differing(text: str, other: str) -> Iterator[tuple[int, int]]:
    """Runs of places where two texts of one length differ, half-open."""
    start = -1
    for i, (a, b) in enumerate(zip(text, other, strict=True)):
        if a != b and start < 0:
            start = i
        elif a == b and start >= 0:
            yield start, i
            start = -1
    if start >= 0:
        yield start, len(text)
