"""Vectors, indexes and searches: `client.retrieval` of both clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

from trilithon._dialogue import Document, documents_of
from trilithon._dialogue_types import Nothing
from trilithon._parameters import CallOptions
from trilithon._requests import plain
from trilithon._retrieval_types import Index, Indexes, SearchResults, Vectors
from trilithon._transport import (
    CREATE_INDEX,
    DELETE_INDEX,
    ENCODE,
    GET_INDEX,
    LIST_INDEXES,
    REFRESH_INDEX,
    SEARCH,
)

if TYPE_CHECKING:
    from trilithon._async_client import AsyncClient
    from trilithon._client import Client

SearchMode = Literal["dense", "bm25", "hybrid"]
"""By meaning, by words, or by both."""


class Retrieval:
    """Passages that go with questions; reached as `client.retrieval`. `model` is the encoder."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def encode(
        self,
        texts: Sequence[str],
        *,
        role: Literal["query", "passage"],
        titles: Sequence[str] | None = None,
        **options: Unpack[CallOptions],
    ) -> Vectors:
        """
        Vectors of questions or of passages.

        Args:
            texts: 1 to 256, none blank; long ones are cut at their end.
            titles: of the passages, as many.
        """
        return self._client._call(ENCODE, encode_fields(texts, role, titles, options), options, Vectors)

    def search(
        self,
        index: str,
        queries: Sequence[str],
        *,
        top_k: int | None = None,
        mode: SearchMode | None = None,
        min_version: int | None = None,
        **options: Unpack[CallOptions],
    ) -> SearchResults:
        """
        The passages of an index that go with each question.

        Args:
            queries: 1 to 64.
            top_k: passages for each at most, 1 to 1000. Default: 10.
            mode: how it is searched. Default: dense.
            min_version: refuse where an older version is served.
        """
        fields = search_fields(index, queries, top_k, mode, min_version, options)
        return self._client._call(SEARCH, fields, options, SearchResults)

    def create_index(
        self,
        name: str,
        *,
        file: str | None = None,
        documents: Sequence[Document] | None = None,
        backend: Literal["flat", "hnsw"] | None = None,
        **options: Unpack[CallOptions],
    ) -> Index:
        """
        Begin to build an index; `get_index` tells how far it is.

        Args:
            name: 1 to 64 letters, digits, _ and -; not taken.
            file: id of an uploaded file of purpose evidence, lines of {"id", "title", "text"}.
            documents: 1 to 64, together at most 1 MiB, cut into passages of 100 words; or `file`, not both.
            backend: how vectors are searched. Default: flat, exact.
        """
        return self._client._call(CREATE_INDEX, create_fields(name, file, documents, backend, options), options, Index)

    def get_index(self, name: str, **options: Unpack[CallOptions]) -> Index:
        """What is served of an index, and how far it is built."""
        return self._client._call(GET_INDEX, plain("get_index", {"name": name}, options), options, Index)

    def list_indexes(self, **options: Unpack[CallOptions]) -> tuple[Index, ...]:
        """All indexes, by name."""
        return self._client._call(LIST_INDEXES, plain("list_indexes", {}, options), options, Indexes).indexes

    def refresh_index(self, name: str, **options: Unpack[CallOptions]) -> Index:
        """Begin to encode an index again, by the encoder that built it unless another is named."""
        return self._client._call(REFRESH_INDEX, plain("refresh_index", {"name": name}, options), options, Index)

    def delete_index(self, name: str, **options: Unpack[CallOptions]) -> None:
        """Remove an index, and end what builds it."""
        self._client._call(DELETE_INDEX, plain("delete_index", {"name": name}, options), options, Nothing)


class AsyncRetrieval:
    """Passages that go with questions; reached as `client.retrieval`. `model` is the encoder."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def encode(
        self,
        texts: Sequence[str],
        *,
        role: Literal["query", "passage"],
        titles: Sequence[str] | None = None,
        **options: Unpack[CallOptions],
    ) -> Vectors:
        """
        Vectors of questions or of passages.

        Args:
            texts: 1 to 256, none blank; long ones are cut at their end.
            titles: of the passages, as many.
        """
        return await self._client._call(ENCODE, encode_fields(texts, role, titles, options), options, Vectors)

    async def search(
        self,
        index: str,
        queries: Sequence[str],
        *,
        top_k: int | None = None,
        mode: SearchMode | None = None,
        min_version: int | None = None,
        **options: Unpack[CallOptions],
    ) -> SearchResults:
        """
        The passages of an index that go with each question.

        Args:
            queries: 1 to 64.
            top_k: passages for each at most, 1 to 1000. Default: 10.
            mode: how it is searched. Default: dense.
            min_version: refuse where an older version is served.
        """
        fields = search_fields(index, queries, top_k, mode, min_version, options)
        return await self._client._call(SEARCH, fields, options, SearchResults)

    async def create_index(
        self,
        name: str,
        *,
        file: str | None = None,
        documents: Sequence[Document] | None = None,
        backend: Literal["flat", "hnsw"] | None = None,
        **options: Unpack[CallOptions],
    ) -> Index:
        """
        Begin to build an index; `get_index` tells how far it is.

        Args:
            name: 1 to 64 letters, digits, _ and -; not taken.
            file: id of an uploaded file of purpose evidence, lines of {"id", "title", "text"}.
            documents: 1 to 64, together at most 1 MiB, cut into passages of 100 words; or `file`, not both.
            backend: how vectors are searched. Default: flat, exact.
        """
        fields = create_fields(name, file, documents, backend, options)
        return await self._client._call(CREATE_INDEX, fields, options, Index)

    async def get_index(self, name: str, **options: Unpack[CallOptions]) -> Index:
        """What is served of an index, and how far it is built."""
        return await self._client._call(GET_INDEX, plain("get_index", {"name": name}, options), options, Index)

    async def list_indexes(self, **options: Unpack[CallOptions]) -> tuple[Index, ...]:
        """All indexes, by name."""
        return (await self._client._call(LIST_INDEXES, plain("list_indexes", {}, options), options, Indexes)).indexes

    async def refresh_index(self, name: str, **options: Unpack[CallOptions]) -> Index:
        """Begin to encode an index again, by the encoder that built it unless another is named."""
        return await self._client._call(REFRESH_INDEX, plain("refresh_index", {"name": name}, options), options, Index)

    async def delete_index(self, name: str, **options: Unpack[CallOptions]) -> None:
        """Remove an index, and end what builds it."""
        await self._client._call(DELETE_INDEX, plain("delete_index", {"name": name}, options), options, Nothing)


# What both share --------------------------------------------------------------------------------------------


def encode_fields(
    texts: Sequence[str], role: str, titles: Sequence[str] | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of a request for vectors."""
    fields = {"texts": _listed("encode", texts), "role": role, "titles": None if titles is None else list(titles)}
    return plain("encode", fields, options)


def search_fields(
    index: str,
    queries: Sequence[str],
    top_k: int | None,
    mode: str | None,
    min_version: int | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Fields of a search."""
    given = {"top_k": top_k, "mode": mode, "min_version": min_version}
    return plain("search", {"index": index, "queries": _listed("search", queries), **given}, options)


def create_fields(
    name: str, file: str | None, documents: Sequence[Document] | None, backend: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of a new index."""
    listed = None if documents is None else documents_of("documents", documents)
    return plain("create_index", {"name": name, "file_id": file, "documents": listed, "backend": backend}, options)


def _listed(method: str, texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(f"{method}() takes a list of texts. Given: a str. Put it into a list.")
    return list(texts)
