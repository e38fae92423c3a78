"""Messages of retrieval, as `_messages` makes those of the others: requests that stand alone, and all answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.message import Message

from trilithon._message_fields import one_body
from trilithon._transport import Fields
from trilithon.api.v1 import openqa_pb2, retrieval_pb2

ENUMS: Mapping[str, Mapping[str, Any]] = {
    "mode": {
        "dense": retrieval_pb2.SearchRequest.MODE_DENSE,
        "bm25": retrieval_pb2.SearchRequest.MODE_BM25,
        "hybrid": retrieval_pb2.SearchRequest.MODE_HYBRID,
    },
    "role": {
        "query": retrieval_pb2.EncodeRequest.ROLE_QUERY,
        "passage": retrieval_pb2.EncodeRequest.ROLE_PASSAGE,
    },
    "backend": {
        "flat": retrieval_pb2.CreateIndexRequest.BACKEND_FLAT,
        "hnsw": retrieval_pb2.CreateIndexRequest.BACKEND_HNSW,
    },
    "reader": {
        "joint": openqa_pb2.AnswerRequest.READER_JOINT,
        "individual": openqa_pb2.AnswerRequest.READER_INDIVIDUAL,
        "span": openqa_pb2.AnswerRequest.READER_SPAN,
        "causal": openqa_pb2.AnswerRequest.READER_CAUSAL,
    },
}
"""Field -> its values by name."""


def _create_index(fields: Fields) -> Message:
    one_body("documents", fields.get("documents") or ())
    return retrieval_pb2.CreateIndexRequest(**numbered(fields))


REQUESTS: Mapping[str, Callable[[Fields], Message]] = {
    "create_index": _create_index,
    "get_index": lambda fields: retrieval_pb2.GetIndexRequest(**fields),
    "list_indexes": lambda fields: retrieval_pb2.ListIndexesRequest(**fields),
    "refresh_index": lambda fields: retrieval_pb2.RefreshIndexRequest(**fields),
    "delete_index": lambda fields: retrieval_pb2.GetIndexRequest(**fields),
}
RESPONSES: Mapping[str, type[Message]] = {
    "encode": retrieval_pb2.EncodeResponse,
    "search": retrieval_pb2.SearchResponse,
    "create_index": retrieval_pb2.Index,
    "get_index": retrieval_pb2.Index,
    "list_indexes": retrieval_pb2.ListIndexesResponse,
    "refresh_index": retrieval_pb2.Index,
    "delete_index": retrieval_pb2.DeleteIndexResponse,
    "answer_open": openqa_pb2.AnswerResponse,
}


def numbered(fields: Fields) -> dict[str, Any]:
    """
    The fields with the numbers of enums in place of names.

    Raises:
        ValueError: a name that is none.
    """
    found = dict(fields)
    for name, known in ENUMS.items():
        if (given := fields.get(name)) is not None:
            if given not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, not {given!r}")
            found[name] = known[given]
    return found
