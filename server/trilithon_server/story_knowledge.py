"""What may be told in a story's next sentence: facts of its keywords, ranked by how well they go with the story."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trilithon_server.embedding import embed
from trilithon_server.knowledge.fact_vectors import ScoredFact, Vector, by_cosine
from trilithon_server.knowledge.graph import Facts
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.tasks.story_format import RankerFormat


async def ranked(
    service: Service,
    call: Call,
    ranker: ServedModel,
    format: RankerFormat,
    story: Sequence[str],
    facts: Facts,
    values: Mapping[str, Any],
) -> list[ScoredFact]:
    """
    Candidates by the cosine of their vectors and that of the story so far, best first.

    Args:
        values: parameters of the request itself, by JSON name.
    Raises:
        TrilithonError: the engine refused, or could not finish.
    """
    hello, adapter = ranker.ready(), ranker.adapter
    made_by = (hello.model_digest, hello.dtype, "" if adapter is None else adapter.digest, str(format.max_fact))
    keys = [(*made_by, fact.text) for fact in facts.facts]
    found = [service.fact_vectors.get(key) for key in keys]
    missing = [i for i, vector in enumerate(found) if vector is None]
    tokenizer = ranker.tokenizer
    texts = [format.story(story, tokenizer), *(format.fact(facts.facts[i].text, tokenizer) for i in missing)]
    inputs = [list(text.tokens) for text in texts]
    vectors: list[Vector] = []
    most = service.limits.max_embedding_inputs
    for first in range(0, len(inputs), most):
        _, rows, _ = await embed(service, call, ranker.name, inputs[first : first + most], values)
        vectors += [np.asarray(row.values, np.float32) for row in rows]
    for i, vector in zip(missing, vectors[1:], strict=True):
        found[i] = vector
        service.fact_vectors.put(keys[i], vector)
    return by_cosine(facts.facts, [vector for vector in found if vector is not None], vectors[0])
