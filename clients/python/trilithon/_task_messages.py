"""Messages of the task requests - dialogue, stories, open and synthetic questions - and of their answers and events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import Message

from trilithon import _retrieval_messages
from trilithon._message_fields import checked, choice, one_body, put, with_meta
from trilithon._transport import Fields
from trilithon.api.v1 import dialogue_pb2, openqa_pb2, retrieval_pb2, story_pb2, synth_qa_pb2

TaskMessage = TypeVar("TaskMessage", bound=Message)

SPEAKERS = {"target": dialogue_pb2.Turn.SPEAKER_TARGET, "other": dialogue_pb2.Turn.SPEAKER_OTHER}
FILTERS = {
    "pair_any": synth_qa_pb2.SynthQARequest.FILTER_PAIR_ANY,
    "single": synth_qa_pb2.SynthQARequest.FILTER_SINGLE,
    "none": synth_qa_pb2.SynthQARequest.FILTER_NONE,
}
SCORERS = {
    "tfidf": dialogue_pb2.KnowledgeOptions.SCORER_TFIDF,
    "dense": dialogue_pb2.KnowledgeOptions.SCORER_DENSE,
    "bm25": dialogue_pb2.KnowledgeOptions.SCORER_BM25,
    "hybrid": dialogue_pb2.KnowledgeOptions.SCORER_HYBRID,
}
MODES = {
    name: story_pb2.SentenceControl.Mode.Value(f"MODE_{name.upper()}") for name in ("replace", "append", "antonym")
}


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
    one_body("documents", plain.get("documents") or ())
    request = with_meta(openqa_pb2.AnswerRequest)(_retrieval_messages.numbered(plain))
    for name, value in (fields.get("sampling") or {}).items():
        checked(name, value, partial(put, request, name))
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
            checked(name, value, partial(put, request, name))
    return request


def _conversation(turns: Any) -> dialogue_pb2.Conversation:
    return dialogue_pb2.Conversation(
        turns=[
            dialogue_pb2.Turn(speaker=choice("speaker", turn["speaker"], SPEAKERS), text=turn["text"]) for turn in turns
        ]
    )


def _knowledge(given: Mapping[str, Any]) -> dialogue_pb2.KnowledgeOptions:
    rest = {name: value for name, value in given.items() if name != "scorer" and value is not None}
    one_body("knowledge.documents", rest.get("documents", ()))
    scorer = choice("scorer", given.get("scorer") or None, SCORERS)
    return dialogue_pb2.KnowledgeOptions(scorer=scorer, **rest)


def _put_knowledge(fields: Fields) -> dialogue_pb2.PutKnowledgeRequest:
    one_body("documents", fields["documents"])
    return dialogue_pb2.PutKnowledgeRequest(**fields)


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
    return story_pb2.SentenceControl(mode=choice("mode", given.get("mode"), MODES), **rest)


def _synth_qa(fields: Fields) -> synth_qa_pb2.SynthQARequest:
    names = (
        "answers_per_passage", "questions_per_answer", "unanswerable_per_answer", "answer_model", "reader_model",
    )  # fmt: skip
    return task_request(
        synth_qa_pb2.SynthQARequest,
        fields,
        passages=[synth_qa_pb2.SynthQAPassage(**passage) for passage in fields["passages"]],
        filter=choice("filter", fields.get("filter"), FILTERS),
        **{name: fields[name] for name in names if name in fields},
    )


REQUESTS: Mapping[str, Callable[[Fields], Message]] = {
    "respond": respond_request,
    "put_actor": _put_actor,
    "get_actor": lambda fields: dialogue_pb2.GetActorRequest(**fields),
    "delete_actor": lambda fields: dialogue_pb2.DeleteActorRequest(**fields),
    "put_knowledge": _put_knowledge,
    "get_knowledge": lambda fields: dialogue_pb2.GetKnowledgeRequest(**fields),
    "delete_knowledge": lambda fields: dialogue_pb2.DeleteKnowledgeRequest(**fields),
    "tell_story": story_request,
    "rewrite_story": rewrite_request,
    "get_story": lambda fields: story_pb2.GetStoryRequest(**fields),
    "delete_story": lambda fields: story_pb2.DeleteStoryRequest(**fields),
    "encode": lambda fields: with_meta(retrieval_pb2.EncodeRequest)(_retrieval_messages.numbered(fields)),
    "search": lambda fields: with_meta(retrieval_pb2.SearchRequest)(_retrieval_messages.numbered(fields)),
    "answer_open": open_request,
    "synth_qa": _synth_qa,
}
"""Operation name -> its request message from field values."""

RESPONSES: Mapping[str, type[Message]] = {
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
    "synth_qa": synth_qa_pb2.SynthQAFinished,
}
"""Operation name -> its answer's message."""

EVENTS: Mapping[str, type[Message]] = {
    "respond": dialogue_pb2.RespondEvent,
    "tell_story": story_pb2.StoryEvent,
    "rewrite_story": story_pb2.StoryEvent,
    "synth_qa": synth_qa_pb2.SynthQAEvent,
}
"""Operation name -> the message of its stream's events."""
