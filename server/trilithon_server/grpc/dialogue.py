"""DialogueService of `trilithon.api.v1`, over the functions that HTTP calls too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from trilithon.api.v1 import dialogue_pb2, dialogue_pb2_grpc
from trilithon_server import dialogue, dialogue_answers, dialogue_store
from trilithon_server.dialogue import Reply
from trilithon_server.dialogue_requests import Asked, Grounds
from trilithon_server.grpc import convert
from trilithon_server.grpc.gate import current_call
from trilithon_server.knowledge.local import SCORERS, Document
from trilithon_server.service import Service
from trilithon_server.tasks.dialogue_format import Speaker, Turn
from trilithon_server.validation import Violations

_SPEAKERS: dict[int, Speaker] = {
    dialogue_pb2.Turn.SPEAKER_TARGET: "target",
    dialogue_pb2.Turn.SPEAKER_OTHER: "other",
}
_SCORERS = {
    dialogue_pb2.KnowledgeOptions.SCORER_UNSPECIFIED: "",
    dialogue_pb2.KnowledgeOptions.SCORER_TFIDF: "tfidf",
    dialogue_pb2.KnowledgeOptions.SCORER_DENSE: "dense",
    dialogue_pb2.KnowledgeOptions.SCORER_BM25: "bm25",
    dialogue_pb2.KnowledgeOptions.SCORER_HYBRID: "hybrid",
}


class Dialogues(dialogue_pb2_grpc.DialogueServiceServicer):
    """DialogueService"""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def _begin(self, request: dialogue_pb2.RespondRequest, context: Any, *, stream: bool) -> Reply:
        found = Violations()
        if not request.HasField("conversation"):
            found.add("conversation", "must be set", code="missing_parameter")
            found.raise_if_any()
        asked = Asked(
            conversation=_turns("conversation", request.conversation, found),
            references=[_turns(f"references[{i}]", item, found) for i, item in enumerate(request.references)],
            actor_id=request.actor_id,
            grounds=_grounds(request.knowledge, found) if request.HasField("knowledge") else None,
            topic=request.topic,
        )
        name = await convert.model_name(self._service, request.meta)
        values = convert.task_values(request)
        reply = await dialogue.respond(self._service, current_call(), name, asked, values, found=found, stream=stream)
        context.add_done_callback(lambda _: reply.generation.close("disconnect"))
        return reply

    async def Respond(self, request: dialogue_pb2.RespondRequest, context: Any) -> dialogue_pb2.RespondResponse:
        """The next turn, when all of it is written."""
        reply = await self._begin(request, context, stream=False)
        async with reply.generation:
            await reply.joined()
            return _response(reply, with_knowledge=_tells_knowledge(request))

    async def RespondStream(
        self, request: dialogue_pb2.RespondRequest, context: Any
    ) -> AsyncIterator[dialogue_pb2.RespondEvent]:
        """The next turn, as it is written."""
        reply, told = await self._begin(request, context, stream=True), _tells_knowledge(request)
        async with reply.generation:
            for item in dialogue_answers.used(reply) if told else ():
                yield dialogue_pb2.RespondEvent(knowledge=dialogue_pb2.KnowledgeUsed(**item))
            async for index, piece in reply.news():
                if index == 0:
                    yield dialogue_pb2.RespondEvent(delta=piece)
            yield dialogue_pb2.RespondEvent(finished=_response(reply, with_knowledge=told))

    async def PutActor(self, request: dialogue_pb2.PutActorRequest, context: Any) -> dialogue_pb2.Actor:
        """Keep an actor's reference conversations."""
        found = Violations()
        conversations = [_turns(f"conversations[{i}]", item, found) for i, item in enumerate(request.conversations)]
        found.raise_if_any()
        facts = await dialogue_store.put_actor(self._service, current_call(), request.actor_id, conversations)
        return dialogue_pb2.Actor(**dialogue_answers.actor(facts))

    async def GetActor(self, request: dialogue_pb2.GetActorRequest, context: Any) -> dialogue_pb2.Actor:
        """What is kept of an actor."""
        facts = await dialogue_store.get_actor(self._service, current_call(), request.actor_id)
        return dialogue_pb2.Actor(**dialogue_answers.actor(facts))

    async def DeleteActor(
        self, request: dialogue_pb2.DeleteActorRequest, context: Any
    ) -> dialogue_pb2.DeleteActorResponse:
        """Forget an actor."""
        await dialogue_store.delete_actor(self._service, current_call(), request.actor_id)
        return dialogue_pb2.DeleteActorResponse()

    async def PutKnowledge(
        self, request: dialogue_pb2.PutKnowledgeRequest, context: Any
    ) -> dialogue_pb2.PutKnowledgeResponse:
        """Keep documents."""
        documents = documents_of(request.documents)
        replace = request.replace if request.HasField("replace") else True
        facts = await dialogue_store.put_knowledge(
            self._service, current_call(), request.kb_id, documents, replace=replace
        )
        return dialogue_pb2.PutKnowledgeResponse(**dialogue_answers.knowledge(facts))

    async def GetKnowledge(
        self, request: dialogue_pb2.GetKnowledgeRequest, context: Any
    ) -> dialogue_pb2.PutKnowledgeResponse:
        """What is kept under a name."""
        facts = await dialogue_store.get_knowledge(self._service, current_call(), request.kb_id)
        return dialogue_pb2.PutKnowledgeResponse(**dialogue_answers.knowledge(facts))

    async def DeleteKnowledge(
        self, request: dialogue_pb2.DeleteKnowledgeRequest, context: Any
    ) -> dialogue_pb2.DeleteKnowledgeResponse:
        """Forget a knowledge base."""
        await dialogue_store.delete_knowledge(self._service, current_call(), request.kb_id)
        return dialogue_pb2.DeleteKnowledgeResponse()


def _tells_knowledge(request: dialogue_pb2.RespondRequest) -> bool:
    return request.knowledge.return_knowledge if request.knowledge.HasField("return_knowledge") else True


def _response(reply: Reply, *, with_knowledge: bool) -> dialogue_pb2.RespondResponse:
    fields = dialogue_answers.responded(reply, with_knowledge=with_knowledge)
    fields["candidates"] = convert.choices(fields["candidates"])
    return dialogue_pb2.RespondResponse(**fields)


def _turns(name: str, conversation: dialogue_pb2.Conversation, found: Violations) -> list[Turn]:
    turns = []
    for i, turn in enumerate(conversation.turns):
        speaker = _SPEAKERS.get(turn.speaker)
        if speaker is None:
            found.add(f"{name}[{i}].speaker", "must be target or other", given=turn.speaker)
        turns.append(Turn(speaker or "other", turn.text))
    return turns


def documents_of(documents: Sequence[dialogue_pb2.Document]) -> list[Document]:
    """Documents as the service takes them."""
    return [Document(id=d.id, text=d.text, html=d.html, title=d.title, url=d.url) for d in documents]


def _grounds(options: dialogue_pb2.KnowledgeOptions, found: Violations) -> Grounds:
    if options.scorer not in _SCORERS:
        found.add("knowledge.scorer", f"must be one of {', '.join(SCORERS)}", given=options.scorer)
    return Grounds(
        documents=documents_of(options.documents),
        kb_id=options.kb_id,
        scorer=_SCORERS.get(options.scorer, ""),
        top_k=options.top_k,
        min_score=options.min_score if options.HasField("min_score") else None,
    )
