"""
Indexes that the server builds in the background: passages from a file or from documents, vectors from a served encoder.

A build asks the encoder as any request would, with the lowest priority and the builder's own limits, a few passages at
a time; where the queue is full or the engine is being restarted it waits. The version that is served meanwhile stays
until the new one is whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trilithon.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    Overloaded,
    RateLimited,
    Unavailable,
)
from trilithon_server.auth import Principal
from trilithon_server.encoders import check_side, default_encoder, described, encoder_of
from trilithon_server.knowledge.dense import BACKENDS
from trilithon_server.knowledge.indexes import Build, Facts, Work
from trilithon_server.knowledge.live import LiveIndex
from trilithon_server.knowledge.local import Document
from trilithon_server.knowledge.manifest import Encoder
from trilithon_server.knowledge.passages import Passage, read_passages
from trilithon_server.knowledge.stored import Settings
from trilithon_server.metrics import RequestRecord
from trilithon_server.retrieval import Vectors, check_sources, cut_documents, encode_passages, kept_indexes
from trilithon_server.served import Call, ServedModel, request_id
from trilithon_server.service import Service
from trilithon_server.validation import Violations, nearest

MAX_PASSAGES = 1 << 20
"""Of a file, and so of an index: their vectors lie in memory while it is built."""

BATCH = 32
"""Passages that a build has in the engine at once."""

PATIENCE_S = 600.0
"""How long a build waits for an engine that takes nothing."""

_LOWEST = {"priority": -10}
_GOING_DOWN = ("draining", "server_shutting_down")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where passages come from: `file_id` or `documents`, not both."""

    file_id: str = ""
    documents: Sequence[Document] = ()


async def create(
    service: Service, call: Call, name: str, source: Source, *, encoder: str, backend: str, found: Violations
) -> Facts:
    """
    Begin to build an index.

    Args:
        encoder: name of a served one; empty: the first that is there.
        backend: flat or hnsw; empty: flat.
        found: violations that the front has already found.
    Raises:
        TrilithonError: refused; nothing was begun. What a file holds is judged by the build.
    """
    _check(source, backend, found)
    found.raise_if_any()
    model = await _encoder(service, call, encoder)
    tenant = call.principal.tenant
    indexes = kept_indexes(service)
    if source.file_id:
        read = await _file_reader(service, source.file_id, tenant)
    else:
        passages = await asyncio.to_thread(cut_documents, source.documents)
        read = passages.copy
    settings = Settings(backend="hnsw" if backend == "hnsw" else "flat")
    await indexes.create(tenant, name, _work(service, call.principal, model.name, read, settings))
    return await indexes.facts(tenant, name)


async def refresh(service: Service, call: Call, name: str, *, encoder: str) -> Facts:
    """
    Begin to encode the passages of an index again.

    Args:
        encoder: name of a served one; empty: the one that built the version that is served.
    Raises:
        TrilithonError: refused; nothing was begun.
    """
    tenant = call.principal.tenant
    indexes = kept_indexes(service)
    live = await indexes.live(tenant, name)
    with live.reading() as index:
        manifest = index.manifest
        if encoder:
            model = await _encoder(service, call, encoder)
        else:
            model = await encoder_of(service, call, manifest, "", "passages")
    work = _work(service, call.principal, model.name, lambda: _stored(live), Settings(backend=manifest.backend))
    await indexes.refresh(tenant, name, work)
    return await indexes.facts(tenant, name)


async def get(service: Service, call: Call, name: str) -> Facts:
    """Raises: NotFound: `index_not_found`."""
    return await kept_indexes(service).facts(call.principal.tenant, name)


async def list_all(service: Service, call: Call) -> list[Facts]:
    """All indexes of the tenant, by name."""
    indexes, tenant = kept_indexes(service), call.principal.tenant
    found = []
    for name in await indexes.names(tenant):
        try:
            found.append(await indexes.facts(tenant, name))
        except NotFound:  # deleted meanwhile
            continue
    return found


async def delete(service: Service, call: Call, name: str) -> None:
    """Raises: NotFound: `index_not_found`."""
    await kept_indexes(service).delete(call.principal.tenant, name)


# -- the build ----------------------------------------------------------------------------------------------------


def _work(
    service: Service, principal: Principal, encoder: str, read: Callable[[], Sequence[Passage]], settings: Settings
) -> Work:
    async def work(build: Build) -> None:
        passages = await asyncio.to_thread(read)
        parts: list[Vectors] = []
        makers: list[Encoder] = []
        for first in range(0, len(passages), BATCH):
            part = passages[first : first + BATCH]
            maker, vectors_NH = await _encode_patiently(service, principal, encoder, part)
            parts.append(vectors_NH)
            makers.append(maker)
            if maker != makers[0]:
                message = f"the encoder `{encoder}` became another one while the index was built."
                raise FailedPrecondition(message, code="index_encoder", hint="Build it again.")
            build.told(first + len(part), len(passages))
        await build.publish(passages, np.concatenate(parts), encoder=makers[0], settings=settings)

    return work


async def _encode_patiently(
    service: Service, principal: Principal, encoder: str, passages: Sequence[Passage]
) -> tuple[Encoder, Vectors]:
    """`_encode`, again where the engine takes nothing for a while."""
    end_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await _encode(service, principal, encoder, passages)
        except (Overloaded, RateLimited, Unavailable, DeadlineExceeded) as error:
            if error.code in _GOING_DOWN or time.monotonic() > end_s:
                raise
            await asyncio.sleep(error.retry_after_s or 1.0)


async def _encode(
    service: Service, principal: Principal, encoder: str, passages: Sequence[Passage]
) -> tuple[Encoder, Vectors]:
    """Vectors of a few passages, as a call of its own: an engine that it holds is let go of with it."""
    call = Call(
        principal=principal,
        request_id=request_id(None),
        route="index",
        arrived_s=time.monotonic(),
        late=service.draining,
        record=RequestRecord(route="index", model=""),
    )
    try:
        model = await service.resolve(encoder, call)
        encoded = await encode_passages(service, call, model, passages, _LOWEST)
        return described(model), encoded.vectors_NH
    finally:
        for end in call.ends:
            end()


async def _encoder(service: Service, call: Call, name: str) -> ServedModel:
    model = await service.resolve(name or default_encoder(service), call)
    model.require("embed")
    check_side(model, "passages")
    return model


async def _file_reader(service: Service, file_id: str, tenant: str) -> Callable[[], Sequence[Passage]]:
    """
    What reads the passages of a file, later and in a thread.

    Raises:
        NotFound: `file_not_found`. FailedPrecondition: `files_missing`, this server keeps no files.
    """
    if service.find_file is None:
        raise FailedPrecondition(
            "this server keeps no files.", code="files_missing", hint="Set jobs.store to a folder, or send documents."
        )
    path = await service.find_file(file_id, tenant)

    def read() -> Sequence[Passage]:
        try:
            return read_passages(path, name=file_id, most=MAX_PASSAGES)
        except FileNotFoundError:
            message = f"file {file_id} was deleted before it was read."
            raise NotFound(message, code="file_not_found", hint="Upload it again.") from None

    return read


def _stored(live: LiveIndex) -> list[Passage]:
    with live.reading() as index:
        return [index.passage(row) for row in range(index.manifest.count)]


def _check(source: Source, backend: str, found: Violations) -> None:
    check_sources("documents", source.documents, found)
    if bool(source.file_id) == bool(source.documents):
        found.add("file_id", "or `documents` must be set, one of the two", code="missing_parameter")
    if backend and backend not in BACKENDS:
        hint = nearest(backend, BACKENDS).strip()
        found.add("backend", f"must be one of {', '.join(BACKENDS)}", given=backend, todo=hint)
