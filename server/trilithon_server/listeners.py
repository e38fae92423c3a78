"""The HTTP listeners: uvicorn, run inside the front's loop, with our limits and TLS that reloads itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from trilithon.errors import Overloaded
from trilithon_server.config import LimitsConfig, ServeConfig, ServerConfig
from trilithon_server.errors import http_error
from trilithon_server.served import request_id

Asgi = Callable[[Any, Any, Any], Awaitable[None]]

TLS_CHECK_S = 2.0
_BACKLOG = 1024

_log = logging.getLogger(__name__)


class ListenError(OSError):
    """An address that can't be bound; the message is one sentence."""


class HttpListener:
    """A running HTTP server on its sockets."""

    def __init__(self, server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        self._server = server
        self._sockets = sockets
        self._task = asyncio.create_task(server.serve(sockets=sockets), name="http")
        self._tls: asyncio.Task[None] | None = None

    async def started(self) -> None:
        """Return once it accepts connections."""
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise ListenError("the HTTP server ended while it started")
            await asyncio.sleep(0.01)

    def reload_tls(self, context: ssl.SSLContext, config: ServerConfig) -> None:
        """Follow the certificate's files from now on."""
        self._tls = asyncio.create_task(_follow_certificate(context, config), name="tls-reload")

    async def stop(self, *, grace_s: float) -> None:
        """Stop accepting, give running answers `grace_s` seconds, then cut them."""
        self._server.config.timeout_graceful_shutdown = max(1, round(grace_s))
        self._server.should_exit = True
        if self._tls is not None:
            self._tls.cancel()
        await asyncio.wait([self._task], timeout=grace_s + 1.0)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        for listener in self._sockets:
            listener.close()


async def serve_http(app: Asgi, *, config: ServeConfig, on_rejected: Callable[[str], None]) -> HttpListener:
    """
    Serve `app` on `server.host:http_port`, and on the Unix socket `server.uds` if there is one.

    `on_rejected` is told the reason of each request that is refused here.

    Raises:
        ListenError: an address is taken or not ours.
    """
    server = config.server
    sockets = [bind_tcp(server.host, server.http_port, field="http_port")]
    if server.uds is not None:
        sockets.append(bind_unix(Path(server.uds)))
    return await _serve(app, sockets, config, on_rejected=on_rejected)


async def serve_metrics(render: Callable[[], bytes], *, content_type: str, config: ServeConfig) -> HttpListener | None:
    """
    Serve `/metrics` alone, without a key, on `server.metrics_port`; None when that is unset.

    Args:
        render: makes the text of a scrape.
        content_type: of that text.
    Raises:
        ListenError: the address is taken or not ours.
    """
    server = config.server
    if server.metrics_port is None:
        return None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found = scope["method"] == "GET" and scope["path"] == "/metrics"
        headers = [(b"content-type", content_type.encode() if found else b"text/plain")]
        await send({"type": "http.response.start", "status": 200 if found else 404, "headers": headers})
        await send({"type": "http.response.body", "body": render() if found else b"only GET /metrics is here\n"})

    return await _serve(app, [bind_tcp(server.host, server.metrics_port, field="metrics_port")], config)


async def _serve(
    app: Asgi, sockets: list[socket.socket], config: ServeConfig, *, on_rejected: Callable[[str], None] | None = None
) -> HttpListener:
    server = config.server
    bounded = _Bounded(app, max_connections=config.limits.max_connections, on_rejected=on_rejected)
    runner = bounded.server = _Server(_uvicorn_config(bounded, server, config.limits))
    listener = HttpListener(runner, sockets)
    await listener.started()
    if runner.config.ssl is not None:
        listener.reload_tls(runner.config.ssl, server)
    return listener


def bind_tcp(host: str, port: int, *, field: str) -> socket.socket:
    """A listening TCP socket; ListenError when the address is taken or not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ListenError(
            f"server.host must be an address of this machine. Given: {host} ({error.strerror})."
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        message = f"server.{field} must be free. Given: {port} on {host} ({error.strerror}). Choose another port."
        raise ListenError(message) from None
    return listener


def bind_unix(path: Path) -> socket.socket:
    """A listening Unix socket that only this user may connect to; an old socket in its place is removed."""
    if path.is_socket():
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_mask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        message = f"server.uds must be a path where a socket can be made. Given: {path} ({error.strerror})."
        raise ListenError(message) from None
    finally:
        os.umask(old_mask)
    return listener


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the supervisor decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Bounded:
    """Refuses what comes over too many connections, with the body of every error: uvicorn's own limit has none."""

    def __init__(self, app: Asgi, *, max_connections: int, on_rejected: Callable[[str], None] | None) -> None:
        self._app, self._max, self._on_rejected = app, max_connections, on_rejected
        self.server: _Server | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.server is None or len(self.server.server_state.connections) <= self._max:
            await self._app(scope, receive, send)
            return
        message = f"the server takes at most {self._max} connections at once. Try again later."
        error = Overloaded(message, code="too_many_connections", request_id=request_id(None), retry_after_s=1.0)
        if self._on_rejected is not None:
            self._on_rejected(error.code)
        status, headers, body = http_error(error)
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(b"x-request-id", (error.request_id or "").encode()), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _uvicorn_config(app: Asgi, server: ServerConfig, limits: LimitsConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="none",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        h11_max_incomplete_event_size=limits.max_header_bytes,
        ssl_certfile=server.tls_cert,
        ssl_keyfile=server.tls_key,
        ssl_ca_certs=server.tls_client_ca,
        ssl_cert_reqs=ssl.CERT_REQUIRED if server.tls_client_ca else ssl.CERT_NONE,
    )


async def _follow_certificate(context: ssl.SSLContext, server: ServerConfig) -> None:
    """Load the certificate again when its files change; new connections then get the new one."""
    assert server.tls_cert is not None
    files = [Path(name) for name in (server.tls_cert, server.tls_key) if name is not None]
    seen = _stamps(files)
    while True:
        await asyncio.sleep(TLS_CHECK_S)
        now = _stamps(files)
        if now == seen or None in now:
            continue
        try:
            context.load_cert_chain(server.tls_cert, server.tls_key)
        except (OSError, ssl.SSLError) as error:  # half written: the next look sees the rest
            _log.warning("tls_reload_failed", extra={"cause": str(error)})
            continue
        seen = now
        _log.info("tls_reloaded", extra={"file": Path(server.tls_cert).name})


def _stamps(files: list[Path]) -> list[tuple[int, int] | None]:
    stamps: list[tuple[int, int] | None] = []
    for file in files:
        try:
            status = file.stat()
            stamps.append((status.st_mtime_ns, status.st_size))
        except OSError:
            stamps.append(None)
    return stamps
