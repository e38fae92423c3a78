"""Operations over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import grpc
import grpc.aio
from google.protobuf.message import Message

from trilithon._grpc_errors import DETAILS_KEY, from_grpc
from trilithon._job_messages import upload_messages
from trilithon._messages import EVENTS, RESPONSES, message_fields, request_message
from trilithon._transport import GENERATE, Attempt, AttemptFailed, Event, Fields, Operation, Settings
from trilithon._version import __version__
from trilithon._wire_errors import not_understood
from trilithon.api.v1 import finetune_pb2

MAX_ANSWER_BYTES = 16 * 2**20
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
    ("grpc.primary_user_agent", f"trilithon-python/{__version__}"),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.enable_retries", 0),  # ours obey the server's hints and end at the first streamed byte
    # The library's own back-off grows to two minutes, in which every call of ours would fail unsent. Its "min" is how
    # long one attempt may take to connect: a refused one doesn't wait for it, one to a busy server needs it.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class GrpcTransport:
    """gRPC from threads: one channel."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        credentials = _credentials(settings)
        self._channel = (
            grpc.insecure_channel(settings.target, options=_OPTIONS)
            if credentials is None
            else grpc.secure_channel(settings.target, credentials, options=_OPTIONS)
        )

    def call(self, operation: Operation, fields: Fields, attempt: Attempt) -> Mapping[str, Any]:
        """One attempt; the answer, JSON-shaped."""
        request, serialize, deserialize = _codec(operation, fields)
        method = self._channel.unary_unary(f"/{operation.rpc}", serialize, deserialize)
        metadata = tuple(self._settings.metadata(attempt).items())
        try:
            response = method(request, timeout=attempt.timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise _failed(error, self._settings, attempt) from None
        return _answer(operation, response)

    def stream(self, fields: Fields, attempt: Attempt, operation: Operation = GENERATE) -> GrpcEvents:
        """One attempt at a stream; whether it was accepted shows with the first event."""
        path, answer = _stream_of(operation)
        request = request_message(operation.name, fields)
        method = self._channel.unary_stream(path, type(request).SerializeToString, answer.FromString)
        metadata = tuple(self._settings.metadata(attempt).items())
        return GrpcEvents(method(request, timeout=attempt.timeout_s, metadata=metadata), self._settings, attempt)

    def upload(self, operation: Operation, fields: Fields, stream: BinaryIO, attempt: Attempt) -> Mapping[str, Any]:
        """One attempt at an upload, in chunks."""
        serialize = finetune_pb2.UploadFileRequest.SerializeToString
        method = self._channel.stream_unary(f"/{operation.rpc}", serialize, RESPONSES[operation.name].FromString)
        metadata = tuple(self._settings.metadata(attempt).items())
        try:
            response = method(upload_messages(fields, stream), timeout=attempt.timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise _failed(error, self._settings, attempt) from None
        return _answer(operation, response)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


class GrpcEvents:
    """Events of one call; closing it cancels the call, which ends the request."""

    def __init__(self, call: Any, settings: Settings, attempt: Attempt) -> None:
        self._call = call
        self._settings = settings
        self._attempt = attempt

    def __iter__(self) -> Iterator[Event]:
        try:
            for message in self._call:
                yield _event(message)
        except grpc.RpcError as error:
            raise _failed(error, self._settings, self._attempt) from None

    def close(self) -> None:
        """End the request."""
        self._call.cancel()


class AsyncGrpcTransport:
    """gRPC from an event loop: one channel."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        credentials = _credentials(settings)
        self._channel = (
            grpc.aio.insecure_channel(settings.target, options=_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(settings.target, credentials, options=_OPTIONS)
        )

    async def call(self, operation: Operation, fields: Fields, attempt: Attempt) -> Mapping[str, Any]:
        """One attempt; the answer, JSON-shaped."""
        request, serialize, deserialize = _codec(operation, fields)
        method = self._channel.unary_unary(f"/{operation.rpc}", serialize, deserialize)
        metadata = tuple(self._settings.metadata(attempt).items())
        try:
            response = await method(request, timeout=attempt.timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise _failed(error, self._settings, attempt) from None
        return _answer(operation, response)

    async def stream(self, fields: Fields, attempt: Attempt, operation: Operation = GENERATE) -> AsyncGrpcEvents:
        """One attempt at a stream; whether it was accepted shows with the first event."""
        path, answer = _stream_of(operation)
        request = request_message(operation.name, fields)
        method = self._channel.unary_stream(path, type(request).SerializeToString, answer.FromString)
        metadata = tuple(self._settings.metadata(attempt).items())
        return AsyncGrpcEvents(method(request, timeout=attempt.timeout_s, metadata=metadata), self._settings, attempt)

    async def upload(
        self, operation: Operation, fields: Fields, stream: BinaryIO, attempt: Attempt
    ) -> Mapping[str, Any]:
        """One attempt at an upload, in chunks."""
        serialize = finetune_pb2.UploadFileRequest.SerializeToString
        method = self._channel.stream_unary(f"/{operation.rpc}", serialize, RESPONSES[operation.name].FromString)
        metadata = tuple(self._settings.metadata(attempt).items())
        try:
            response = await method(upload_messages(fields, stream), timeout=attempt.timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise _failed(error, self._settings, attempt) from None
        return _answer(operation, response)

    async def aclose(self) -> None:
        """Close the channel."""
        await self._channel.close(grace=None)


class AsyncGrpcEvents:
    """Events of one call; closing it cancels the call, which ends the request."""

    def __init__(self, call: Any, settings: Settings, attempt: Attempt) -> None:
        self._call = call
        self._settings = settings
        self._attempt = attempt

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            async for message in self._call:
                yield _event(message)
        except grpc.RpcError as error:
            raise _failed(error, self._settings, self._attempt) from None

    async def aclose(self) -> None:
        """End the request."""
        self._call.cancel()


# What both share --------------------------------------------------------------------------------------------


def _codec(operation: Operation, fields: Fields) -> tuple[Any, Callable[[Any], bytes], Callable[[bytes], Any]]:
    if operation.name == "health":
        # grpc.health.v1 comes with a package that the base install does without; its request for the whole server is
        # empty and its answer one enum.
        return b"", bytes, bytes
    request = request_message(operation.name, fields)
    return request, type(request).SerializeToString, RESPONSES[operation.name].FromString


def _answer(operation: Operation, response: Any) -> Mapping[str, Any]:
    if operation.name != "health":
        return message_fields(response)
    statuses = {b"": "unknown", b"\x08\x01": "serving", b"\x08\x02": "not_serving", b"\x08\x03": "service_unknown"}
    status = statuses.get(response)
    if status is None:
        raise not_understood("a grpc.health.v1 answer", response)
    return {"ready": status == "serving", "status": status}


def _stream_of(operation: Operation) -> tuple[str, type[Any]]:
    """The method that streams an operation, and its message."""
    return f"/{operation.stream_rpc or operation.rpc}", EVENTS.get(operation.name, RESPONSES[operation.name])


def _event(message: Any) -> Event:
    """An event, by the name of what it holds where it may hold one of several things."""
    if "event" not in message.DESCRIPTOR.oneofs_by_name:
        return "", message_fields(message)
    name = message.WhichOneof("event")
    if name is None:
        return "", {}
    held = getattr(message, name)
    return name, message_fields(held) if isinstance(held, Message) else {name: held}


def _failed(error: Any, settings: Settings, attempt: Attempt) -> AttemptFailed:
    trailing = error.trailing_metadata() or ()
    rich = next((value for key, value in trailing if key == DETAILS_KEY), None)
    return from_grpc(error.code().name, error.details() or "", rich, url=settings.url, timeout_s=attempt.timeout_s)


def _credentials(settings: Settings) -> grpc.ChannelCredentials | None:
    if not settings.tls:
        return None
    return grpc.ssl_channel_credentials(
        root_certificates=_read(settings.tls_ca),
        private_key=_read(settings.tls_key),
        certificate_chain=_read(settings.tls_cert),
    )


def _read(path: str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
