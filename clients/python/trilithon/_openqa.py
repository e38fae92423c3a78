"""Questions answered from passages: `client.openqa` of both clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from trilithon._dialogue import Document, documents_of
from trilithon._parameters import CallOptions
from trilithon._requests import plain
from trilithon._retrieval import SearchMode
from trilithon._retrieval_types import OpenAnswer
from trilithon._transport import ANSWER_OPEN

if TYPE_CHECKING:
    from trilithon._async_client import AsyncClient
    from trilithon._client import Client

Reader = Literal["span", "joint", "individual", "causal"]
"""
An encoder that marks a span of a passage; an encoder-decoder that writes one answer to all passages together, or one to
each; another model that writes an answer to each.
"""


class Sampling(TypedDict, total=False):
    """How a reader writes that does; names and ranges as in `GenerationOptions`. Default: the likeliest tokens."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    seed: int
    n: int
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]


class OpenQA:
    """Questions answered from an index or from documents; reached as `client.openqa`. `model` is the reader."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def answer(
        self,
        question: str,
        *,
        index: str | None = None,
        documents: Sequence[Document] | None = None,
        top_k: int | None = None,
        reader: Reader | None = None,
        mode: SearchMode | None = None,
        retriever: str | None = None,
        min_version: int | None = None,
        sampling: Sampling | None = None,
        return_evidence: bool = False,
        **options: Unpack[CallOptions],
    ) -> OpenAnswer:
        """
        The answer to a question.

        Args:
            index: a stored one; or `documents`, not both.
            documents: 1 to 64, together at most 1 MiB, cut into passages of 100 words.
            top_k: passages that are read, 1 to 50. Default: 5.
            reader: how they are read. Default: what the model is.
            mode: how passages are searched. Default: dense.
            retriever: the encoder. Default: the index's own, for documents the first that is served.
            min_version: refuse where an older version of the index is served.
            sampling: how an answer is written; not with the reader `span`.
            return_evidence: tell the passages that were read.
        """
        own = (index, documents, top_k, reader, mode, retriever, min_version, sampling, return_evidence)
        return self._client._call(ANSWER_OPEN, answer_fields(question, *own, options), options, OpenAnswer)


class AsyncOpenQA:
    """Questions answered from an index or from documents; reached as `client.openqa`. `model` is the reader."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def answer(
        self,
        question: str,
        *,
        index: str | None = None,
        documents: Sequence[Document] | None = None,
        top_k: int | None = None,
        reader: Reader | None = None,
        mode: SearchMode | None = None,
        retriever: str | None = None,
        min_version: int | None = None,
        sampling: Sampling | None = None,
        return_evidence: bool = False,
        **options: Unpack[CallOptions],
    ) -> OpenAnswer:
        """
        The answer to a question.

        Args:
            index: a stored one; or `documents`, not both.
            documents: 1 to 64, together at most 1 MiB, cut into passages of 100 words.
            top_k: passages that are read, 1 to 50. Default: 5.
            reader: how they are read. Default: what the model is.
            mode: how passages are searched. Default: dense.
            retriever: the encoder. Default: the index's own, for documents the first that is served.
            min_version: refuse where an older version of the index is served.
            sampling: how an answer is written; not with the reader `span`.
            return_evidence: tell the passages that were read.
        """
        own = (index, documents, top_k, reader, mode, retriever, min_version, sampling, return_evidence)
        return await self._client._call(ANSWER_OPEN, answer_fields(question, *own, options), options, OpenAnswer)


def answer_fields(
    question: str,
    index: str | None,
    documents: Sequence[Document] | None,
    top_k: int | None,
    reader: str | None,
    mode: str | None,
    retriever: str | None,
    min_version: int | None,
    sampling: Sampling | None,
    return_evidence: bool,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Fields of a question."""
    fields = {
        "question": question,
        "index": index,
        "documents": None if documents is None else documents_of("documents", documents),
        "top_k": top_k,
        "reader": reader,
        "mode": mode,
        "retriever": retriever,
        "min_version": min_version,
        "sampling": None if sampling is None else dict(sampling),
        "return_evidence": return_evidence,
    }
    return plain("answer", fields, options)
