"""
The interceptor around every RPC: key, request id, deadline, limits, and the one mapping of errors to status codes.

It reads the bytes of a request itself, so that malformed ones are the sender's INVALID_ARGUMENT and not INTERNAL.
"""

from __future__ import annotations

import contextvars
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from trilithon.errors import BodyTooLarge, InvalidArgument, TrilithonError
from trilithon_server.auth import PUBLIC_SERVICES
from trilithon_server.errors import as_error, rpc_status
from trilithon_server.served import Call, request_id
from trilithon_server.service import Service

_log = logging.getLogger(__name__)

_CALL: contextvars.ContextVar[Call] = contextvars.ContextVar("call")

ADMIN_SERVICE = "trilithon.api.v1.AdminService"
ADMIN_METHODS = frozenset(
    f"/trilithon.api.v1.ModelsService/{name}" for name in ("LoadAdapter", "UnloadAdapter", "SetAlias", "DeleteAlias")
)
"""Methods outside of that service which need the same scope."""

_UNCOUNTED = ("grpc.reflection.", ADMIN_SERVICE, "trilithon.api.v1.ModelsService")
"""Services whose calls hold no place of the key's requests."""

UNCOUNTED_METHODS = frozenset(
    f"/trilithon.api.v1.RetrieverService/{name}" for name in ("GetIndex", "ListIndexes", "DeleteIndex")
)
"""Methods outside of those services that hold none either, as over HTTP."""

_MAX_DEADLINE_S = 365 * 86400.0  # "no deadline" arrives as a very long one from some clients


def current_call() -> Call:
    """The call that the running servicer answers."""
    return _CALL.get()


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs, not at run time
    """
    Args:
        service: whose keys and limits count.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Wrap the handler of one method; unknown methods stay UNIMPLEMENTED."""
        handler = await continuation(details)
        service_name = details.method.lstrip("/").partition("/")[0]
        if handler is None or service_name in PUBLIC_SERVICES:
            return handler
        frame = _Frame(self._service, details.method, service_name, dict(details.invocation_metadata or ()))
        if handler.stream_stream is not None:
            inner = handler.stream_stream

            async def stream_stream(requests: Any, context: Any) -> AsyncIterator[Any]:
                async with frame.rpc(None, None, context):
                    async for item in inner(requests, context):
                        yield item

            return grpc.stream_stream_rpc_method_handler(
                stream_stream, handler.request_deserializer, handler.response_serializer
            )
        decode = handler.request_deserializer
        if handler.unary_stream is not None:
            inner = handler.unary_stream

            async def unary_stream(raw: bytes, context: Any) -> AsyncIterator[Any]:
                async with frame.rpc(raw, decode, context) as request, aclosing(inner(request, context)) as items:
                    async for item in items:
                        yield item

            return grpc.unary_stream_rpc_method_handler(unary_stream, None, handler.response_serializer)
        if handler.stream_unary is not None:
            inner = handler.stream_unary

            async def stream_unary(raws: AsyncIterator[bytes], context: Any) -> Any:
                async with frame.rpc(None, None, context):
                    return await inner(_decoded(raws, decode), context)

            return grpc.stream_unary_rpc_method_handler(stream_unary, None, handler.response_serializer)
        inner = handler.unary_unary

        async def unary_unary(raw: bytes, context: Any) -> Any:
            async with frame.rpc(raw, decode, context) as request:
                return await inner(request, context)

        return grpc.unary_unary_rpc_method_handler(unary_unary, None, handler.response_serializer)


async def _decoded(raws: AsyncIterator[bytes], decode: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    """The messages of a client's stream."""
    async for raw in raws:
        yield _message(raw, decode)


def _message(raw: bytes, decode: Callable[[bytes], Any]) -> Any:
    try:
        return decode(raw)
    except (DecodeError, ValueError):
        raise InvalidArgument(
            "the request is not the protobuf message of this method.", code="invalid_message"
        ) from None


class _Frame:
    """What one method's calls share, and the context manager around each."""

    def __init__(self, service: Service, method: str, service_name: str, metadata: dict[str, Any]) -> None:
        self._service = service
        self._method = method
        self._scope = "admin" if service_name == ADMIN_SERVICE or method in ADMIN_METHODS else "user"
        self._counted = not service_name.startswith(_UNCOUNTED) and method not in UNCOUNTED_METHODS
        self._metadata = metadata

    def rpc(self, raw: bytes | None, decode: Callable[[bytes], Any] | None, context: Any) -> _Rpc:
        return _Rpc(self, raw, decode, context)

    @contextmanager
    def call(self, request_name: str, remaining_s: float | None) -> Iterator[Call]:
        deadline_s = None
        if remaining_s is not None and remaining_s < _MAX_DEADLINE_S:
            deadline_s = time.monotonic() + remaining_s
        with self._service.call(
            route=self._method,
            request_id=request_name,
            scope=self._scope,
            authorization=self._text("authorization"),
            api_key=self._text("x-api-key"),
            traceparent=self._text("traceparent"),
            deadline_s=deadline_s,
            count=self._counted,
        ) as call:
            yield call

    def authenticate(self) -> None:
        self._service.keys.authenticate(self._text("authorization"), self._text("x-api-key"))

    def header_id(self) -> str | None:
        return self._text("x-request-id")

    def check_metadata(self) -> None:
        most = self._service.limits.max_metadata_bytes
        size = sum(len(key) + len(value) for key, value in self._metadata.items())
        if size > most:
            raise BodyTooLarge(f"metadata may have at most {most} bytes. Given: {size}.", code="metadata_too_large")

    def _text(self, name: str) -> str | None:
        value = self._metadata.get(name)
        return value if isinstance(value, str) else None


class _Rpc:
    """One call: entering authenticates and decodes, leaving turns an error into its status."""

    def __init__(self, frame: _Frame, raw: bytes | None, decode: Callable[[bytes], Any] | None, context: Any) -> None:
        self._frame = frame
        self._raw = raw
        self._decode = decode
        self._context = context
        self._id = request_id(frame.header_id())
        self._call: Any = None

    async def __aenter__(self) -> Any:
        try:
            return await self._enter()
        except Exception as error:
            await self._abort(error)

    async def _enter(self) -> Any:
        request, broken = self._read()
        self._call = self._frame.call(self._id, self._context.time_remaining())
        call = self._call.__enter__()
        try:
            self._frame.check_metadata()
            if broken is not None:
                raise broken
            await self._context.send_initial_metadata((("x-request-id", self._id),))
        except BaseException as error:
            self._leave(error)
            raise
        _CALL.set(call)
        return request

    def _read(self) -> tuple[Any, TrilithonError | None]:
        """The request, once the key is known to be good; a bad key is told by the frame, which counts it."""
        try:
            self._frame.authenticate()
        except TrilithonError:
            return None, None
        if self._raw is None or self._decode is None:
            return None, None
        try:
            request = _message(self._raw, self._decode)
        except InvalidArgument as error:
            return None, error
        meta = getattr(request, "meta", None)
        given = getattr(meta, "request_id", "")
        if given:
            self._id = request_id(given)
            if self._id != given:
                message = "`meta.request_id` must match [A-Za-z0-9._-]{1,128}. Leave it out to have one made."
                return request, InvalidArgument(message, code="invalid_value")
        return request, None

    def _leave(self, error: BaseException | None) -> None:
        frame, self._call = self._call, None
        if frame is not None:
            frame.__exit__(type(error) if error is not None else None, error, error.__traceback__ if error else None)

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._leave(error)  # which lets `error` pass in silence, as contextlib does with what it was given
        except Exception as left:
            error = left
        if isinstance(error, Exception):
            await self._abort(error)

    async def _abort(self, error: Exception) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if not isinstance(error, TrilithonError):
            _log.error("internal_error", extra={"request_id": self._id}, exc_info=error)
        code, text, details = rpc_status(as_error(error, self._id))
        trailing = (("grpc-status-details-bin", details), ("x-request-id", self._id))
        await self._context.abort(code, text, trailing_metadata=trailing)
