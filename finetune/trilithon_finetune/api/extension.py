"""Finetuning jobs as an extension of the server: its routes, its service, and their life with the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trilithon.api.v1 import finetune_pb2, finetune_pb2_grpc
from trilithon_finetune.api.answers import SCHEMAS
from trilithon_finetune.api.checks import COMMAND, Checks
from trilithon_finetune.api.door import Door
from trilithon_finetune.api.exports import Exports
from trilithon_finetune.api.grpc import Finetunes
from trilithon_finetune.api.http import HttpJobs
from trilithon_finetune.api.http_files import HttpFiles
from trilithon_server.config import ServeConfig
from trilithon_server.http.endpoint import Route
from trilithon_server.service import Service

SERVICES: tuple[str, ...] = (finetune_pb2.DESCRIPTOR.services_by_name["FinetuneService"].full_name,)
"""Full names of our services."""


class JobsExtension:
    """
    Args:
        config: with `jobs.store` set.
        check_command: runs a phase for checks and estimates.
    """

    def __init__(self, config: ServeConfig, *, check_command: Sequence[str] = COMMAND) -> None:
        self._door = Door(config)
        checks = Checks(self._door, command=check_command)
        exports = Exports(self._door)
        self._servicer = Finetunes(self._door, checks, exports)
        self.routes: tuple[Route, ...] = (
            *HttpJobs(self._door, checks, exports).routes(),
            *HttpFiles(self._door, checks).routes(),
        )
        self.schemas: Mapping[str, Any] = SCHEMAS
        self.services = SERVICES

    def add_servicers(self, server: Any) -> None:
        """Register FinetuneService."""
        finetune_pb2_grpc.add_FinetuneServiceServicer_to_server(self._servicer, server)

    async def start(self, service: Service) -> None:
        """Open the store. Raises ValueError."""
        await self._door.open(service)

    def drain(self) -> None:
        """Take no more work, end streams of events."""
        self._door.drain()

    async def wait_idle(self) -> None:
        """Return when no call is in flight."""
        await self._door.wait_idle()

    def abort(self) -> None:
        """End the calls that are in flight."""
        self._door.abort()

    async def stop(self) -> None:
        """Close the store."""
        await self._door.close()
