"""Rows of messages: what a sound conversation is, and how its turns become tokens and a loss mask."""

from __future__ import annotations

import bisect
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trilithon.errors import InvalidArgument
from trilithon_finetune.data.findings import Finding, finding, nearest, shown
from trilithon_finetune.recipes.base import Context, Sample
from trilithon_finetune.recipes.fields import RowCheck
from trilithon_finetune.recipes.texts import (
    end_finding,
    next_token_targets,
    nothing_learned,
    special_text,
    too_long,
)
from trilithon_server.prompts import ROLES, content_text
from trilithon_server.text.chat import Turn, TurnsDiffer, assistant_turns, encode_chat, render_chat

_KEYS = ("role", "content", "name")
_KEYS_OF = {"assistant": (*_KEYS, "tool_calls", "weight"), "tool": (*_KEYS, "tool_call_id")}

_ALL_KEYS = (*_KEYS, "tool_calls", "weight", "tool_call_id")

_MAY_FOLLOW: Mapping[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool": ("assistant", "tool"),
}
"""Whose turn it may be after whose; after an assistant's calls it is the tools'."""


def check_messages(
    check: RowCheck, messages: Sequence[Any], *, path: str, after: str = "", answered: bool = True
) -> None:
    """
    Note what is wrong with a conversation: roles, order, contents.

    Args:
        path: of the list in the row.
        after: the role before the first message; empty at the beginning of a conversation.
        answered: whether it must end with an assistant's turn; else it must end with somebody else's.
    """
    if not messages:
        check.add("E-DATA-011", path, "has no messages.")
        return
    allowed = _MAY_FOLLOW[after]
    sound = True
    for i, message in enumerate(messages):
        where = f"{path}[{i}]"
        role = _check_message(check, message, where)
        if role is None:
            sound = False
        elif sound and role not in allowed:
            whose = " or ".join(allowed)
            before = f"after {_before(messages, i, after)}" if i or after else "at the beginning"
            check.add("E-DATA-013", f"{where}.role", f"{shown(role)} is out of turn {before}. Allowed there: {whose}.")
            sound = False
        if role is not None:
            allowed = ("tool",) if message.get("tool_calls") else _MAY_FOLLOW[role]
    roles = [message.get("role") for message in messages if isinstance(message, dict)]
    if answered and "assistant" not in roles:
        if sound:
            check.add("E-DATA-014", path, "has no turn of the assistant, so there is nothing to learn.")
    elif sound and (roles[-1] == "assistant") != answered:
        rule = "must end with a turn of the assistant" if answered else "must not end with a turn of the assistant"
        check.add("E-DATA-013", f"{path}[{len(messages) - 1}].role", f"{rule}. Given: {shown(roles[-1])}.")


def _before(messages: Sequence[Any], i: int, after: str) -> str:
    if not i:
        return after
    previous = messages[i - 1]
    return f"{previous['role']}'s calls" if previous.get("tool_calls") else str(previous["role"])


def _check_message(check: RowCheck, message: Any, where: str) -> str | None:
    """Note what is wrong with one message; its role if that is known."""
    if not isinstance(message, dict):
        check.add("E-DATA-004", where, f"must be an object. Given: {shown(message)}.")
        return None
    role = check.value(f"{where}.role", str, row=message)
    if role is not None and role not in ROLES:
        rule = f"{shown(role)} is not a role. Allowed: {', '.join(ROLES)}."
        check.add("E-DATA-012", f"{where}.role", rule, nearest(role, ROLES).strip())
        role = None
    check.keys(_KEYS_OF.get(role, _KEYS) if role else _ALL_KEYS, row=message, path=where)
    _check_content(check, message, where)
    if "tool_calls" in message:
        _check_objects(check, message["tool_calls"], f"{where}.tool_calls")
    for key in ("name", "tool_call_id"):
        if key in message:
            check.value(f"{where}.{key}", str, row=message)
    if message.get("weight", 1) not in (0, 1) or isinstance(message.get("weight"), bool):
        check.add("E-DATA-008", f"{where}.weight", f"must be 0 or 1. Given: {shown(message['weight'])}.")
    return None if role is None else str(role)


def _check_content(check: RowCheck, message: Mapping[str, Any], where: str) -> None:
    content, path = message.get("content"), f"{where}.content"
    if content is None:
        if not message.get("tool_calls"):
            if "content" in message:
                check.add("E-DATA-015", path, "is empty.")
            else:
                check.add("E-DATA-008", path, "is missing. Give a text.")
    elif isinstance(content, list):
        for i, part in enumerate(content):
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                rule = f'must be {{"type": "text", "text": ...}}. Given: {shown(part)}.'
                check.add("E-DATA-008", f"{path}[{i}]", rule)
                return
        if not content_text(content).strip():
            check.add("E-DATA-015", path, "is empty.")
    elif not isinstance(content, str):
        check.add("E-DATA-008", path, f"must be a text. Given: {shown(content)}.")
    elif not content.strip() and not message.get("tool_calls"):
        check.add("E-DATA-015", path, "is empty.")


def check_tools(check: RowCheck, tools: Any, *, path: str) -> None:
    """Note what is wrong with a row's `tools`, which the template gets as they are."""
    _check_objects(check, tools, path)


def _check_objects(check: RowCheck, items: Any, path: str) -> None:
    if not isinstance(items, list):
        check.add("E-DATA-008", path, f"must be a list. Given: {shown(items)}.")
        return
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            check.add("E-DATA-004", f"{path}[{i}]", f"must be an object. Given: {shown(item)}.")


@dataclass(frozen=True)
class Place:
    """
    Where a conversation stands, for findings.

    Attributes:
        path: of the list of its messages in the row.
        before, before_path: how many messages stand before those in another list, and where that is.
    """

    file: str
    line: int
    path: str = "messages"
    before: int = 0
    before_path: str = ""

    def finding(self, code: str, message: str, *, hint: str = "", at: int | None = None) -> Finding:
        """A finding about the conversation, or its message `at`."""
        path = self.path if at is None else self.message(at)
        return finding(code, message, file=self.file, line=self.line, path=path, hint=hint)

    def message(self, at: int) -> str:
        """The path of a message."""
        return f"{self.before_path}[{at}]" if at < self.before else f"{self.path}[{at - self.before}]"


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    context: Context,
    place: Place,
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    learned: Container[int] | None = None,
    part: int = 0,
) -> Sequence[Sample | Finding]:
    """
    The sample of a sound conversation, with warnings behind it; or why it cannot be learned.

    The tokens are those that the server feeds for the same messages. An assistant's turn is supervised from the first
    token behind the prompt for it to its end token; a token that spans the two belongs to neither.

    Args:
        learned: which messages are supervised; None: as the row's weights and `context.train_on` say.
        part: of the sample.
    """
    template, tokenizer = context.template, context.tokenizer
    if template is None:
        rule = "cannot be learned: the model has no chat template."
        return [place.finding("E-DATA-016", rule, hint="Use rows of prompt and completion.")]
    plain = [_plain(message) for message in messages]
    try:
        rendered = render_chat(template, tokenizer, plain, tools=tools, add_generation_prompt=False)
        tokens, offsets = encode_chat(tokenizer, rendered)
        most = min(len(tokens), context.max_tokens)
        if most < len(tokens) and context.on_long != "truncate":
            return [too_long(len(tokens), context, file=place.file, line=place.line)]
        starts, stops = tiled(offsets)
        turns = []
        for turn in assistant_turns(template, plain, rendered.text, tools=tools):
            if most < len(tokens) and turn.start >= stops[most - 1]:
                break
            turns.append(turn)
    except TurnsDiffer as error:
        rule = "is rendered differently by the template when the conversation ends there and when it goes on."
        hint = "Make rows of one turn of the assistant each, the last."
        return [place.finding("E-DATA-016", rule, hint=hint, at=error.message)]
    except InvalidArgument as error:
        code = "E-DATA-013" if error.code == "chat_roles" else "E-DATA-016"
        return [place.finding(code, error.message.removeprefix("`messages` "))]
    supervised = [context.train_on == "all" and learned is None] * len(tokens)
    findings: list[Finding] = []
    ends: set[int] = set()
    for turn in turns:
        first = bisect.bisect_left(starts, turn.start)
        stop = bisect.bisect_right(stops, turn.stop)
        counts = messages[turn.message].get("weight", 1) == 1 if learned is None else turn.message in learned
        if not counts:
            supervised[first:stop] = [False] * (stop - first)
            continue
        end = next((i for i in reversed(range(first, stop)) if tokens[i] in tokenizer.eos_ids), None)
        if end is None and stop <= most:
            findings.append(_no_end(turn, context, place))
        elif end is not None and end < most:
            ends.add(tokens[end])
        last = stop if end is None else end + 1
        supervised[first:last] = [True] * (last - first)
    if findings:
        return findings
    cut = len(tokens) - most
    if not any(supervised[1:most]):
        return [nothing_learned(context, file=place.file, line=place.line, path=place.path, cut=cut)]
    targets = next_token_targets(tokens[:most], supervised[:most])
    for token in sorted(ends & context.untrained_ids):
        findings.append(end_finding(token, context, file=place.file, line=place.line))
    for i, item in enumerate(plain) if rendered.literals else ():
        path = place.message(i) + ".content"
        findings += special_text(tokenizer, item["content"], file=place.file, line=place.line, path=path, read=False)
    return [Sample(tuple(tokens[:most]), targets, row=place.line, part=part, cut=cut), *findings]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the template reads it, the way the chat route hands it over."""
    kept = {key: value for key, value in message.items() if key != "weight"}
    return {**kept, "content": content_text(message.get("content"))}


def tiled(offsets: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """
    Where each token begins and ends in a text, so that they leave no gap: some tokenizers leave the space before a
    word out of its place.

    >>> tiled([(0, 2), (3, 5)])
    ([0, 2], [2, 5])
    """
    starts, stops, at = [], [], 0
    for start, stop in offsets:
        starts.append(min(start, at))
        at = max(at, stop)
        stops.append(at)
    return starts, stops


def _no_end(turn: Turn, context: Context, place: Place) -> Finding:
    ends = ", ".join(f'"{context.tokenizer.id_to_piece(token)}"' for token in context.tokenizer.eos_ids) or "none"
    rule = f"has no end token that is learned, so the model would not learn to stop. The model's end tokens: {ends}."
    hint = "Use a chat template that closes the assistant's turn with one of them."
    return place.finding("E-DATA-023", rule, hint=hint, at=turn.message)
