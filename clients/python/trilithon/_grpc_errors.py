"""From a gRPC status and its rich details to the error classes."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from trilithon._transport import AttemptFailed
from trilithon._wire_errors import class_for_grpc, timed_out, unreachable
from trilithon.errors import BodyTooLarge, TrilithonError, Violation

DETAILS_KEY = "grpc-status-details-bin"
_RETRIED = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"})


def from_grpc(status: str, details: str, rich: bytes | None, *, url: str, timeout_s: float) -> AttemptFailed:
    """
    The failure that an RPC's end means.

    Args:
        status: the status code's name, for example UNAVAILABLE.
        details: its message.
        rich: the value of `grpc-status-details-bin` in the trailing metadata, when there is one.
        url: the server's address, for messages.
        timeout_s: what the attempt had.
    """
    if rich is None:
        if status == "DEADLINE_EXCEEDED":
            return timed_out(timeout_s)
        if status == "UNAVAILABLE":
            return unreachable(url, details)
    error = _described(status, details, rich or b"")
    retry = status in _RETRIED and not isinstance(error, BodyTooLarge)
    if rich is not None and status == "UNAVAILABLE":
        retry = error.retry_after_s is not None  # our servers add RetryInfo when another try can succeed
    return AttemptFailed(error, retry=retry)


def _described(status: str, message: str, rich: bytes) -> TrilithonError:
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    request = error_details_pb2.RequestInfo()
    try:
        parsed = status_pb2.Status.FromString(rich)
        for packed in parsed.details:
            for kind in (info, bad, retry, request):
                if packed.Is(kind.DESCRIPTOR):
                    packed.Unpack(kind)
    except DecodeError:
        pass  # the plain status still says the most
    code = info.reason.lower()
    if not code and status == "RESOURCE_EXHAUSTED" and "larger than max" in message:
        code = "body_too_large"  # said by the gRPC library itself, before any handler
    wait_s = retry.retry_delay.seconds + retry.retry_delay.nanos * 1e-9
    return class_for_grpc(status, code)(
        message or f"The call ended with {status}.",
        code=code or None,
        hint=info.metadata.get("hint", ""),
        request_id=request.request_id or info.metadata.get("request_id", ""),
        details=[_violation(violation) for violation in bad.field_violations],
        retry_after_s=wait_s if retry.HasField("retry_delay") else None,
    )


def _violation(violation: error_details_pb2.BadRequest.FieldViolation) -> Violation:
    # `reason` came to the message later than the oldest common protos that we support.
    reason: str = getattr(violation, "reason", "")
    return Violation(field=violation.field, code=reason.lower(), message=violation.description)
