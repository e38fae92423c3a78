"""
Client library and command for Trilithon servers.

    from trilithon import Client

    with Client("http://127.0.0.1:8000") as client:
        print(client.generate("Once upon a time", max_tokens=48, seed=7).text)

Importing it loads neither the HTTP nor the gRPC library: the first client does.
"""

from trilithon._async_client import AsyncClient, AsyncModels
from trilithon._client import Client, Models
from trilithon._parameters import (
    CallOptions,
    ChatOptions,
    Constraint,
    GenerationOptions,
    Message,
    ToolCall,
)
from trilithon._requests import PromptInput, ScoreItem
from trilithon._streams import AsyncStream, Stream
from trilithon._types import (
    Choice,
    Completion,
    Completions,
    Delta,
    Embedding,
    Embeddings,
    Finished,
    Health,
    ItemScore,
    Model,
    Rendered,
    Scores,
    Started,
    Texts,
    Timings,
    Token,
    Tokenization,
    Tokenized,
    Usage,
)
from trilithon._version import __version__
from trilithon.errors import (
    AlreadyExists,
    BodyTooLarge,
    Cancelled,
    Conflict,
    ConnectionFailed,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Overloaded,
    PermissionDenied,
    ProtocolError,
    RateLimited,
    TrilithonError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Violation,
)

__all__ = [
    "AlreadyExists",
    "AsyncClient",
    "AsyncModels",
    "AsyncStream",
    "BodyTooLarge",
    "CallOptions",
    "Cancelled",
    "ChatOptions",
    "Choice",
    "Client",
    "Completion",
    "Completions",
    "Conflict",
    "ConnectionFailed",
    "Constraint",
    "DataLoss",
    "DeadlineExceeded",
    "Delta",
    "Embedding",
    "Embeddings",
    "FailedPrecondition",
    "Finished",
    "GenerationOptions",
    "Health",
    "Internal",
    "InvalidArgument",
    "ItemScore",
    "Message",
    "Model",
    "Models",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "PromptInput",
    "ProtocolError",
    "RateLimited",
    "Rendered",
    "ScoreItem",
    "Scores",
    "Started",
    "Stream",
    "Texts",
    "Timings",
    "Token",
    "Tokenization",
    "Tokenized",
    "ToolCall",
    "TrilithonError",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Usage",
    "Violation",
    "__version__",
]
