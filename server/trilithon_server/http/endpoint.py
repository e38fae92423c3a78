"""The frame around every HTTP handler: request id, limits, key, disconnects, and the one mapping of errors."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trilithon.errors import NotFound, TrilithonError, Unimplemented
from trilithon_server.errors import as_error
from trilithon_server.http.exchange import Exchange, Scope
from trilithon_server.served import Call
from trilithon_server.service import Service

_log = logging.getLogger(__name__)

Access = Literal["public", "user", "admin", "ui"]
"""Who may call: anybody, a key with that scope, or (`ui`) a user unless the operator made the pages public."""

Handler = Callable[[Service, Exchange, Call], Awaitable[None]]
PublicHandler = Callable[[Service, Exchange], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """
    One method on one path.

    Args:
        method, path: `{name}` in the path is a parameter.
        access: who may call.
        handler: answers; `PublicHandler` on public routes.
        summary: for the OpenAPI document.
        request: pydantic model of the body, if it has one.
        form: JSON schema of a multipart body, if it has one instead.
        parameters: whether the sampling parameters stand beside the model's fields.
        openai: whether OpenAI's further keys are taken.
        hidden: parameters that are not taken under their own name.
        answer: name of the answer's schema in `openapi.py`.
        stream: whether it can answer with server-sent events.
        media: type of the answer.
        query: JSON schemas of its query parameters.
        more_errors: status codes that it can answer with besides those of every route.
        counted: whether it counts as a request of the key and in the metrics.
    """

    method: str
    path: str
    access: Access = "user"
    handler: Callable[..., Awaitable[None]]
    summary: str
    request: Any = None
    form: Mapping[str, Any] | None = None
    parameters: bool = False
    openai: bool = False
    hidden: tuple[str, ...] = ()
    answer: str = ""
    stream: bool = False
    media: str = "application/json"
    query: Mapping[str, Any] | None = None
    more_errors: tuple[str, ...] = ()
    counted: bool = True

    @property
    def errors(self) -> tuple[str, ...]:
        """Status codes that it can answer with, besides 200."""
        if self.access == "public":
            return ("400", "413", "500")
        always = ("400", "401", "403", "404", "413", "429", "500", *self.more_errors)
        has_body = self.request is not None or self.form is not None
        return tuple(dict.fromkeys((*always, "415", "503", "504") if has_body else always))


class MethodNotAllowed(Unimplemented):
    """The path is there, the method is not."""

    http_status = 405
    default_code = "method_not_allowed"


class Endpoint:
    """Every method of one path, as an ASGI application."""

    def __init__(self, service: Service, routes: Sequence[Route]) -> None:
        self._service = service
        self._routes = {route.method: route for route in routes}
        if "GET" in self._routes:
            self._routes["HEAD"] = self._routes["GET"]

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        exchange = Exchange(scope, receive, send, self._service.limits)
        try:
            exchange.check_headers()
            route = self._routes.get(exchange.method)
            if route is None:
                allowed = ", ".join(self._routes)
                exchange.extra_headers.append((b"allow", allowed.encode()))
                raise MethodNotAllowed(f"{exchange.method} is not a method of this path. Allowed: {allowed}.")
            await self._run(route, exchange)
        except TrilithonError as error:
            await exchange.fail(as_error(error, exchange.request_id))
        except Exception as error:
            _log.error("internal_error", extra={"request_id": exchange.request_id}, exc_info=error)
            await exchange.fail(as_error(error, exchange.request_id))

    async def _run(self, route: Route, exchange: Exchange) -> None:
        service = self._service
        if route.access == "public" or (route.access == "ui" and service.config.server.public_ui):
            await route.handler(service, exchange)
            return
        with service.call(
            route=route.path,
            request_id=exchange.request_id,
            scope="admin" if route.access == "admin" else "user",
            authorization=exchange.header(b"authorization"),
            api_key=exchange.header(b"x-api-key"),
            traceparent=exchange.header(b"traceparent"),
            count=route.counted,
        ) as call:
            if service.keys:
                exchange.extra_headers += service.limiter.headers(call.principal)
            if route.access == "ui":
                await route.handler(service, exchange)
            else:
                await route.handler(service, exchange, call)


_WITH_JOBS = re.compile(r"/v1/(files|uploads|fine_tuning)(/|$)")
"""Where paths begin that are there with a store of jobs alone."""


class NotFoundEndpoint:
    """Every path that is not there."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        exchange = Exchange(scope, receive, send, self._service.limits)
        message, hint = "no such route. See /docs for what is served.", ""
        if _WITH_JOBS.match(scope["path"]):
            message = "this server keeps no files and runs no jobs."
            hint = "Start it with --set jobs.store=FOLDER."
        error = NotFound(message, code="route_not_found", hint=hint)
        await exchange.fail(as_error(error, exchange.request_id))
