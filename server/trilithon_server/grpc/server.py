"""The gRPC listener: our services, standard health with Watch, reflection, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from trilithon.api.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    dialogue_pb2,
    dialogue_pb2_grpc,
    embed_pb2,
    embed_pb2_grpc,
    extract_pb2,
    extract_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    openqa_pb2,
    openqa_pb2_grpc,
    retrieval_pb2,
    retrieval_pb2_grpc,
    story_pb2,
    story_pb2_grpc,
    synth_qa_pb2,
    synth_qa_pb2_grpc,
    tokenize_pb2,
    tokenize_pb2_grpc,
)
from trilithon_server.config import ServeConfig, ServerConfig, authority
from trilithon_server.extension import Extension
from trilithon_server.grpc.dialogue import Dialogues
from trilithon_server.grpc.extract import Extractions
from trilithon_server.grpc.gate import Gate
from trilithon_server.grpc.openqa import OpenAnswers
from trilithon_server.grpc.retrieval import Retrievals
from trilithon_server.grpc.servicers import Admin, Embeddings, Generations, Models, Tokens
from trilithon_server.grpc.stories import Stories
from trilithon_server.grpc.synthesis import SyntheticQuestions
from trilithon_server.listeners import ListenError
from trilithon_server.service import Service

MAX_RECEIVE_BYTES = 4 << 20
MAX_SEND_BYTES = 16 << 20
KEEPALIVE_MS = 60_000
KEEPALIVE_TIMEOUT_MS = 20_000
HEALTH_POLL_S = 0.25
"""How stale the health service may be; readiness must go off within a second."""

SERVICES: tuple[str, ...] = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (generation_pb2, "GenerationService"),
        (tokenize_pb2, "TokenizeService"),
        (embed_pb2, "EmbedService"),
        (extract_pb2, "ExtractService"),
        (dialogue_pb2, "DialogueService"),
        (story_pb2, "StoryService"),
        (retrieval_pb2, "RetrieverService"),
        (openqa_pb2, "OpenQAService"),
        (synth_qa_pb2, "SynthQAService"),
        (models_pb2, "ModelsService"),
        (admin_pb2, "AdminService"),
    )
)
"""Full names of our services; health answers for each."""

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

_log = logging.getLogger(__name__)


class RpcServer:
    """A gRPC server and the task that keeps its health service truthful."""

    def __init__(self, server: Any, service: Service, reporter: Any, port: int, *, services: Sequence[str]) -> None:
        self._server = server
        self._service = service
        self._health = reporter
        self._services = services
        self._task: asyncio.Task[None] | None = None
        self.port = port
        """Where it listens."""

    async def start(self) -> None:
        """Begin to accept."""
        await self._report(ready=False)
        await self._server.start()
        self._task = asyncio.create_task(self._follow(), name="grpc-health")

    async def stop(self, grace: float | None) -> None:
        """Stop accepting, give running calls `grace` seconds, then end them."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)

    async def _follow(self) -> None:
        told = False
        while True:
            ready, _ = self._service.readiness()
            if ready != told:
                await self._report(ready=ready)
                told = ready
            await asyncio.sleep(HEALTH_POLL_S)

    async def _report(self, *, ready: bool) -> None:
        kinds = health_pb2.HealthCheckResponse
        for name in ("", *self._services):
            await self._health.set(name, kinds.SERVING if ready else kinds.NOT_SERVING)


async def build_server(service: Service, *, config: ServeConfig, extensions: Sequence[Extension] = ()) -> RpcServer:
    """
    A server bound to `server.host:grpc_port`, not yet started; `extensions` add their services.

    Raises:
        ListenError: the address is taken or not ours, or the TLS files cannot be used.
    """
    limits = config.limits
    server = grpc.aio.server(
        interceptors=[Gate(service)],
        options=[
            ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
            ("grpc.max_send_message_length", MAX_SEND_BYTES),
            ("grpc.max_metadata_size", limits.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", 2 * limits.max_metadata_bytes),
            ("grpc.max_concurrent_streams", limits.max_streams_per_connection),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
            ("grpc.so_reuseport", 0),
        ],
    )
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(Generations(service), server)
    tokenize_pb2_grpc.add_TokenizeServiceServicer_to_server(Tokens(service), server)
    embed_pb2_grpc.add_EmbedServiceServicer_to_server(Embeddings(service), server)
    extract_pb2_grpc.add_ExtractServiceServicer_to_server(Extractions(service), server)
    dialogue_pb2_grpc.add_DialogueServiceServicer_to_server(Dialogues(service), server)
    story_pb2_grpc.add_StoryServiceServicer_to_server(Stories(service), server)
    retrieval_pb2_grpc.add_RetrieverServiceServicer_to_server(Retrievals(service), server)
    openqa_pb2_grpc.add_OpenQAServiceServicer_to_server(OpenAnswers(service), server)
    synth_qa_pb2_grpc.add_SynthQAServiceServicer_to_server(SyntheticQuestions(service), server)
    models_pb2_grpc.add_ModelsServiceServicer_to_server(Models(service), server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(Admin(service), server)
    services = [*SERVICES]
    for extension in extensions:
        extension.add_servicers(server)
        services += extension.services
    reporter = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stubs leave the name out
    health_pb2_grpc.add_HealthServicer_to_server(reporter, server)
    if config.server.reflection:
        _reflect(server, services)
    address = authority(config.server.host, config.server.grpc_port)
    try:
        if config.server.tls_cert is not None:
            port = server.add_secure_port(address, _credentials(config.server))
        else:
            port = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        given = f"{config.server.grpc_port} on {config.server.host}"
        raise ListenError(f"server.grpc_port must be free. Given: {given}. Choose another port.")
    return RpcServer(server, service, reporter, port, services=services)


def _reflect(server: Any, services: Sequence[str]) -> None:
    """
    Reflection under both of its names. The library knows v1alpha alone; v1 has the same messages byte for byte.
    """
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME, REFLECTION_V1)
    reflection.enable_server_reflection(names, server)
    servicer = reflection.aio.ReflectionServicer(names)  # type: ignore[attr-defined]  # likewise
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    v1 = grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": handler})
    server.add_generic_rpc_handlers((v1,))


def _credentials(server: ServerConfig) -> grpc.ServerCredentials:
    """TLS, mutual with `tls_client_ca`; the files are read again when they change."""
    seen = _configuration(server)
    stamp = _stamp(server)

    def fetch() -> Any:  # None means: as before
        nonlocal stamp
        now = _stamp(server)
        if now == stamp or now is None:
            return None
        try:
            configuration = _configuration(server)
        except ListenError:  # half written: the next connection sees the rest
            return None
        stamp = now
        _log.info("tls_reloaded", extra={"protocol": "grpc"})
        return configuration

    return grpc.dynamic_ssl_server_credentials(
        seen, fetch, require_client_authentication=server.tls_client_ca is not None
    )


def _configuration(server: ServerConfig) -> grpc.ServerCertificateConfiguration:
    assert server.tls_cert is not None
    assert server.tls_key is not None  # the configuration holds both or neither
    key, cert = _read("tls_key", server.tls_key), _read("tls_cert", server.tls_cert)
    roots = _read("tls_client_ca", server.tls_client_ca) if server.tls_client_ca is not None else None
    return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=roots)


def _read(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ListenError(f"server.{name} must be a readable file. Given: {path} ({error.strerror}).") from None


def _stamp(server: ServerConfig) -> tuple[int, ...] | None:
    files = [name for name in (server.tls_cert, server.tls_key, server.tls_client_ca) if name is not None]
    try:
        return tuple(Path(name).stat().st_mtime_ns for name in files)
    except OSError:
        return None
