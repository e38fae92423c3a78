"""From what the wire said to the error classes: the inverse of the server's two mappings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trilithon._transport import AttemptFailed
from trilithon.errors import (
    SERVER_ERRORS,
    BodyTooLarge,
    ConnectionFailed,
    DeadlineExceeded,
    Internal,
    NotFound,
    Overloaded,
    ProtocolError,
    RateLimited,
    TrilithonError,
    Unavailable,
    Unimplemented,
    Violation,
)

RETRY_STATUSES = frozenset({408, 429, 502, 503, 504})

_SHARED_STATUS: Mapping[tuple[int, str], str] = {
    # Classes that share an HTTP status are told apart by `type`, then by code.
    (400, "template_mismatch"): "FAILED_PRECONDITION",
    (400, "job_not_running"): "FAILED_PRECONDITION",
    (400, "constraint_dead_end"): "FAILED_PRECONDITION",
    (400, "failed_precondition"): "FAILED_PRECONDITION",
    (400, "job_finished"): "FAILED_PRECONDITION",
    (400, "job_cancelling"): "FAILED_PRECONDITION",
    (400, "job_not_succeeded"): "FAILED_PRECONDITION",
    (400, "format_unavailable"): "FAILED_PRECONDITION",
    (400, "not_servable"): "FAILED_PRECONDITION",
    (400, "result_gone"): "FAILED_PRECONDITION",
    (400, "model_load_failed"): "FAILED_PRECONDITION",
    (400, "adapter_load_failed"): "FAILED_PRECONDITION",
    (400, "adapters_unsupported"): "FAILED_PRECONDITION",
    (400, "base_mismatch"): "FAILED_PRECONDITION",
    (400, "no_catalog"): "FAILED_PRECONDITION",
    (400, "concepts_missing"): "FAILED_PRECONDITION",
    (400, "files_missing"): "FAILED_PRECONDITION",
    (400, "index_building"): "FAILED_PRECONDITION",
    (400, "index_encoder"): "FAILED_PRECONDITION",
    (400, "index_unsupported"): "FAILED_PRECONDITION",
    (400, "index_version"): "FAILED_PRECONDITION",
    (400, "store_full"): "FAILED_PRECONDITION",
    (400, "store_missing"): "FAILED_PRECONDITION",
    (400, "task_invalid"): "FAILED_PRECONDITION",
    (400, "task_tokenizer"): "FAILED_PRECONDITION",
    (409, "name_taken"): "ALREADY_EXISTS",
    (500, "checkpoint_corrupt"): "DATA_LOSS",
    (500, "index_corrupt"): "DATA_LOSS",
    (500, "stored_corrupt"): "DATA_LOSS",
}
_FIRST_OF_STATUS: Mapping[int, type[TrilithonError]] = {
    **{error.http_status: error for error in reversed(SERVER_ERRORS)},
    405: Unimplemented,
    408: DeadlineExceeded,
    409: next(error for error in SERVER_ERRORS if error.grpc_status == "ABORTED"),
    500: Internal,
    502: Unavailable,
}
_BY_GRPC: Mapping[str, type[TrilithonError]] = {error.grpc_status: error for error in reversed(SERVER_ERRORS)}
_EXHAUSTED: Mapping[str, type[TrilithonError]] = {
    **{error.default_code: error for error in (BodyTooLarge, RateLimited, Overloaded)},
    **dict.fromkeys(("metadata_too_large", "headers_too_large"), BodyTooLarge),
    **dict.fromkeys(
        ("quota_exceeded", "too_many_streams", "too_many_checks", "too_many_connections", "hosting_full"), Overloaded
    ),
}


def class_for_http(status: int, code: str) -> type[TrilithonError]:
    """
    The class of an HTTP answer.

    >>> class_for_http(429, "rate_limit_exceeded").__name__, class_for_http(429, "queue_full").__name__
    ('RateLimited', 'Overloaded')
    """
    if status == 429:
        return _EXHAUSTED.get(code, RateLimited)
    if (status, code) in _SHARED_STATUS:
        return _BY_GRPC[_SHARED_STATUS[status, code]]
    if status in _FIRST_OF_STATUS:
        return _FIRST_OF_STATUS[status]
    return _FIRST_OF_STATUS[400] if 400 <= status < 500 else Internal


def class_for_grpc(status: str, code: str) -> type[TrilithonError]:
    """
    The class of a gRPC status.

    >>> class_for_grpc("RESOURCE_EXHAUSTED", "body_too_large").__name__
    'BodyTooLarge'
    """
    if status == "RESOURCE_EXHAUSTED":
        return _EXHAUSTED.get(code, Overloaded)
    return _BY_GRPC.get(status, TrilithonError)


def from_http(status: int, headers: Mapping[str, str], body: bytes) -> AttemptFailed:
    """The failure that an HTTP answer with an error status means. `headers` must be looked up in small letters."""
    described = _error_object(body)
    if described is None:
        # Not our server's doing: a proxy, a gateway, another program on the port.
        kind = class_for_http(status, "")
        first = body[:200].decode("utf-8", "replace").strip().splitlines()
        message = f"The server answered HTTP {status} without a description" + (f": {first[0]!r}." if first else ".")
        error = kind(message, request_id=headers.get("x-request-id", ""), retry_after_s=retry_after_s(headers))
    else:
        error = error_from_object(described, status=status)
        error.retry_after_s = retry_after_s(headers)
        error.request_id = error.request_id or headers.get("x-request-id", "")
    asked = headers.get("x-should-retry", "").lower()
    retry = {"true": True, "false": False}.get(asked, status in RETRY_STATUSES)
    return AttemptFailed(error, retry=retry)


def from_event(data: Mapping[str, Any]) -> AttemptFailed:
    """The failure that an error event inside a stream means; whether a retry makes sense is up to its class."""
    described = data.get("error")
    if not isinstance(described, Mapping):
        return AttemptFailed(ProtocolError("The stream's error event holds no `error` object."), retry=False)
    error = error_from_object(described, status=None)
    return AttemptFailed(error, retry=error.retryable)


def error_from_object(described: Mapping[str, Any], *, status: int | None) -> TrilithonError:
    """The error of a body's `error` object; without a status its class follows from its code and type."""
    code = _text(described.get("code"))
    kind = class_for_http(status, code) if status is not None else _class_without_status(code, described)
    details = [
        Violation(**{name: _text(detail.get(name)) for name in ("field", "code", "message", "rule", "limit", "given")})
        for detail in _objects(described.get("details"))
    ]
    return kind(
        _text(described.get("message")) or "The server gave no message.",
        code=code or None,
        hint=_text(described.get("hint")),
        request_id=_text(described.get("request_id")),
        details=details,
    )


def _class_without_status(code: str, described: Mapping[str, Any]) -> type[TrilithonError]:
    for error in SERVER_ERRORS:
        if error.default_code == code:
            return error
    if code in _UNAVAILABLE_CODES:
        return Unavailable
    if code.endswith("_not_found"):
        return NotFound
    if code == "queue_timeout":
        return DeadlineExceeded
    shared = {known: _BY_GRPC[grpc] for (_, known), grpc in _SHARED_STATUS.items()}
    if code in shared:
        return shared[code]
    openai_type = described.get("type")
    return next((error for error in SERVER_ERRORS if error.openai_type == openai_type), Internal)


_UNAVAILABLE_CODES = frozenset({"loading", "draining", "server_shutting_down", "engine_lost"})


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """
    Seconds that the server asks to wait: `retry-after-ms`, else `retry-after` in seconds.

    >>> retry_after_s({"retry-after-ms": "250", "retry-after": "1"})
    0.25
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            value = float(headers.get(name, "")) * unit
        except ValueError:
            continue  # absent, or an HTTP date, which our servers never send
        if 0 <= value < float("inf"):
            return value
    return None


def unreachable(url: str, reason: str) -> AttemptFailed:
    """Nothing answered at the address: worth another try."""
    message = f"Nothing answered at {url}. Given: {reason}. Check the address and that the server runs."
    return AttemptFailed(ConnectionFailed(message), retry=True)


def cut_off(url: str, reason: str) -> AttemptFailed:
    """The connection ended before the answer did; the work may have been done, so it is not tried again."""
    message = f"The connection to {url} ended before the answer did. Given: {reason}."
    return AttemptFailed(ConnectionFailed(message, code="connection_lost"), retry=False)


def timed_out(timeout_s: float) -> AttemptFailed:
    """The total is used up."""
    error = DeadlineExceeded(f"No answer within the {timeout_s:.3g} s left of `timeout`.", code="timeout")
    return AttemptFailed(error, retry=False)


def not_understood(what: str, given: bytes | str) -> AttemptFailed:
    """The bytes are not what the contract says."""
    error = ProtocolError(f"The server's answer is not {what}. Given: {given[:64]!r}.")
    return AttemptFailed(error, retry=False)


def _error_object(body: bytes) -> Mapping[str, Any] | None:
    try:
        parsed = json.loads(body)
    except ValueError:
        return None
    described = parsed.get("error") if isinstance(parsed, dict) else None
    return described if isinstance(described, dict) else None


def _objects(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(value: object) -> str:
    return "" if value is None else str(value)
