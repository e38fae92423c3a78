"""Between field values by JSON name and protobuf messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import Message

from trilithon import _job_messages, _retrieval_messages
from trilithon._parameters import PROTO_FIELDS
from trilithon._transport import Fields
from trilithon.api.v1 import (
    common_pb2,
    dialogue_pb2,
    embed_pb2,
    extract_pb2,
    generation_pb2,
    models_pb2,
    openqa_pb2,
    retrieval_pb2,
    story_pb2,
    synth_qa_pb2,
    tokenize_pb2,
)
from trilithon.errors import InvalidArgument, Violation

TaskMessage = TypeVar("TaskMessage", bound=Message)

_EARLY = {
    "heuristic": common_pb2.Beam.EARLY_HEURISTIC,
    "first": common_pb2.Beam.EARLY_FIRST,
    "never": common_pb2.Beam.EARLY_NEVER,
}
_POOLING = {"mean": embed_pb2.POOLING_MEAN, "last": embed_pb2.POOLING_LAST, "first": embed_pb2.POOLING_FIRST}
_SPEAKERS = {"target": dialogue_pb2.Turn.SPEAKER_TARGET, "other": dialogue_pb2.Turn.SPEAKER_OTHER}
_FILTERS = {
    "pair_any": synth_qa_pb2.SynthQARequest.FILTER_PAIR_ANY,
    "single": synth_qa_pb2.SynthQARequest.FILTER_SINGLE,
    "none": synth_qa_pb2.SynthQARequest.FILTER_NONE,
}
_SCORERS = {
    "tfidf": dialogue_pb2.KnowledgeOptions.SCORER_TFIDF,
    "dense": dialogue_pb2.KnowledgeOptions.SCORER_DENSE,
    "bm25": dialogue_pb2.KnowledgeOptions.SCORER_BM25,
    "hybrid": dialogue_pb2.KnowledgeOptions.SCORER_HYBRID,
}
_MODES = {
    name: story_pb2.SentenceControl.Mode.Value(f"MODE_{name.upper()}") for name in ("replace", "append", "antonym")
}
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
            _checked(name, value, lambda given: request.prompt.MergeFrom(prompt(given)))
        elif name == "messages":
            _checked(name, value, lambda given: request.prompt.chat.MergeFrom(chat(given, fields)))
        elif name not in _CHAT:
            _checked(name, value, partial(_set, request, name))
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
    request = generation_pb2.ScoreRequest(meta=_meta(fields), top=fields.get("top") or 0)
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
        meta=_meta(fields),
        inputs=[prompt(given) for given in fields["inputs"]],
        pooling=_choice("pooling", fields.get("pooling"), _POOLING),
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
        meta=_meta(fields),
        text=fields["text"],
        pairs=[
            extract_pb2.EntityPair(a=extract_pb2.Entity(**pair["a"]), b=extract_pb2.Entity(**pair["b"]))
            for pair in fields.get("pairs") or ()
        ],
        entities=[extract_pb2.Entity(**entity) for entity in fields.get("entities") or ()],
        tagger=fields.get("tagger") or "",
    )


def respond_request(fields: Fields) -> dialogue_pb2.RespondRequest:
    """A conversation, who answers, and what may be said."""
    known = fields.get("knowledge")
    return task_request(
        dialogue_pb2.RespondRequest,
        fields,
        conversation=_conversation(fields["conversation"]),
        references=[_conversation(turns) for turns in fields.get("references") or ()],
        actor_id=fields.get("actor_id") or "",
        knowledge=None if known is None else _knowledge(known),
    )


def open_request(fields: Fields) -> Message:
    """A question, and where its answer may stand; `sampling` has the flat names of its parameters."""
    plain = {name: value for name, value in fields.items() if name != "sampling"}
    request = _with_meta(openqa_pb2.AnswerRequest)(_retrieval_messages.numbered(plain))
    for name, value in (fields.get("sampling") or {}).items():
        _checked(name, value, partial(_set, request, name))
    return request


def task_request(kind: Callable[..., TaskMessage], fields: Fields, **own: Any) -> TaskMessage:
    """
    The message of a task: `own` are its fields as they are, beside `meta`, `sampling` and `stopping` from flat names.

    Raises:
        KeyError: a parameter that no task takes.
    """
    request = kind(**own)
    for name, value in fields.items():
        if name not in own:
            _checked(name, value, partial(_set, request, name))
    return request


def _conversation(turns: Any) -> dialogue_pb2.Conversation:
    return dialogue_pb2.Conversation(
        turns=[
            dialogue_pb2.Turn(speaker=_choice("speaker", turn["speaker"], _SPEAKERS), text=turn["text"])
            for turn in turns
        ]
    )


def _knowledge(given: Mapping[str, Any]) -> dialogue_pb2.KnowledgeOptions:
    rest = {name: value for name, value in given.items() if name != "scorer" and value is not None}
    scorer = _choice("scorer", given.get("scorer") or None, _SCORERS)
    return dialogue_pb2.KnowledgeOptions(scorer=scorer, **rest)


def _put_actor(fields: Fields) -> dialogue_pb2.PutActorRequest:
    return dialogue_pb2.PutActorRequest(
        actor_id=fields["actor_id"], conversations=[_conversation(turns) for turns in fields["conversations"]]
    )


def story_request(fields: Fields) -> story_pb2.StoryRequest:
    """What a story takes beside how to draw."""
    own = {name: value for name, value in fields.items() if name in story_pb2.StoryRequest.DESCRIPTOR.fields_by_name}
    own["controls"] = [_control(control) for control in fields.get("controls", ())]
    return task_request(story_pb2.StoryRequest, fields, **own)


def rewrite_request(fields: Fields) -> story_pb2.RewriteRequest:
    """A story and one sentence's control."""
    control = _control(fields["control"])
    return task_request(story_pb2.RewriteRequest, fields, story_id=fields["story_id"], control=control)


def _control(given: Mapping[str, Any]) -> story_pb2.SentenceControl:
    rest = {name: value for name, value in given.items() if name != "mode" and value is not None}
    return story_pb2.SentenceControl(mode=_choice("mode", given.get("mode"), _MODES), **rest)


def _synth_qa(fields: Fields) -> synth_qa_pb2.SynthQARequest:
    names = (
        "answers_per_passage", "questions_per_answer", "unanswerable_per_answer", "answer_model", "reader_model",
    )  # fmt: skip
    return task_request(
        synth_qa_pb2.SynthQARequest,
        fields,
        passages=[synth_qa_pb2.SynthQAPassage(**passage) for passage in fields["passages"]],
        filter=_choice("filter", fields.get("filter"), _FILTERS),
        **{name: fields[name] for name in names if name in fields},
    )


def _with_meta(kind: Callable[..., Message]) -> Callable[[Fields], Message]:
    """A message whose fields are the request's own, but for those of the call."""

    def build(fields: Fields) -> Message:
        own = {name: value for name, value in fields.items() if name not in ("model", "time_limit_ms")}
        return kind(meta=_meta(fields), **own)

    return build


REQUESTS: Mapping[str, Callable[[Fields], Message]] = {
    "generate": generate_request,
    "score": score_request,
    "abort": lambda fields: generation_pb2.AbortRequest(**fields),
    "embed": embed_request,
    "tokenize": lambda fields: tokenize_pb2.TokenizeRequest(**fields),
    "detokenize": detokenize_request,
    "render": render_request,
    "annotate": _with_meta(extract_pb2.AnnotateRequest),
    "relations": relations_request,
    "answer": _with_meta(extract_pb2.SpanAnswerRequest),
    "classify": _with_meta(extract_pb2.ClassifyRequest),
    "respond": respond_request,
    "put_actor": _put_actor,
    "get_actor": lambda fields: dialogue_pb2.GetActorRequest(**fields),
    "delete_actor": lambda fields: dialogue_pb2.DeleteActorRequest(**fields),
    "put_knowledge": lambda fields: dialogue_pb2.PutKnowledgeRequest(**fields),
    "get_knowledge": lambda fields: dialogue_pb2.GetKnowledgeRequest(**fields),
    "delete_knowledge": lambda fields: dialogue_pb2.DeleteKnowledgeRequest(**fields),
    "tell_story": story_request,
    "rewrite_story": rewrite_request,
    "get_story": lambda fields: story_pb2.GetStoryRequest(**fields),
    "delete_story": lambda fields: story_pb2.DeleteStoryRequest(**fields),
    "encode": lambda fields: _with_meta(retrieval_pb2.EncodeRequest)(_retrieval_messages.numbered(fields)),
    "search": lambda fields: _with_meta(retrieval_pb2.SearchRequest)(_retrieval_messages.numbered(fields)),
    "answer_open": open_request,
    **_retrieval_messages.REQUESTS,
    "synth_qa": _synth_qa,
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
    "respond": dialogue_pb2.RespondResponse,
    "put_actor": dialogue_pb2.Actor,
    "get_actor": dialogue_pb2.Actor,
    "delete_actor": dialogue_pb2.DeleteActorResponse,
    "put_knowledge": dialogue_pb2.PutKnowledgeResponse,
    "get_knowledge": dialogue_pb2.PutKnowledgeResponse,
    "delete_knowledge": dialogue_pb2.DeleteKnowledgeResponse,
    "tell_story": story_pb2.Story,
    "rewrite_story": story_pb2.Story,
    "get_story": story_pb2.Story,
    "delete_story": story_pb2.DeleteStoryResponse,
    **_retrieval_messages.RESPONSES,
    "synth_qa": synth_qa_pb2.SynthQAFinished,
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
    "respond": dialogue_pb2.RespondEvent,
    "tell_story": story_pb2.StoryEvent,
    "rewrite_story": story_pb2.StoryEvent,
    "synth_qa": synth_qa_pb2.SynthQAEvent,
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


def _meta(fields: Fields) -> common_pb2.RequestMeta:
    return common_pb2.RequestMeta(model=fields.get("model", ""), time_limit_ms=fields.get("time_limit_ms"))


def _set(request: Any, name: str, value: Any) -> None:
    *groups, leaf = PROTO_FIELDS[name].split(".")
    message: Any = request
    for group in groups:
        message = getattr(message, group)
    if name in ("skip_special_tokens", "speculation"):
        setattr(message, leaf, not _boolean(value))
    elif name == "constraint":
        request.constraint.MergeFrom(_constraint(value))
    elif name == "early_stopping":
        message.early = _choice(name, value, _EARLY)
    elif name == "top_p_reset_token_ids" and not value:
        message.no_reset = True
    elif name == "top_k" and value == -1:
        message.top_k = 0  # HTTP's other spelling of off
    elif name == "stop" and isinstance(value, str):
        message.stop.append(value)
    elif isinstance(value, Mapping):
        container = getattr(message, leaf)
        for key, item in value.items():
            container[int(key) if name == "logit_bias" else key] = item
    elif isinstance(value, str | int | float):
        setattr(message, leaf, value)
    else:
        getattr(message, leaf).extend(value)


def _constraint(given: Mapping[str, Any]) -> common_pb2.Constraint:
    constraint = common_pb2.Constraint()
    kinds = [name for name in given if name != "whitespace"]
    if len(kinds) != 1:
        raise ValueError("must set exactly one of json_schema, json_object, regex, grammar, choice")
    for name, value in given.items():
        if name == "json_schema" and not isinstance(value, str):
            constraint.json_schema = json.dumps(value)
        elif name == "choice":
            constraint.choice.values.extend(value)
        else:
            setattr(constraint, name, value)
    return constraint


def _choice(name: str, given: Any, known: Mapping[str, Any]) -> Any:
    if given is None:
        return 0
    if given not in known:
        raise InvalidArgument(f"`{name}` must be one of {', '.join(known)}. Given: {given!r}.", code="invalid_value")
    return known[given]


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("must be true or false")
    return value


def _checked(name: str, value: Any, put: Callable[[Any], None]) -> None:
    try:
        put(value)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        message = f"`{name}` does not fit its field: {error}. Given: {value!r:.64}."
        violation = Violation(field=name, code="invalid_value", message=message, given=repr(value)[:64])
        raise InvalidArgument(message, code="invalid_value", details=[violation]) from None
