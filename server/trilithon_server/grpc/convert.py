"""
Protobuf requests to what the service takes, and its answers to protobuf.

A request's parameters are read along the proto paths of the table in `sampling_rules.py`, into the same mapping of JSON
names that an HTTP body becomes; from there on the two protocols are one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from trilithon.api.v1 import common_pb2, generation_pb2, models_pb2
from trilithon_server.grpc.gate import current_call
from trilithon_server.prompts import Conversation, Prompt
from trilithon_server.sampling_rules import RULES, TASK_RULES
from trilithon_server.service import Service
from trilithon_server.validation import Violations

M = TypeVar("M", bound=Message)

META_RULES = tuple(rule for rule in RULES if rule.proto.startswith("meta."))
_PLAIN_RULES = tuple(
    rule
    for rule in RULES
    if rule.name not in ("constraint", "skip_special_tokens") and not rule.proto.startswith(("prompt.", "beam."))
)
_EARLY = {
    common_pb2.Beam.EARLY_HEURISTIC: "heuristic",
    common_pb2.Beam.EARLY_FIRST: "first",
    common_pb2.Beam.EARLY_NEVER: "never",
}


def generate_values(request: generation_pb2.GenerateRequest) -> dict[str, Any]:
    """The parameters of a request by JSON name; what is unset is left out."""
    values: dict[str, Any] = {}
    for rule in _PLAIN_RULES:
        value = _at(request, rule.proto)
        if value is not None:
            values[rule.name] = value
    if request.output.keep_special_tokens:
        values["skip_special_tokens"] = False
    if request.sampling.factual.no_reset:
        ids = values.get("top_p_reset_token_ids")
        # Both are set: keep what makes the validator refuse it rather than choosing one.
        values["top_p_reset_token_ids"] = "no_reset and reset_token_ids" if ids else []
    if request.HasField("constraint"):
        values["constraint"] = constraint_value(request.constraint)
    values |= prompt_values(request.prompt)
    if request.beam.width:
        values["beam_width"] = request.beam.width
    if request.beam.HasField("length_penalty"):
        values["length_penalty"] = request.beam.length_penalty
    if request.beam.early:
        values["early_stopping"] = _EARLY.get(request.beam.early, request.beam.early)
    if request.no_speculation:
        values["speculation"] = False
    return values


def task_values(request: Message) -> dict[str, Any]:
    """
    The parameters of a call that writes its prompt itself, by JSON name: of `meta`, `sampling` and `stopping`, where
    its message has them.
    """
    groups = request.DESCRIPTOR.fields_by_name
    values = {rule.name: _at(request, rule.proto) for rule in TASK_RULES if rule.proto.partition(".")[0] in groups}
    return {name: value for name, value in values.items() if value is not None}


def meta_values(meta: common_pb2.RequestMeta) -> dict[str, Any]:
    """The parameters that stand in `RequestMeta`, for calls that generate nothing."""
    values = {rule.name: _at_field(meta, rule.proto.removeprefix("meta.")) for rule in META_RULES}
    return {name: value for name, value in values.items() if value is not None}


async def model_name(service: Service, meta: common_pb2.RequestMeta) -> str:
    """
    The model that a request means.

    Raises:
        NotFound: `adapter_not_found`, there is none of that name on the model that it names.
    """
    return await service.names.on(meta.model, meta.adapter, current_call()) if meta.adapter else meta.model


def prompt_values(prompt: common_pb2.Prompt) -> dict[str, Any]:
    """The parameters that stand in `Prompt`."""
    values: dict[str, Any] = {}
    if prompt.HasField("add_bos"):
        values["add_bos"] = prompt.add_bos
    if prompt.truncate_tokens:
        values["truncate_prompt_tokens"] = prompt.truncate_tokens
    return values


def prompt_of(prompt: common_pb2.Prompt, found: Violations, *, field: str = "prompt") -> tuple[Prompt, str]:
    """A prompt and the name that its field has in messages."""
    kind = prompt.WhichOneof("kind")
    if kind == "tokens":
        return list(prompt.tokens.ids), field
    if kind == "chat":
        return conversation(prompt.chat, found), "messages"
    if kind is None:
        found.add(field, "must set one of text, tokens, chat", code="missing_parameter")
    return prompt.text, field


def conversation(chat: common_pb2.Chat, found: Violations) -> Conversation:
    """A conversation as templates read it."""
    messages = []
    for i, message in enumerate(chat.messages):
        item: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.name:
            item["name"] = message.name
        if message.tool_call_id:
            item["tool_call_id"] = message.tool_call_id
        if message.tool_calls_json:
            item["tool_calls"] = _json(message.tool_calls_json, list, f"messages[{i}].tool_calls_json", found)
        messages.append(item)
    tools = [_json(text, dict, f"tools_json[{i}]", found) for i, text in enumerate(chat.tools_json)]
    return Conversation(
        messages=messages,
        tools=tools or None,
        opening=chat.add_generation_prompt if chat.HasField("add_generation_prompt") else None,
        continue_final=chat.continue_final_message,
    )


def _json(text: str, kind: type[Any], field: str, found: Violations) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        found.add(field, f"must be a JSON {'array' if kind is list else 'object'}", given=text)
        return kind()
    return value


def constraint_value(constraint: common_pb2.Constraint) -> dict[str, Any]:
    """A constraint in the form of the JSON API."""
    kind = constraint.WhichOneof("kind")
    out: dict[str, Any] = {"whitespace": constraint.whitespace} if constraint.whitespace else {}
    if kind == "choice":
        out[kind] = list(constraint.choice.values)
    elif kind is not None:
        out[kind] = getattr(constraint, kind)
    return out


def _at(message: Message, path: str) -> Any:
    """What a path leads to, or None where a message on the way or the field itself is unset."""
    *groups, name = path.split(".")
    for group in groups:
        if not message.HasField(group):
            return None
        message = getattr(message, group)
    return _at_field(message, name)


def _at_field(message: Message, name: str) -> Any:
    value = getattr(message, name)
    if isinstance(value, Mapping):
        return dict(value) or None
    if not isinstance(value, str | bytes | bool | int | float):
        return list(value) or None
    if message.DESCRIPTOR.fields_by_name[name].has_presence:
        return value if message.HasField(name) else None
    return value or None


def choice(news: Mapping[str, Any]) -> dict[str, Any]:
    """An answer's fields, with the enum's own name for the finish reason."""
    reason = news["finish_reason"]
    return {**news, "finish_reason": f"FINISH_REASON_{reason.upper()}" if reason is not None else None}


def choices(many: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers' fields."""
    return [choice(item) for item in many]


def model(description: Mapping[str, Any]) -> models_pb2.Model:
    """A served model."""
    fields = dict(description)
    fields["kind"] = f"KIND_{fields['kind'].upper()}"
    fields["state"] = f"STATE_{fields['state'].upper()}"
    return models_pb2.Model(**fields)
