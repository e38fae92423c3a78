"""
The one tree of errors, raised by the server's service layer and rebuilt by the client from what the wire said.

    TrilithonError
      InvalidArgument      400  INVALID_ARGUMENT      the request is wrong: fix it
      BodyTooLarge         413  RESOURCE_EXHAUSTED    send less
      Unauthenticated      401  UNAUTHENTICATED       no key, or not a known one
      PermissionDenied     403  PERMISSION_DENIED     the key lacks a scope
      NotFound             404  NOT_FOUND
      AlreadyExists        409  ALREADY_EXISTS
      FailedPrecondition   400  FAILED_PRECONDITION   right request, wrong moment or model
      Conflict             409  ABORTED               read again, then retry
      RateLimited          429  RESOURCE_EXHAUSTED    this key is too fast: retry later
      Overloaded           429  RESOURCE_EXHAUSTED    the queue is full: retry later
      Unavailable          503  UNAVAILABLE           loading, draining or lost: retry later
      DeadlineExceeded     504  DEADLINE_EXCEEDED
      Cancelled            499  CANCELLED
      Unimplemented        501  UNIMPLEMENTED
      DataLoss             500  DATA_LOSS
      Internal             500  INTERNAL              a bug of the server
      ConnectionFailed      -        -                client side: nothing answered
      ProtocolError         -        -                client side: the answer was not understood
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One broken rule of a request: which field, which rule, what was given."""

    field: str
    code: str
    message: str
    rule: str = ""
    limit: str = ""
    given: str = ""


class TrilithonError(Exception):
    """
    Base of every error that a Trilithon server or client raises on purpose.

    Args:
        message: one sentence: where, what rule, what was given, what to do.
        code: machine-readable reason, for example `context_length_exceeded`.
        hint: what to do, when that is not in the message.
        request_id: the request this belongs to, as in the `x-request-id` header.
        details: every broken rule, when the request was invalid.
        retry_after_s: seconds to wait before a retry can succeed; None when a retry is pointless or the time unknown.
    """

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "UNKNOWN"
    openai_type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str = "",
        request_id: str = "",
        details: Sequence[Violation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.hint = hint
        self.request_id = request_id
        self.details = tuple(details)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    @property
    def param(self) -> str | None:
        """The first field that broke a rule, if any."""
        return self.details[0].field if self.details else None


class InvalidArgument(TrilithonError):
    """The request breaks a rule; `details` names each."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    openai_type = "invalid_request_error"
    default_code = "invalid_argument"


class BodyTooLarge(TrilithonError):
    """The request is larger than the server reads."""

    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"
    openai_type = "invalid_request_error"
    default_code = "body_too_large"


class Unauthenticated(TrilithonError):
    """No key was given, or one that the server does not know."""

    http_status = 401
    grpc_status = "UNAUTHENTICATED"
    openai_type = "authentication_error"
    default_code = "invalid_api_key"


class PermissionDenied(TrilithonError):
    """The key is known and lacks the scope that this call needs."""

    http_status = 403
    grpc_status = "PERMISSION_DENIED"
    openai_type = "permission_error"
    default_code = "admin_scope_required"


class NotFound(TrilithonError):
    """No model, route or object of that name is visible to this key."""

    http_status = 404
    grpc_status = "NOT_FOUND"
    openai_type = "invalid_request_error"
    default_code = "not_found"


class AlreadyExists(TrilithonError):
    """The name is taken."""

    http_status = 409
    grpc_status = "ALREADY_EXISTS"
    openai_type = "conflict"
    default_code = "name_taken"


class FailedPrecondition(TrilithonError):
    """The request is well formed and cannot be done in this state."""

    http_status = 400
    grpc_status = "FAILED_PRECONDITION"
    openai_type = "invalid_request_error"
    default_code = "failed_precondition"


class Conflict(TrilithonError):
    """Somebody changed the object in between."""

    http_status = 409
    grpc_status = "ABORTED"
    openai_type = "conflict"
    default_code = "version_conflict"
    retryable = True


class RateLimited(TrilithonError):
    """This key has used up its rate."""

    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    openai_type = "rate_limit_error"
    default_code = "rate_limit_exceeded"
    retryable = True


class Overloaded(TrilithonError):
    """The bounded queue is full."""

    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    openai_type = "rate_limit_error"
    default_code = "queue_full"
    retryable = True


class Unavailable(TrilithonError):
    """The server is loading, draining, shutting down, or lost its engine."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    openai_type = "server_error"
    default_code = "engine_lost"
    retryable = True


class DeadlineExceeded(TrilithonError):
    """The time limit passed before there was anything to return."""

    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"
    openai_type = "timeout"
    default_code = "timeout"
    retryable = True


class Cancelled(TrilithonError):
    """The client left, or the request was aborted."""

    http_status = 499
    grpc_status = "CANCELLED"
    openai_type = "invalid_request_error"
    default_code = "request_cancelled"


class Unimplemented(TrilithonError):
    """The server does not offer this."""

    http_status = 501
    grpc_status = "UNIMPLEMENTED"
    openai_type = "invalid_request_error"
    default_code = "not_implemented"


class DataLoss(TrilithonError):
    """Stored data failed its checksum."""

    http_status = 500
    grpc_status = "DATA_LOSS"
    default_code = "checkpoint_corrupt"


class Internal(TrilithonError):
    """A bug of the server; the request id leads to its log line."""

    http_status = 500
    grpc_status = "INTERNAL"


class ConnectionFailed(TrilithonError):
    """Nothing answered at the server's address."""

    default_code = "connection_failed"
    retryable = True


class ProtocolError(TrilithonError):
    """Something answered, and not in the protocol that was expected."""

    default_code = "protocol_error"


SERVER_ERRORS: tuple[type[TrilithonError], ...] = (
    InvalidArgument,
    BodyTooLarge,
    Unauthenticated,
    PermissionDenied,
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    Conflict,
    RateLimited,
    Overloaded,
    Unavailable,
    DeadlineExceeded,
    Cancelled,
    Unimplemented,
    DataLoss,
    Internal,
)
"""Every error that can cross the wire, in the order of the table above."""
