"""What may be told in a story's next sentence: facts of its keywords, ranked by how well they go with the story."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trilithon_server.embedding import embed
from trilithon_server.knowledge.fact_vectors import ScoredFact, Vector, by_cosine
from trilithon_server.knowledge.graph import Facts
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.tasks.story_format import RankerFormat


@dataclass(frozen=True)
class Ranker:
    """
    Chooses facts by vectors.

    Attributes:
        reader: the encoder of stories.
        knower: that of facts, which may be the same.
        format: how they read them.
    """

    reader: ServedModel
    knower: ServedModel
    format: RankerFormat


async def ranked(
    service: Service,
    call: Call,
    ranker: Ranker,
    story: Sequence[str],
    keywords: Sequence[str],
    facts: Facts,
    values: Mapping[str, Any],
) -> list[ScoredFact]:
    """
    Candidates by the cosine of their vectors and that of the story so far, best first.

    Args:
        keywords: of the next sentence, which the story asks with.
        values: parameters of the request itself, by JSON name.
    Raises:
        TrilithonError: the engine refused, or could not finish.
    """
    format = ranker.format
    hello, adapter = ranker.knower.ready(), ranker.knower.adapter
    made_by = (hello.model_digest, hello.dtype, "" if adapter is None else adapter.digest, str(format.max_fact))
    keys = [(*made_by, fact.text) for fact in facts.facts]
    found = [service.fact_vectors.get(key) for key in keys]
    missing = [i for i, vector in enumerate(found) if vector is None]
    asked = [list(format.story(story, ranker.reader.tokenizer, keywords=keywords).tokens)]
    new = [list(format.fact(facts.facts[i].text, ranker.knower.tokenizer).tokens) for i in missing]

    async def vectors(model: ServedModel, inputs: list[list[int]]) -> list[Vector]:
        rows: list[Vector] = []
        most = service.limits.max_embedding_inputs
        for first in range(0, len(inputs), most):
            _, some, _ = await embed(service, call, model.name, inputs[first : first + most], values)
            rows += [np.asarray(row.values, np.float32) for row in some]
        return rows

    if ranker.reader is ranker.knower:
        told, *made = await vectors(ranker.reader, [*asked, *new])
    else:
        ((told,), made) = await asyncio.gather(vectors(ranker.reader, asked), vectors(ranker.knower, new))
    for i, vector in zip(missing, made, strict=True):
        found[i] = vector
        service.fact_vectors.put(keys[i], vector)
    return by_cosine(facts.facts, [vector for vector in found if vector is not None], told)
