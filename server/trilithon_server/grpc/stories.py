"""StoryService of `trilithon.api.v1`, over the functions that HTTP calls too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from trilithon.api.v1 import story_pb2, story_pb2_grpc
from trilithon_server import stories, story_answers
from trilithon_server.grpc import convert
from trilithon_server.grpc.gate import current_call
from trilithon_server.service import Service
from trilithon_server.story_requests import Asked, Control
from trilithon_server.story_telling import Telling
from trilithon_server.validation import Violations

_MODES = {
    story_pb2.SentenceControl.MODE_UNSPECIFIED: "replace",
    story_pb2.SentenceControl.MODE_REPLACE: "replace",
    story_pb2.SentenceControl.MODE_APPEND: "append",
    story_pb2.SentenceControl.MODE_ANTONYM: "antonym",
}


class Stories(story_pb2_grpc.StoryServiceServicer):
    """StoryService"""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(self, request: story_pb2.StoryRequest, context: Any) -> AsyncIterator[story_pb2.StoryEvent]:
        """Tell a story from its first sentence."""
        asked = Asked(
            first_sentence=request.first_sentence,
            sentences=request.sentences,
            controls=[_control(item) for item in request.controls],
            kb=request.kb,
            knowledge_k=request.knowledge_k if request.HasField("knowledge_k") else None,
            keyword_model=request.keyword_model,
            ranker=request.ranker,
        )
        name = await convert.model_name(self._service, request.meta)
        telling = await stories.generate(self._service, current_call(), name, asked, convert.task_values(request))
        async for event in _told(telling):
            yield event

    async def Rewrite(self, request: story_pb2.RewriteRequest, context: Any) -> AsyncIterator[story_pb2.StoryEvent]:
        """Tell a story again from one sentence on."""
        found = Violations()
        if not request.HasField("control"):
            found.add("control", "must be set", code="missing_parameter")
            found.raise_if_any()
        name = await convert.model_name(self._service, request.meta)
        control, values = _control(request.control), convert.meta_values(request.meta)
        telling = await stories.rewrite(self._service, current_call(), name, request.story_id, control, values)
        async for event in _told(telling):
            yield event

    async def GetStory(self, request: story_pb2.GetStoryRequest, context: Any) -> story_pb2.Story:
        """A story as far as it is written."""
        fields = story_answers.story(stories.get_story(self._service, current_call(), request.story_id))
        return story_pb2.Story(**_with_sentences(fields))

    async def DeleteStory(self, request: story_pb2.DeleteStoryRequest, context: Any) -> story_pb2.DeleteStoryResponse:
        """Forget a story."""
        stories.delete_story(self._service, current_call(), request.story_id)
        return story_pb2.DeleteStoryResponse()


async def _told(telling: Telling) -> AsyncIterator[story_pb2.StoryEvent]:
    async with telling:
        yield story_pb2.StoryEvent(started=story_pb2.StoryStarted(**story_answers.started(telling)))
        async with aclosing(telling.sentences()) as sentences:
            async for told, reused in sentences:
                fields = convert.choice(story_answers.sentence(told, reused=reused))
                yield story_pb2.StoryEvent(sentence=story_pb2.Sentence(**fields))
        fields = convert.choice(_with_sentences(story_answers.finished(telling)))
        yield story_pb2.StoryEvent(finished=story_pb2.StoryFinished(**fields))


def _with_sentences(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "sentences": convert.choices(fields["sentences"])}


def _control(control: story_pb2.SentenceControl) -> Control:
    """An unknown mode keeps its number, for the message that refuses it."""
    mode = _MODES.get(control.mode, str(control.mode))
    return Control(index=control.index, keywords=list(control.keywords), mode=mode)
