"""
What a turn may say: sentences of documents that go with the last turns or, where a model is prompted by examples, what
it writes itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trilithon.errors import FailedPrecondition
from trilithon_server.dialogue_requests import Asked
from trilithon_server.dialogue_store import sentences_of
from trilithon_server.embedding import embed
from trilithon_server.generation import NO_TOKENS, Usage
from trilithon_server.knowledge.local import Choice, Chosen, LocalKnowledge, read_documents
from trilithon_server.prompts import Sequenced
from trilithon_server.sampling_rules import META_NAMES
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.tasks.msdp_format import MsdpFormat
from trilithon_server.tasks.writing import one_line

DEFAULT_TOP_K = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """
    What a turn may stand on.

    Attributes:
        chosen: sentences of documents. written: by the model, where nothing was chosen; empty: nothing.
        usage: of writing it.
    """

    chosen: Sequence[Chosen] = ()
    written: str = ""
    usage: Usage = NO_TOKENS

    @property
    def texts(self) -> list[str]:
        """One a sentence."""
        return [item.sentence.text for item in self.chosen] or [self.written] * bool(self.written)


async def write(
    service: Service, call: Call, model: ServedModel, format: MsdpFormat, asked: Asked, values: Mapping[str, Any]
) -> Known:
    """
    A line of what is known, greedily, by the first step of the prompting.

    Args:
        values: parameters by JSON name, of which those of every call count.
    Raises:
        TrilithonError: refused, or the engine could not finish; NoRoomError: for the last turn.
    """
    most = min(format.file.knowledge_tokens, room_of(model) // 2)
    ids = await asyncio.to_thread(
        format.ask, asked.topic, asked.conversation, model.tokenizer, room=room_of(model) - most
    )
    how = {name: value for name, value in values.items() if name in META_NAMES}
    generation = await service.generate(
        call,
        model.name,
        [Sequenced(ids=ids)],
        {**how, "temperature": 0.0, "max_tokens": most, "stop": ["\n"]},
        field="conversation",
    )
    async with generation:
        await generation.joined()
    return Known(written=one_line(generation.choices[0].take()[0]), usage=generation.usage)


def room_of(model: ServedModel) -> int:
    """Tokens that a prompt and its answer may have together."""
    hello = model.ready()
    return min(hello.max_context_tokens, hello.kv_capacity_tokens or hello.max_context_tokens)


async def choose(service: Service, call: Call, asked: Asked) -> list[Chosen]:
    """The sentences that go with the last turns."""
    grounds = asked.grounds
    if grounds is None:
        return []
    if grounds.kb_id:
        sentences = sentences_of(service, call, grounds.kb_id)
    else:
        sentences = list(await asyncio.to_thread(read_documents, grounds.documents, field="knowledge.documents"))
    if not sentences:
        return []
    scorer = grounds.scorer or "tfidf"
    choice = Choice(scorer=scorer, top_k=grounds.top_k or DEFAULT_TOP_K, min_score=grounds.min_score)  # type: ignore[arg-type]  # checked
    turns = [turn.text for turn in asked.conversation]
    if scorer in ("tfidf", "bm25"):
        return await asyncio.to_thread(lambda: LocalKnowledge(sentences).select(turns, choice))
    vectors = await _vectors(service, call, [*(s.text for s in sentences), *turns[-choice.turns :]])
    known, last = vectors[: len(sentences)], vectors[len(sentences) :]
    return await asyncio.to_thread(
        lambda: LocalKnowledge(sentences, vectors_NH=known).select(turns[-choice.turns :], choice, turn_vectors_MH=last)
    )


async def _vectors(service: Service, call: Call, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Vectors of a served encoder, in pieces of as many texts as one request may have."""
    encoder = service.first("embed")
    if not encoder:
        raise FailedPrecondition(
            "this scorer compares vectors, and no encoder is served.",
            code="unsupported_model",
            hint="Serve one beside the model, or ask for tfidf or bm25.",
        )
    found: list[Sequence[float]] = []
    most = service.limits.max_embedding_inputs
    for first in range(0, len(texts), most):
        _, rows, _ = await embed(service, call, encoder, texts[first : first + most], {"truncate_prompt_tokens": 256})
        found += [row.values for row in rows]
    return np.array(found, np.float32)
