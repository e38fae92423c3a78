"""
The one mapping from the errors of `trilithon.errors` to each protocol, for the HTTP endpoint and the gRPC interceptor.

What leaves the server holds a code, a sentence and the request's id: never a path, a traceback or another tenant's
data (bar S7). An exception that is not in the tree is a bug; it goes out as `internal_error` with the id alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from trilithon.errors import Internal, InvalidArgument, NotFound, Overloaded, RateLimited, TrilithonError, Unavailable

DOMAIN = "trilithon"
"""`ErrorInfo.domain` of every error."""

Header = tuple[bytes, bytes]
Headers = list[Header]

MAX_RETRY_AFTER_S = 30


def as_error(error: BaseException, request_id: str) -> TrilithonError:
    """The error as clients may see it: itself when it is ours, else an opaque `Internal`."""
    if isinstance(error, TrilithonError):
        error.request_id = error.request_id or request_id
        return error
    return Internal(
        f"the server failed to answer this request. Its log has the cause under {request_id}.", request_id=request_id
    )


def draining(request_id: str = "") -> Unavailable:
    """The server is on its way down: what it is at goes on, new work is refused."""
    message = "the server is draining and takes no new requests."
    return Unavailable(message, code="draining", request_id=request_id, retry_after_s=5.0)


def error_body(error: TrilithonError) -> dict[str, Any]:
    """The one body of every HTTP error, and of the error event of a stream."""
    return {
        "error": {
            "message": str(error),
            "type": error.openai_type,
            "param": error.param,
            "code": error.code,
            "status": error.grpc_status,
            "request_id": error.request_id,
            "details": [
                {
                    "field": item.field,
                    "code": item.code,
                    "rule": item.rule,
                    "limit": item.limit,
                    "given": item.given,
                    "message": item.message,
                }
                for item in error.details
            ],
        }
    }


def http_error(error: TrilithonError) -> tuple[int, Headers, bytes]:
    """Status, extra headers and JSON body of an error."""
    headers: Headers = []
    if error.http_status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="trilithon"'))
    if error.retry_after_s is not None:
        wait_s = min(MAX_RETRY_AFTER_S, max(1, math.ceil(error.retry_after_s)))
        headers.append((b"retry-after", str(wait_s).encode()))
        headers.append(
            (b"retry-after-ms", str(min(MAX_RETRY_AFTER_S * 1000, int(error.retry_after_s * 1000))).encode())
        )
    headers.append((b"x-should-retry", b"true" if may_retry(error) else b"false"))
    return error.http_status, headers, json.dumps(error_body(error)).encode()


def may_retry(error: TrilithonError) -> bool:
    """Whether sending the same request again can succeed."""
    if isinstance(error, Unavailable):
        return error.retry_after_s is not None
    return error.retryable and error.http_status != 409


def rpc_status(error: TrilithonError) -> tuple[grpc.StatusCode, str, bytes]:
    """Status code, message and the serialised `google.rpc.Status` for `grpc-status-details-bin`."""
    code = grpc.StatusCode[error.grpc_status]
    info = error_details_pb2.ErrorInfo(reason=error.code.upper(), domain=DOMAIN, metadata=_metadata(error))
    details: list[Message] = [info]
    if isinstance(error, InvalidArgument) and error.details:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(
                field=item.field, description=item.message, reason=item.code.upper()
            )
            for item in error.details
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if error.retry_after_s is not None and may_retry(error):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(max(1, int(error.retry_after_s * 1000)))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, RateLimited | Overloaded):
        violation = error_details_pb2.QuotaFailure.Violation(subject=error.code, description=error.message)
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    if isinstance(error, NotFound):
        details.append(error_details_pb2.ResourceInfo(resource_type=error.code.removesuffix("_not_found")))
    if error.request_id:
        details.append(error_details_pb2.RequestInfo(request_id=error.request_id))
    packed = []
    for detail in details:
        item = any_pb2.Any()
        item.Pack(detail)
        packed.append(item)
    text = str(error)
    status = status_pb2.Status(code=code_pb2.Code.Value(error.grpc_status), message=text, details=packed)
    return code, text, status.SerializeToString()


def _metadata(error: TrilithonError) -> Mapping[str, str]:
    first = error.details[0] if error.details else None
    return {"field": first.field} if first is not None else {}
