"""RetrieverService of `trilithon.api.v1`, over the functions that HTTP calls too."""

from __future__ import annotations

from typing import Any, Literal

from trilithon.api.v1 import retrieval_pb2, retrieval_pb2_grpc
from trilithon_server import index_builds, retrieval, retrieval_answers
from trilithon_server.grpc import convert
from trilithon_server.grpc.dialogue import documents_of
from trilithon_server.grpc.gate import current_call
from trilithon_server.index_builds import Source
from trilithon_server.knowledge.indexes import Facts
from trilithon_server.retrieval import MODES, Wanted
from trilithon_server.service import Service
from trilithon_server.task_run import off_loop
from trilithon_server.validation import Violations

_ROLES: dict[int, Literal["query", "passage"]] = {
    retrieval_pb2.EncodeRequest.ROLE_QUERY: "query",
    retrieval_pb2.EncodeRequest.ROLE_PASSAGE: "passage",
}
_MODES: dict[int, str] = {
    retrieval_pb2.SearchRequest.MODE_UNSPECIFIED: "",
    retrieval_pb2.SearchRequest.MODE_DENSE: "dense",
    retrieval_pb2.SearchRequest.MODE_BM25: "bm25",
    retrieval_pb2.SearchRequest.MODE_HYBRID: "hybrid",
}
_BACKENDS: dict[int, str] = {
    retrieval_pb2.CreateIndexRequest.BACKEND_UNSPECIFIED: "",
    retrieval_pb2.CreateIndexRequest.BACKEND_FLAT: "flat",
    retrieval_pb2.CreateIndexRequest.BACKEND_HNSW: "hnsw",
}


class Retrievals(retrieval_pb2_grpc.RetrieverServiceServicer):
    """RetrieverService"""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Encode(self, request: retrieval_pb2.EncodeRequest, context: Any) -> retrieval_pb2.EncodeResponse:
        """Vectors of questions or of passages."""
        result = await retrieval.encode(
            self._service,
            current_call(),
            await convert.model_name(self._service, request.meta),
            list(request.texts),
            _ROLES.get(request.role, ""),
            convert.meta_values(request.meta),
            titles=list(request.titles),
        )
        return retrieval_pb2.EncodeResponse(**retrieval_answers.encoded(result))

    async def Search(self, request: retrieval_pb2.SearchRequest, context: Any) -> retrieval_pb2.SearchResponse:
        """Passages of an index."""
        found = Violations()
        wanted = Wanted(
            index=request.index,
            queries=list(request.queries),
            top_k=request.top_k,
            mode=mode_of(request.mode, found),
            min_version=request.min_version,
            encoder=await convert.model_name(self._service, request.meta),
        )
        values = convert.meta_values(request.meta)
        result = await retrieval.search(self._service, current_call(), wanted, values, found=found)
        return await off_loop(result.chars, lambda: retrieval_pb2.SearchResponse(**retrieval_answers.found(result)))

    async def CreateIndex(self, request: retrieval_pb2.CreateIndexRequest, context: Any) -> retrieval_pb2.Index:
        """Begin to build an index."""
        found = Violations()
        if request.backend not in _BACKENDS:
            found.add("backend", "must be flat or hnsw", given=request.backend)
        facts = await index_builds.create(
            self._service,
            current_call(),
            request.name,
            Source(file_id=request.file_id, documents=documents_of(request.documents)),
            encoder=request.model,
            backend=_BACKENDS.get(request.backend, ""),
            found=found,
        )
        return _index(facts)

    async def GetIndex(self, request: retrieval_pb2.GetIndexRequest, context: Any) -> retrieval_pb2.Index:
        """What is served of an index, and how far it is built."""
        return _index(await index_builds.get(self._service, current_call(), request.name))

    async def ListIndexes(
        self, request: retrieval_pb2.ListIndexesRequest, context: Any
    ) -> retrieval_pb2.ListIndexesResponse:
        """All of them, by name."""
        many = await index_builds.list_all(self._service, current_call())
        return retrieval_pb2.ListIndexesResponse(indexes=[_index(facts) for facts in many])

    async def RefreshIndex(self, request: retrieval_pb2.RefreshIndexRequest, context: Any) -> retrieval_pb2.Index:
        """Begin to encode an index's passages again."""
        return _index(await index_builds.refresh(self._service, current_call(), request.name, encoder=request.model))

    async def DeleteIndex(
        self, request: retrieval_pb2.GetIndexRequest, context: Any
    ) -> retrieval_pb2.DeleteIndexResponse:
        """Remove an index."""
        await index_builds.delete(self._service, current_call(), request.name)
        return retrieval_pb2.DeleteIndexResponse()


def mode_of(mode: int, found: Violations) -> str:
    """A mode as the service takes it."""
    if mode not in _MODES:
        found.add("mode", f"must be one of {', '.join(MODES)}", given=mode)
    return _MODES.get(mode, "")


def _index(facts: Facts) -> retrieval_pb2.Index:
    fields = retrieval_answers.index(facts)
    return retrieval_pb2.Index(**{**fields, "state": f"STATE_{fields['state'].upper()}"})
