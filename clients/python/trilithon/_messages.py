"""Between field values by JSON name and protobuf messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from google.protobuf.message import Message

from trilithon import _job_messages, _retrieval_messages, _task_messages
from trilithon._message_fields import checked, choice, meta, put, with_meta
from trilithon._transport import Fields
from trilithon.api.v1 import (
    common_pb2,
    embed_pb2,
    extract_pb2,
    generation_pb2,
    models_pb2,
    tokenize_pb2,
)
from trilithon.errors import InvalidArgument

_POOLING = {"mean": embed_pb2.POOLING_MEAN, "last": embed_pb2.POOLING_LAST, "first": embed_pb2.POOLING_FIRST}
_CHAT = ("tools", "add_generation_prompt", "continue_final_message")


def generate_request(fields: Fields) -> generation_pb2.GenerateRequest:
    """
    The grouped message of a flat generation request.

    >>> generate_request({"prompt": "Once", "max_tokens": 4}).stopping.max_tokens
    4
    """
    request = generation_pb2.GenerateRequest()
    for name, value in fields.items():
        if name == "prompt":
            checked(name, value, lambda given: request.prompt.MergeFrom(prompt(given)))
        elif name == "messages":
            checked(name, value, lambda given: request.prompt.chat.MergeFrom(chat(given, fields)))
        elif name not in _CHAT:
            checked(name, value, partial(put, request, name))
    return request


def prompt(given: Any) -> common_pb2.Prompt:
    """A text, or token ids."""
    if isinstance(given, str):
        return common_pb2.Prompt(text=given)
    return common_pb2.Prompt(tokens=common_pb2.TokenIds(ids=given))


def chat(messages: Any, options: Fields) -> common_pb2.Chat:
    """A conversation; `options` may hold tools and the two switches."""
    return common_pb2.Chat(
        messages=[
            common_pb2.ChatMessage(
                role=message["role"],
                content=message.get("content") or "",
                name=message.get("name") or "",
                tool_calls_json=json.dumps(message["tool_calls"]) if message.get("tool_calls") else "",
                tool_call_id=message.get("tool_call_id") or "",
            )
            for message in messages
        ],
        tools_json=[json.dumps(tool) for tool in options.get("tools") or ()],
        add_generation_prompt=options.get("add_generation_prompt"),
        continue_final_message=options.get("continue_final_message") or False,
    )


def score_request(fields: Fields) -> generation_pb2.ScoreRequest:
    """Contexts and their continuations."""
    request = generation_pb2.ScoreRequest(meta=meta(fields), top=fields.get("top") or 0)
    for item in fields["items"]:
        request.items.append(
            generation_pb2.ScoreItem(
                context=prompt(item["context"]) if item.get("context") is not None else None,
                continuations=item.get("continuations") or (),
                continuation_tokens=[common_pb2.TokenIds(ids=ids) for ids in item.get("continuation_tokens") or ()],
            )
        )
    return request


def embed_request(fields: Fields) -> embed_pb2.EmbedRequest:
    """Inputs to embed."""
    return embed_pb2.EmbedRequest(
        meta=meta(fields),
        inputs=[prompt(given) for given in fields["inputs"]],
        pooling=choice("pooling", fields.get("pooling"), _POOLING),
        normalize=fields.get("normalize"),
        dimensions=fields.get("dimensions") or 0,
    )


def detokenize_request(fields: Fields) -> tokenize_pb2.DetokenizeRequest:
    """Lists of token ids."""
    return tokenize_pb2.DetokenizeRequest(
        model=fields.get("model", ""),
        tokens=[common_pb2.TokenIds(ids=ids) for ids in fields["tokens"]],
        keep_special_tokens=fields.get("keep_special_tokens", False),
    )


def render_request(fields: Fields) -> tokenize_pb2.RenderChatRequest:
    """A conversation to render."""
    return tokenize_pb2.RenderChatRequest(model=fields.get("model", ""), chat=chat(fields["messages"], fields))


def relations_request(fields: Fields) -> extract_pb2.RelationsRequest:
    """Pairs, or entities, of a text."""
    return extract_pb2.RelationsRequest(
        meta=meta(fields),
        text=fields["text"],
        pairs=[
            extract_pb2.EntityPair(a=extract_pb2.Entity(**pair["a"]), b=extract_pb2.Entity(**pair["b"]))
            for pair in fields.get("pairs") or ()
        ],
        entities=[extract_pb2.Entity(**entity) for entity in fields.get("entities") or ()],
        tagger=fields.get("tagger") or "",
    )


REQUESTS: Mapping[str, Callable[[Fields], Message]] = {
    "generate": generate_request,
    "score": score_request,
    "abort": lambda fields: generation_pb2.AbortRequest(**fields),
    "embed": embed_request,
    "tokenize": lambda fields: tokenize_pb2.TokenizeRequest(**fields),
    "detokenize": detokenize_request,
    "render": render_request,
    "annotate": with_meta(extract_pb2.AnnotateRequest),
    "relations": relations_request,
    "answer": with_meta(extract_pb2.SpanAnswerRequest),
    "classify": with_meta(extract_pb2.ClassifyRequest),
    **_task_messages.REQUESTS,
    **_retrieval_messages.REQUESTS,
    "list_models": lambda fields: models_pb2.ListModelsRequest(**fields),
    "get_model": lambda fields: models_pb2.GetModelRequest(**fields),
    "load_adapter": lambda fields: models_pb2.LoadAdapterRequest(**fields),
    "unload_adapter": lambda fields: models_pb2.UnloadAdapterRequest(**fields),
    "set_alias": lambda fields: models_pb2.SetAliasRequest(**fields),
    "delete_alias": lambda fields: models_pb2.DeleteAliasRequest(**fields),
    **_job_messages.REQUESTS,
}
"""Operation name -> its request message from field values."""

RESPONSES: Mapping[str, type[Message]] = {
    "generate": generation_pb2.GenerateResponse,
    "score": generation_pb2.ScoreResponse,
    "abort": generation_pb2.AbortResponse,
    "embed": embed_pb2.EmbedResponse,
    "tokenize": tokenize_pb2.TokenizeResponse,
    "detokenize": tokenize_pb2.DetokenizeResponse,
    "render": tokenize_pb2.RenderChatResponse,
    "annotate": extract_pb2.AnnotateResponse,
    "relations": extract_pb2.RelationsResponse,
    "answer": extract_pb2.SpanAnswerResponse,
    "classify": extract_pb2.ClassifyResponse,
    **_task_messages.RESPONSES,
    **_retrieval_messages.RESPONSES,
    "list_models": models_pb2.ListModelsResponse,
    "get_model": models_pb2.Model,
    "load_adapter": models_pb2.Model,
    "unload_adapter": models_pb2.UnloadAdapterResponse,
    "set_alias": models_pb2.Model,
    "delete_alias": models_pb2.DeleteAliasResponse,
    **_job_messages.RESPONSES,
}
"""Operation name -> its answer's message."""

EVENTS: Mapping[str, type[Message]] = {
    "generate": generation_pb2.GenerateEvent,
    **_task_messages.EVENTS,
}
"""Operation name -> the message of its stream's events, where that is not its answer's."""


def request_message(operation: str, fields: Fields) -> Message:
    """The request of an operation. Raises InvalidArgument when a value does not fit into its field."""
    try:
        return REQUESTS[operation](fields)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InvalidArgument(f"The request does not fit its message: {error}.", code="invalid_value") from None


def message_fields(message: Message) -> dict[str, Any]:
    """
    A message as plain JSON-shaped values: what is not set is left out, enums are short names in small letters.

    >>> message_fields(common_pb2.Usage(prompt_tokens=3))
    {'prompt_tokens': 3}
    """
    return {field.name: _plain(field, value) for field, value in message.ListFields()}


def _plain(field: Any, value: Any) -> Any:
    if field.enum_type is not None:
        return _enum_name(field.enum_type, value)
    if field.message_type is not None:
        if field.message_type.GetOptions().map_entry:
            return dict(value)
        if isinstance(value, Message):
            return message_fields(value)
        return [message_fields(item) for item in value]
    return value if isinstance(value, int | float | str | bytes) else list(value)


def _enum_name(enum: Any, number: int) -> str:
    """FINISH_REASON_MAX_TOKENS of FinishReason is max_tokens; a number that this version does not know stays one."""
    known = enum.values_by_number.get(number)
    if known is None:
        return str(number)
    prefix = "".join(f"_{letter}" if letter.isupper() else letter for letter in enum.name).lstrip("_").upper()
    return str(known.name).removeprefix(f"{prefix}_").lower()
