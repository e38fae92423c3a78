"""
What another package adds to the server: routes, RPCs and their life. The server knows none of them by name.

The composition root, which is the command, says through `Launch` which module is the front process and what runs
beside it; that front hands its extensions to `Front`. Their routes stand in the same table and their RPCs behind the
same interceptor as ours, so keys, limits, errors, counters and the OpenAPI document hold for them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from trilithon_server.config import ServeConfig

if TYPE_CHECKING:
    from trilithon_server.http.endpoint import Route
    from trilithon_server.service import Service

FRONT_MODULE = "trilithon_server.front"


class Extension(Protocol):
    """One addition to the front process. Everything runs on the front's loop."""

    @property
    def routes(self) -> tuple[Route, ...]:
        """HTTP routes; no path of the server's own."""
        ...

    @property
    def schemas(self) -> Mapping[str, Any]:
        """JSON schemas of the answers that the routes name."""
        ...

    @property
    def services(self) -> tuple[str, ...]:
        """Full names of the gRPC services; their messages are in the default descriptor pool."""
        ...

    def add_servicers(self, server: Any) -> None:
        """Register the services with a `grpc.aio` server."""
        ...

    async def start(self, service: Service) -> None:
        """
        Called once, before the listeners open.

        Raises:
            ValueError: a setting is unusable; one sentence.
        """
        ...

    def drain(self) -> None:
        """Refuse new work and end streams that have no end of their own, with a typed reason."""
        ...

    async def wait_idle(self) -> None:
        """Return when nothing is in flight any more."""
        ...

    def abort(self) -> None:
        """End what is still in flight, with a typed reason, so that `wait_idle` returns."""
        ...

    async def stop(self) -> None:
        """Let go of everything; idempotent."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """
    A process beside the server: started with it, started again when it dies, stopped with it by SIGTERM.

    Attributes:
        name: in log lines.
        argv: the command.
        env: variables beside the server's own.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """
    What the supervisor runs beside the engines.

    Attributes:
        config: the configuration, with what the additions fill in.
        front_module: run as the front process; it takes the arguments of `trilithon_server.front`.
        companions: further processes.
    """

    config: ServeConfig
    front_module: str = FRONT_MODULE
    companions: tuple[Companion, ...] = ()
