"""
The seam between the clients and the wire: one attempt at one operation, over HTTP or gRPC.

The clients above know operations, retries and results; the transports below know sockets. What crosses the seam is
plain: field values by their JSON names down, JSON-shaped answers up, `AttemptFailed` when it went wrong.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

from trilithon._dialogue_types import Actor, KnowledgeBase, Nothing, Reply
from trilithon._extract_types import Annotations, Classifications, Relations, SpanAnswers
from trilithon._retrieval_types import Index, Indexes, OpenAnswer, SearchResults, Vectors
from trilithon._story_types import Story
from trilithon._synth_qa_types import SynthQASummary
from trilithon._types import (
    Aborted,
    Completions,
    DeletedAlias,
    Embeddings,
    Health,
    Model,
    ModelPage,
    Rendered,
    Scores,
    Texts,
    Tokenization,
    Unloaded,
)
from trilithon.errors import TrilithonError

Fields = Mapping[str, Any]
Event = tuple[str, Mapping[str, Any]]
"""One event of a stream: started, delta or finished, and its fields."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that a server does, and where it lives on each protocol."""

    name: str
    http: str  # method and path; {field} is taken from the fields
    rpc: str  # service/method
    answer: type[Any]
    takes_time_limit: bool = False  # whether `time_limit_ms` may be sent: HTTP has no deadline of its own
    write: Callable[[Fields], Mapping[str, Any]] | None = None  # fields to HTTP's JSON, where its shape differs
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None  # and back
    headers: Mapping[str, str] = field(default_factory=dict)  # fields that HTTP sends as headers, by header name
    silence_s: float = float("inf")  # a stream over HTTP that is silent for longer is cut off
    text: bool = False  # whether HTTP answers with plain text, the answer's `text`
    raw: bool = False  # whether a stream over HTTP is bytes, the events' `data`
    stream_rpc: str = ""  # the method that streams over gRPC, where it is another one


_V1 = "trilithon.api.v1."
GENERATE = Operation(
    "generate", "POST /v1/generate", f"{_V1}GenerationService/Generate", Completions, takes_time_limit=True,
    stream_rpc=f"{_V1}GenerationService/GenerateStream",
)  # fmt: skip
SCORE = Operation("score", "POST /v1/score", f"{_V1}GenerationService/Score", Scores, takes_time_limit=True)
ABORT = Operation("abort", "DELETE /v1/requests/{request_id}", f"{_V1}GenerationService/Abort", Aborted)
EMBED = Operation("embed", "POST /v1/embeddings", f"{_V1}EmbedService/Embed", Embeddings)
TOKENIZE = Operation("tokenize", "POST /v1/tokenize", f"{_V1}TokenizeService/Tokenize", Tokenization)
DETOKENIZE = Operation("detokenize", "POST /v1/detokenize", f"{_V1}TokenizeService/Detokenize", Texts)
RENDER = Operation("render", "POST /v1/render", f"{_V1}TokenizeService/RenderChat", Rendered)
_EXTRACT = f"{_V1}ExtractService"
ANNOTATE = Operation(
    "annotate", "POST /v1/extract/entities", f"{_EXTRACT}/Annotate", Annotations, takes_time_limit=True
)
RELATE = Operation(
    "relations", "POST /v1/extract/relations", f"{_EXTRACT}/ExtractRelations", Relations, takes_time_limit=True
)
ANSWER = Operation("answer", "POST /v1/extract/spans", f"{_EXTRACT}/Answer", SpanAnswers, takes_time_limit=True)
CLASSIFY = Operation(
    "classify", "POST /v1/extract/classes", f"{_EXTRACT}/Classify", Classifications, takes_time_limit=True
)
_DIALOGUE = f"{_V1}DialogueService"
RESPOND = Operation(
    "respond", "POST /v1/dialogue", f"{_DIALOGUE}/Respond", Reply, takes_time_limit=True,
    stream_rpc=f"{_DIALOGUE}/RespondStream",
)  # fmt: skip
PUT_ACTOR = Operation("put_actor", "PUT /v1/dialogue/actors/{actor_id}", f"{_DIALOGUE}/PutActor", Actor)
GET_ACTOR = Operation("get_actor", "GET /v1/dialogue/actors/{actor_id}", f"{_DIALOGUE}/GetActor", Actor)
DELETE_ACTOR = Operation("delete_actor", "DELETE /v1/dialogue/actors/{actor_id}", f"{_DIALOGUE}/DeleteActor", Nothing)
PUT_KNOWLEDGE = Operation("put_knowledge", "PUT /v1/knowledge/{kb_id}", f"{_DIALOGUE}/PutKnowledge", KnowledgeBase)
GET_KNOWLEDGE = Operation("get_knowledge", "GET /v1/knowledge/{kb_id}", f"{_DIALOGUE}/GetKnowledge", KnowledgeBase)
DELETE_KNOWLEDGE = Operation(
    "delete_knowledge", "DELETE /v1/knowledge/{kb_id}", f"{_DIALOGUE}/DeleteKnowledge", Nothing
)
_STORY = f"{_V1}StoryService"
TELL_STORY = Operation("tell_story", "POST /v1/stories", f"{_STORY}/Generate", Story, takes_time_limit=True)
REWRITE_STORY = Operation(
    "rewrite_story", "POST /v1/stories/{story_id}/rewrite", f"{_STORY}/Rewrite", Story, takes_time_limit=True
)
GET_STORY = Operation("get_story", "GET /v1/stories/{story_id}", f"{_STORY}/GetStory", Story)
DELETE_STORY = Operation("delete_story", "DELETE /v1/stories/{story_id}", f"{_STORY}/DeleteStory", Nothing)
_RETRIEVER, _INDEXES = f"{_V1}RetrieverService", "/v1/retrieval/indexes"
ENCODE = Operation("encode", "POST /v1/retrieval/encode", f"{_RETRIEVER}/Encode", Vectors, takes_time_limit=True)
SEARCH = Operation("search", "POST /v1/retrieval/search", f"{_RETRIEVER}/Search", SearchResults, takes_time_limit=True)
CREATE_INDEX = Operation("create_index", f"POST {_INDEXES}", f"{_RETRIEVER}/CreateIndex", Index)
GET_INDEX = Operation("get_index", f"GET {_INDEXES}/{{name}}", f"{_RETRIEVER}/GetIndex", Index)
LIST_INDEXES = Operation("list_indexes", f"GET {_INDEXES}", f"{_RETRIEVER}/ListIndexes", Indexes)
REFRESH_INDEX = Operation("refresh_index", f"POST {_INDEXES}/{{name}}/refresh", f"{_RETRIEVER}/RefreshIndex", Index)
DELETE_INDEX = Operation("delete_index", f"DELETE {_INDEXES}/{{name}}", f"{_RETRIEVER}/DeleteIndex", Nothing)
ANSWER_OPEN = Operation(
    "answer_open", "POST /v1/openqa", f"{_V1}OpenQAService/Answer", OpenAnswer, takes_time_limit=True
)
SYNTH_QA = Operation(
    "synth_qa", "POST /v1/synthetic-qa", f"{_V1}SynthQAService/Generate", SynthQASummary, takes_time_limit=True
)
LIST_MODELS = Operation("list_models", "GET /v1/models", f"{_V1}ModelsService/ListModels", ModelPage)
GET_MODEL = Operation("get_model", "GET /v1/models/{id}", f"{_V1}ModelsService/GetModel", Model)
LOAD_ADAPTER = Operation("load_adapter", "POST /v1/adapters", f"{_V1}ModelsService/LoadAdapter", Model)
UNLOAD_ADAPTER = Operation(
    "unload_adapter",
    "DELETE /v1/adapters/{id}",
    f"{_V1}ModelsService/UnloadAdapter",
    Unloaded,
    write=lambda fields: {name: str(value).lower() for name, value in fields.items()},
)
SET_ALIAS = Operation("set_alias", "PUT /v1/aliases/{alias}", f"{_V1}ModelsService/SetAlias", Model)
DELETE_ALIAS = Operation("delete_alias", "DELETE /v1/aliases/{alias}", f"{_V1}ModelsService/DeleteAlias", DeletedAlias)
HEALTH = Operation("health", "GET /readyz", "grpc.health.v1.Health/Check", Health)
OPERATIONS = (
    GENERATE, SCORE, ABORT, EMBED, TOKENIZE, DETOKENIZE, RENDER, ANNOTATE, RELATE, ANSWER, CLASSIFY, RESPOND,
    PUT_ACTOR, GET_ACTOR, DELETE_ACTOR, PUT_KNOWLEDGE, GET_KNOWLEDGE, DELETE_KNOWLEDGE, TELL_STORY, REWRITE_STORY,
    GET_STORY, DELETE_STORY, ENCODE, SEARCH, CREATE_INDEX, GET_INDEX, LIST_INDEXES, REFRESH_INDEX, DELETE_INDEX,
    ANSWER_OPEN, SYNTH_QA, LIST_MODELS, GET_MODEL, LOAD_ADAPTER, UNLOAD_ADAPTER, SET_ALIAS, DELETE_ALIAS, HEALTH,
)  # fmt: skip


class AttemptFailed(Exception):
    """One attempt went wrong; `retry` says whether another may succeed."""

    def __init__(self, error: TrilithonError, *, retry: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry = retry


@dataclass(frozen=True, slots=True)
class Attempt:
    """What belongs to one try rather than to the operation."""

    request_id: str
    timeout_s: float
    """What is left of the total."""
    tell_server: bool = False
    """Whether the caller chose the total, so that the server should end by itself in time."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the server is and how to reach it. Secrets stay out of its repr."""

    url: str
    scheme: str  # http or grpc
    target: str  # base URL for http, host:port or unix:path for gRPC
    uds: str = ""  # path of a Unix socket, for http
    tls: bool = False
    api_key: str | None = field(default=None, repr=False)
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def metadata(self, attempt: Attempt) -> dict[str, str]:
        """Headers (HTTP) or metadata (gRPC) of one attempt."""
        values = {"x-request-id": attempt.request_id, **self.headers}
        if self.api_key is not None:
            values["authorization"] = f"Bearer {self.api_key}"
        return values


class EventStream(Protocol):
    """Events of one running request; closing it ends the request."""

    def __iter__(self) -> Iterator[Event]: ...
    def close(self) -> None: ...


class AsyncEventStream(Protocol):
    """Events of one running request; closing it ends the request."""

    def __aiter__(self) -> AsyncIterator[Event]: ...
    async def aclose(self) -> None: ...


class Transport(Protocol):
    """One server, reached by one protocol, from threads."""

    def call(self, operation: Operation, fields: Fields, attempt: Attempt) -> Mapping[str, Any]:
        """One attempt; the answer, JSON-shaped. Raises AttemptFailed."""
        ...

    def stream(self, fields: Fields, attempt: Attempt, operation: Operation = GENERATE) -> EventStream:
        """One attempt at a stream (a generation, a job's events). Raises AttemptFailed, also later."""
        ...

    def upload(self, operation: Operation, fields: Fields, stream: BinaryIO, attempt: Attempt) -> Mapping[str, Any]:
        """One attempt at an upload; `fields` has `filename` and `purpose`. Raises AttemptFailed."""
        ...

    def close(self) -> None:
        """Let go of all connections."""
        ...


class AsyncTransport(Protocol):
    """One server, reached by one protocol, from an event loop."""

    async def call(self, operation: Operation, fields: Fields, attempt: Attempt) -> Mapping[str, Any]:
        """One attempt; the answer, JSON-shaped. Raises AttemptFailed."""
        ...

    async def stream(self, fields: Fields, attempt: Attempt, operation: Operation = GENERATE) -> AsyncEventStream:
        """One attempt at a stream (a generation, a job's events). Raises AttemptFailed, also later."""
        ...

    async def upload(
        self, operation: Operation, fields: Fields, stream: BinaryIO, attempt: Attempt
    ) -> Mapping[str, Any]:
        """One attempt at an upload; `fields` has `filename` and `purpose`. Raises AttemptFailed."""
        ...

    async def aclose(self) -> None:
        """Let go of all connections."""
        ...


Connect = Callable[[Settings], Transport]
