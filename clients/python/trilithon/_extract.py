"""Entities, relations, answers and classes from finetuned encoders: `client.extract` of both clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from trilithon._extract_types import Annotations, Classifications, Entity, Relations, SpanAnswers
from trilithon._parameters import CallOptions
from trilithon._requests import plain
from trilithon._transport import ANNOTATE, ANSWER, CLASSIFY, RELATE

if TYPE_CHECKING:
    from trilithon._async_client import AsyncClient
    from trilithon._client import Client


class _MentionRequired(TypedDict):
    start: int
    end: int
    type: str


class Mention(_MentionRequired, total=False):
    """Characters [start, end) of a text and what is named there; `text` is compared with what stands there."""

    text: str


EntityInput = Entity | Mention
"""A mention as a request takes it: an `Entity` that was found, or a dictionary."""


class Extract:
    """What finetuned encoders find in texts; reached as `client.extract`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def annotate(
        self, texts: Sequence[str], *, types: Sequence[str] | None = None, **options: Unpack[CallOptions]
    ) -> Annotations:
        """
        Entities of each text.

        Args:
            texts: 1 to 64, none empty; long ones are read in windows.
            types: only entities of these types. Default: all.
        """
        return self._client._call(ANNOTATE, annotate_fields(texts, types, options), options, Annotations)

    def relations(
        self,
        text: str,
        *,
        pairs: Sequence[tuple[EntityInput, EntityInput]] | None = None,
        entities: Sequence[EntityInput] | None = None,
        tagger: str | None = None,
        **options: Unpack[CallOptions],
    ) -> Relations:
        """
        How pairs of entities of a text are related; give exactly one of the three.

        Args:
            pairs: these, at most 200.
            entities: every pair of these that stands in one sentence and may be related.
            tagger: name of a served model that finds the entities first.
        """
        fields = relation_fields(text, pairs, entities, tagger, options)
        return self._client._call(RELATE, fields, options, Relations)

    def answer(
        self,
        question: str,
        contexts: Sequence[str],
        *,
        n_best: int | None = None,
        null_threshold: float | None = None,
        **options: Unpack[CallOptions],
    ) -> SpanAnswers:
        """
        Spans of the contexts that answer the question.

        Args:
            contexts: 1 to 64 texts, none empty; long ones are read in windows.
            n_best: how many candidates, 1 to 20. Default: 5.
            null_threshold: by how much "no answer" must score above the best answer to be said. Default: the model's.
        """
        fields = answer_fields(question, contexts, n_best, null_threshold, options)
        return self._client._call(ANSWER, fields, options, SpanAnswers)

    def classify(
        self, texts: Sequence[str], *, text_pairs: Sequence[str] | None = None, **options: Unpack[CallOptions]
    ) -> Classifications:
        """
        One label for each text.

        Args:
            texts: 1 to 64, none empty.
            text_pairs: the second text of each, for models that judge pairs.
        """
        fields = classify_fields(texts, text_pairs, options)
        return self._client._call(CLASSIFY, fields, options, Classifications)


class AsyncExtract:
    """What finetuned encoders find in texts; reached as `client.extract`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def annotate(
        self, texts: Sequence[str], *, types: Sequence[str] | None = None, **options: Unpack[CallOptions]
    ) -> Annotations:
        """
        Entities of each text.

        Args:
            texts: 1 to 64, none empty; long ones are read in windows.
            types: only entities of these types. Default: all.
        """
        return await self._client._call(ANNOTATE, annotate_fields(texts, types, options), options, Annotations)

    async def relations(
        self,
        text: str,
        *,
        pairs: Sequence[tuple[EntityInput, EntityInput]] | None = None,
        entities: Sequence[EntityInput] | None = None,
        tagger: str | None = None,
        **options: Unpack[CallOptions],
    ) -> Relations:
        """
        How pairs of entities of a text are related; give exactly one of the three.

        Args:
            pairs: these, at most 200.
            entities: every pair of these that stands in one sentence and may be related.
            tagger: name of a served model that finds the entities first.
        """
        fields = relation_fields(text, pairs, entities, tagger, options)
        return await self._client._call(RELATE, fields, options, Relations)

    async def answer(
        self,
        question: str,
        contexts: Sequence[str],
        *,
        n_best: int | None = None,
        null_threshold: float | None = None,
        **options: Unpack[CallOptions],
    ) -> SpanAnswers:
        """
        Spans of the contexts that answer the question.

        Args:
            contexts: 1 to 64 texts, none empty; long ones are read in windows.
            n_best: how many candidates, 1 to 20. Default: 5.
            null_threshold: by how much "no answer" must score above the best answer to be said. Default: the model's.
        """
        fields = answer_fields(question, contexts, n_best, null_threshold, options)
        return await self._client._call(ANSWER, fields, options, SpanAnswers)

    async def classify(
        self, texts: Sequence[str], *, text_pairs: Sequence[str] | None = None, **options: Unpack[CallOptions]
    ) -> Classifications:
        """
        One label for each text.

        Args:
            texts: 1 to 64, none empty.
            text_pairs: the second text of each, for models that judge pairs.
        """
        fields = classify_fields(texts, text_pairs, options)
        return await self._client._call(CLASSIFY, fields, options, Classifications)


# What both share --------------------------------------------------------------------------------------------


def annotate_fields(texts: Sequence[str], types: Sequence[str] | None, options: CallOptions) -> dict[str, Any]:
    """Fields of a request for entities."""
    return plain("annotate", {"texts": _texts("annotate", texts), "types": _listed(types)}, options)


def relation_fields(
    text: str,
    pairs: Sequence[tuple[EntityInput, EntityInput]] | None,
    entities: Sequence[EntityInput] | None,
    tagger: str | None,
    options: CallOptions,
) -> dict[str, Any]:
    """Fields of a request for relations."""
    fields = {
        "text": text,
        "pairs": None if pairs is None else [{"a": mention(a), "b": mention(b)} for a, b in pairs],
        "entities": None if entities is None else [mention(entity) for entity in entities],
        "tagger": tagger,
    }
    return plain("relations", fields, options)


def answer_fields(
    question: str,
    contexts: Sequence[str],
    n_best: int | None,
    null_threshold: float | None,
    options: CallOptions,
) -> dict[str, Any]:
    """Fields of a question."""
    given = {"n_best": n_best, "null_threshold": null_threshold}
    return plain("answer", {"question": question, "contexts": _texts("answer", contexts), **given}, options)


def classify_fields(texts: Sequence[str], text_pairs: Sequence[str] | None, options: CallOptions) -> dict[str, Any]:
    """Fields of a request for classes."""
    fields = {"texts": _texts("classify", texts), "text_pairs": _listed(text_pairs)}
    return plain("classify", fields, options)


def mention(given: EntityInput) -> Mapping[str, Any]:
    """
    A mention in its JSON shape.

    >>> mention(Entity(start=0, end=3, type="GENE", text="p53", score=0.9))
    {'start': 0, 'end': 3, 'type': 'GENE', 'text': 'p53'}
    """
    if isinstance(given, Entity):
        return {"start": given.start, "end": given.end, "type": given.type, "text": given.text}
    return dict(given)


def _texts(method: str, texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(f"{method}() takes a list of texts. Given: a str. Put it into a list.")
    return list(texts)


def _listed(values: Sequence[str] | None) -> list[str] | None:
    return None if values is None else list(values)
