"""The frames around handlers of jobs routes, and what their tables share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from trilithon_finetune.api.door import Door
from trilithon_server.http.exchange import Exchange
from trilithon_server.served import Call
from trilithon_server.service import Service

PAGE: dict[str, Any] = {
    "after": {"type": "string", "minLength": 1},
    "limit": {"type": "integer", "minimum": 1, "maximum": 100},
}
"""Query parameters of a list."""

NOSNIFF = (b"x-content-type-options", b"nosniff")

Handler = Callable[[Exchange, str], Awaitable[None]]
"""Answers an exchange for a tenant."""

Framed = Callable[[Service, Exchange, Call], Awaitable[None]]


def calm(handler: Handler) -> Framed:
    """A handler that only looks."""

    async def run(service: Service, exchange: Exchange, call: Call) -> None:
        await handler(exchange, call.principal.tenant)

    return run


def busy(door: Door, handler: Handler) -> Framed:
    """A handler that changes something: refused while the server drains, waited for when a drain begins."""

    async def run(service: Service, exchange: Exchange, call: Call) -> None:
        with door.working():
            await handler(exchange, call.principal.tenant)

    return run
