"""From what a caller passes to the fields of a request; the same for both clients."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from trilithon._parameters import CallOptions, ChatOptions, GenerationOptions, Message, TaskOptions

PromptInput = str | Sequence[int]
"""A prompt: text, or token ids that are used as they are."""


class _ScoreItemRequired(TypedDict):
    context: PromptInput


class ScoreItem(_ScoreItemRequired, total=False):
    """A context and the texts (or token ids) that may follow it: set one of the two lists."""

    continuations: Sequence[str]
    continuation_tokens: Sequence[Sequence[int]]


_CALL = frozenset(CallOptions.__annotations__)
_GENERATE = _CALL | frozenset(GenerationOptions.__annotations__)
_TASK = _CALL | frozenset(TaskOptions.__annotations__)
_CHAT = _GENERATE | frozenset(ChatOptions.__annotations__)


def generate(prompt: PromptInput, n: int | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a generation from a prompt."""
    check_names("generate", options, _GENERATE)
    return given({"prompt": prompt_value("prompt", prompt), "n": n, **options})


def chat(messages: Sequence[Message], n: int | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a generation from a conversation."""
    check_names("chat", options, _CHAT)
    return given({"messages": list(messages), "n": n, **options})


def score(items: Sequence[ScoreItem], top: int | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a scoring request."""
    check_names("score", options, _CALL)
    return given({"items": [dict(item) for item in items], "top": top, **options})


def embed(
    inputs: Sequence[PromptInput], pooling: str | None, normalize: bool | None, dimensions: int | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Fields of an embedding request."""
    check_names("embed", options, _CALL)
    if isinstance(inputs, str):
        raise TypeError("embed() takes a list of inputs. Given: a str. Put it into a list.")
    values = [prompt_value(f"inputs[{index}]", value) for index, value in enumerate(inputs)]
    return given({"inputs": values, "pooling": pooling, "normalize": normalize, "dimensions": dimensions, **options})


def task(method: str, fields: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a task that writes text: its own, and how to draw."""
    check_names(method, options, _TASK)
    return given({**fields, **options})


def plain(method: str, fields: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a request that takes nothing but its own and the call's options."""
    check_names(method, options, _CALL)
    return given({**fields, **options})


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What is set: None means unset, as null does on the wire. The call's own options travel elsewhere."""
    return {
        name: value for name, value in fields.items() if value is not None and name not in ("timeout", "request_id")
    }


def prompt_value(name: str, value: PromptInput) -> str | list[int]:
    """
    A prompt in its JSON shape.

    >>> prompt_value("prompt", (1, 2))
    [1, 2]
    """
    if isinstance(value, str):
        return value
    ids = list(value)
    wrong = next((item for item in ids if isinstance(item, bool) or not isinstance(item, int)), None)
    if wrong is not None:
        raise TypeError(f"`{name}` must be a str or a list of token ids. Given: a list that holds {wrong!r:.64}.")
    return ids


def check_names(method: str, options: Mapping[str, Any], known: frozenset[str]) -> None:
    """Refuse options that do not exist, naming the nearest one that does."""
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}.{hint}")
