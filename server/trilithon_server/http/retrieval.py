"""Routes of retrieval: the messages of `trilithon.api.v1` spelt flat."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from trilithon_server import index_builds, retrieval, retrieval_answers
from trilithon_server.http.dialogue import DialogueDocument
from trilithon_server.http.endpoint import Route
from trilithon_server.http.exchange import Exchange, json_beside
from trilithon_server.http.native import SCORE_HIDDEN
from trilithon_server.http.openai import model_header
from trilithon_server.http.parse import parse
from trilithon_server.index_builds import Source
from trilithon_server.retrieval import MAX_TOP_K, Wanted
from trilithon_server.served import Call
from trilithon_server.service import Service
from trilithon_server.task_run import off_loop

_HIDDEN = SCORE_HIDDEN
_INDEXES = "/v1/retrieval/indexes"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class EncodeRequest(_Strict):
    """POST /v1/retrieval/encode"""

    model: str = Field("", description="Name of the encoder; empty means the first that is served.")
    texts: list[str]
    role: Literal["query", "passage"]
    titles: list[str] = Field(default_factory=list, description="Of the passages, one a text; empty means none.")


class SearchRequest(_Strict):
    """POST /v1/retrieval/search"""

    model: str = Field("", description="Name of the encoder; empty means the one that built the index.")
    index: str
    queries: list[str]
    top_k: int = Field(0, ge=0, le=MAX_TOP_K, description="Passages for each question at most; 0 means 10.")
    mode: Literal["", "dense", "bm25", "hybrid"] = Field("", description="Empty means dense.")
    min_version: int = Field(0, ge=0, le=(1 << 64) - 1, description="Refused where an older version is served.")


class CreateIndexRequest(_Strict):
    """POST /v1/retrieval/indexes: exactly one of `file_id` and `documents`."""

    name: str
    file_id: str = Field("", description='An uploaded file of purpose evidence: lines of {"id", "title", "text"}.')
    documents: list[DialogueDocument] = Field(default_factory=list, description="Cut into passages of 100 words.")
    model: str = Field("", description="Name of the encoder; empty means the first that is served.")
    backend: Literal["", "flat", "hnsw"] = Field("", description="Empty means flat: exact.")


class RefreshIndexRequest(_Strict):
    """POST /v1/retrieval/indexes/{name}/refresh"""

    model: str = Field("", description="Name of the encoder; empty means the one that built the index.")


async def encode(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/retrieval/encode"""
    parsed = parse(EncodeRequest, await exchange.json(), service.limits, hidden=_HIDDEN)
    body = parsed.body

    async def work() -> None:
        result = await retrieval.encode(
            service, call, body.model, body.texts, body.role, parsed.values, titles=body.titles, found=parsed.found
        )
        exchange.extra_headers.append(model_header(result.model))
        await exchange.respond_json(retrieval_answers.encoded(result))

    await exchange.race(work())


async def search(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/retrieval/search"""
    parsed = parse(SearchRequest, await exchange.json(), service.limits, hidden=_HIDDEN)
    body = parsed.body
    wanted = Wanted(
        index=body.index,
        queries=body.queries,
        top_k=body.top_k,
        mode=body.mode,
        min_version=body.min_version,
        encoder=body.model,
    )

    async def work() -> None:
        result = await retrieval.search(service, call, wanted, parsed.values, found=parsed.found)
        if result.model is not None:
            exchange.extra_headers.append(model_header(result.model))
        body = await off_loop(result.chars, lambda: json_beside(retrieval_answers.found(result)))
        await exchange.respond(200, body)

    await exchange.race(work())


async def create_index(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/retrieval/indexes"""
    parsed = parse(CreateIndexRequest, await exchange.json(), service.limits, parameters=False)
    body = parsed.body
    facts = await index_builds.create(
        service,
        call,
        body.name,
        Source(file_id=body.file_id, documents=[item.document() for item in body.documents]),
        encoder=body.model,
        backend=body.backend,
        found=parsed.found,
    )
    await exchange.respond_json(retrieval_answers.index(facts))


async def list_indexes(service: Service, exchange: Exchange, call: Call) -> None:
    """GET /v1/retrieval/indexes"""
    exchange.query(())
    await exchange.respond_json(retrieval_answers.indexes(await index_builds.list_all(service, call)))


async def get_index(service: Service, exchange: Exchange, call: Call) -> None:
    """GET /v1/retrieval/indexes/{name}"""
    facts = await index_builds.get(service, call, exchange.path_params["name"])
    await exchange.respond_json(retrieval_answers.index(facts))


async def refresh_index(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/retrieval/indexes/{name}/refresh"""
    parsed = parse(RefreshIndexRequest, await exchange.json(), service.limits, parameters=False)
    parsed.found.raise_if_any()
    facts = await index_builds.refresh(service, call, exchange.path_params["name"], encoder=parsed.body.model)
    await exchange.respond_json(retrieval_answers.index(facts))


async def delete_index(service: Service, exchange: Exchange, call: Call) -> None:
    """DELETE /v1/retrieval/indexes/{name}"""
    await index_builds.delete(service, call, exchange.path_params["name"])
    await exchange.respond_json({})


ROUTES: tuple[Route, ...] = (
    Route(
        method="POST", path="/v1/retrieval/encode", handler=encode, request=EncodeRequest, parameters=True,
        hidden=_HIDDEN, answer="EncodeAnswer", summary="Vectors of questions or of passages.",
    ),
    Route(
        method="POST", path="/v1/retrieval/search", handler=search, request=SearchRequest, parameters=True,
        hidden=_HIDDEN, answer="SearchAnswer", summary="Passages of an index that go with each question.",
    ),
    Route(
        method="POST", path=_INDEXES, handler=create_index, request=CreateIndexRequest, answer="IndexAnswer",
        more_errors=("409",), summary="Begin to build an index.",
    ),
    Route(
        method="GET", path=_INDEXES, handler=list_indexes, answer="IndexesAnswer", counted=False,
        summary="All indexes, by name.",
    ),
    Route(
        method="GET", path=f"{_INDEXES}/{{name}}", handler=get_index, answer="IndexAnswer", counted=False,
        summary="What is served of an index, and how far it is built.",
    ),
    Route(
        method="POST", path=f"{_INDEXES}/{{name}}/refresh", handler=refresh_index, request=RefreshIndexRequest,
        answer="IndexAnswer", more_errors=("409",), summary="Begin to encode an index again.",
    ),
    Route(
        method="DELETE", path=f"{_INDEXES}/{{name}}", handler=delete_index, answer="Nothing", counted=False,
        summary="Remove an index, and end what builds it.",
    ),
)  # fmt: skip
