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

from trilithon_server.dialogue_requests import Asked
from trilithon_server.dialogue_store import sentences_of
from trilithon_server.embedding import embed
from trilithon_server.encoders import both_of, default_encoder
from trilithon_server.generation import NO_TOKENS, Usage
from trilithon_server.knowledge.local import Choice, Chosen, LocalKnowledge, Vectors, read_documents
from trilithon_server.prompts import Sequenced
from trilithon_server.sampling_rules import META_NAMES
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.task_run import off_loop
from trilithon_server.tasks.msdp_format import MsdpFormat
from trilithon_server.tasks.writing import literal, one_line

DEFAULT_TOP_K = 5
MAX_TEXT_TOKENS = 256
"""Of a turn or a sentence, its last ones, where vectors are compared; less where the encoder's window is smaller."""


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


async def choose(service: Service, call: Call, asked: Asked, values: Mapping[str, Any]) -> list[Chosen]:
    """
    The sentences that go with the last turns.

    Args:
        values: parameters by JSON name, of which those of every call count.
    """
    grounds = asked.grounds
    if grounds is None:
        return []
    if grounds.kb_id:
        sentences = await sentences_of(service, call, grounds.kb_id)
    else:
        sentences = list(await asyncio.to_thread(read_documents, grounds.documents, field="knowledge.documents"))
    if not sentences:
        return []
    scorer = grounds.scorer or "tfidf"
    choice = Choice(scorer=scorer, top_k=grounds.top_k or DEFAULT_TOP_K, min_score=grounds.min_score)  # type: ignore[arg-type]  # checked
    turns = [turn.text for turn in asked.conversation]
    if scorer in ("tfidf", "bm25"):
        return await asyncio.to_thread(lambda: LocalKnowledge(sentences).select(turns, choice))
    how = {name: value for name, value in values.items() if name in META_NAMES}
    known, last = await _vectors(service, call, [s.text for s in sentences], turns[-choice.turns :], how)
    return await asyncio.to_thread(
        lambda: LocalKnowledge(sentences, vectors_NH=known).select(turns[-choice.turns :], choice, turn_vectors_MH=last)
    )


async def _vectors(
    service: Service, call: Call, sentences: Sequence[str], turns: Sequence[str], how: Mapping[str, Any]
) -> tuple[Vectors, Vectors]:
    """
    Vectors of sentences and of turns, which ask for them: by one served encoder, or by two that belong together.

    Args:
        how: parameters of the request itself.
    """
    encoder = await service.resolve(default_encoder(service), call)
    asking, knowing = await both_of(service, call, encoder)
    if asking is knowing:
        vectors = await _encoded(service, call, asking, [*sentences, *turns], how)
        return vectors[: len(sentences)], vectors[len(sentences) :]
    known = await _encoded(service, call, knowing, sentences, how)
    return known, await _encoded(service, call, asking, turns, how)


async def _encoded(
    service: Service, call: Call, model: ServedModel, texts: Sequence[str], how: Mapping[str, Any]
) -> Vectors:
    """Vectors of the ends of texts, in pieces of as many as one request may have."""
    size = min(MAX_TEXT_TOKENS, model.ready().max_context_tokens)
    most_chars = size * service.limits.max_prompt_chars_per_token
    first, last = model.tokenizer.encode("", add_special_tokens=True)

    def read(text: str) -> Sequenced:
        ids = literal(text[-most_chars:], model.tokenizer)
        return Sequenced(ids=(first, *ids[-(size - 2) :], last))

    sequences = await off_loop(sum(map(len, texts)), lambda: [read(text) for text in texts])
    rows: list[Sequence[float]] = []
    most = min(service.limits.max_embedding_inputs, service.limits.max_queue_requests)
    for start in range(0, len(sequences), most):
        _, found, _ = await embed(service, call, model.name, sequences[start : start + most], how)
        rows += [row.values for row in found]
    return np.array(rows, np.float32)
