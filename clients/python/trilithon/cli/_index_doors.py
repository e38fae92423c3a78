"""Where `trilithon index` finds indexes: on a server, or in a folder, with an encoder in this process."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from trilithon import CallOptions, Client, Hits, Index, Passage, SearchResults, _store
from trilithon.cli import _extra
from trilithon.cli._connect import connect
from trilithon.cli._output import Progress
from trilithon.cli._parser import UsageError
from trilithon.errors import (
    AlreadyExists,
    Cancelled,
    ConnectionFailed,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
    ProtocolError,
    TrilithonError,
    Unavailable,
)

POLL_S = 0.2
"""Between two looks at a build on a server."""

_UNTOLD = (Cancelled, ConnectionFailed, DeadlineExceeded, Internal, ProtocolError, Unavailable)
"""Errors behind which a build may go on."""

ENCODER = "all-minilm-l6-v2"
"""Of a first local build that names none."""


class Door(Protocol):
    """Both doors."""

    def build(self, name: str, file: Path, *, backend: str | None) -> Index:
        """A new index from a file of passages, when it is built."""
        ...

    def refresh(self, name: str) -> Index:
        """The next version of an index, when it is built."""
        ...

    def search(self, name: str, queries: Sequence[str], *, top_k: int, mode: str | None) -> SearchResults:
        """The passages that go with each question."""
        ...

    def list(self) -> Sequence[Index]:
        """All indexes, by name."""
        ...

    def delete(self, name: str) -> None:
        """Remove an index."""
        ...

    def close(self) -> None:
        """Let go of what is open."""
        ...


def opened(args: argparse.Namespace) -> Door:
    """The folder that `--dir` names, else the server."""
    if args.dir is not None:
        if args.url is not None:
            raise UsageError("--dir is for indexes of this machine, --url for those of a server. Give one of the two.")
        return FolderDoor(args.dir, args.model)
    return ServerDoor(connect(args), args.model)


class ServerDoor:
    """Indexes of a server; builds go on there when the command is interrupted."""

    def __init__(self, client: Client, model: str | None) -> None:
        self._client = client
        self._options: CallOptions = {"model": model} if model else {}

    def build(self, name: str, file: Path, *, backend: str | None) -> Index:
        """Upload the file, begin the build, and follow it; the upload is removed when nothing will read it any more."""
        self._check_free(name)
        uploaded = self._client.files.upload(file, purpose="evidence")
        given: Any = backend
        try:
            self._client.retrieval.create_index(name, file=uploaded.id, backend=given, **self._options)
            index = self._followed(name, told=lambda words: words.replace(uploaded.id, file.name))
        except TrilithonError as error:
            if not isinstance(error, _UNTOLD):
                self._forget(uploaded.id)
            raise
        self._forget(uploaded.id)
        return index

    def refresh(self, name: str) -> Index:
        """Begin the refresh, and follow it."""
        self._client.retrieval.refresh_index(name, **self._options)
        return self._followed(name)

    def search(self, name: str, queries: Sequence[str], *, top_k: int, mode: str | None) -> SearchResults:
        """Ask the server."""
        given: Any = mode
        return self._client.retrieval.search(name, queries, top_k=top_k, mode=given, **self._options)

    def list(self) -> Sequence[Index]:
        """Ask the server."""
        return self._client.retrieval.list_indexes()

    def delete(self, name: str) -> None:
        """Ask the server."""
        self._client.retrieval.delete_index(name)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _check_free(self, name: str) -> None:
        """Before a file is uploaded in vain."""
        try:
            index = self._client.retrieval.get_index(name)
        except NotFound:
            return
        if index.version or index.state == "building":
            raise _taken(name)

    def _forget(self, file_id: str) -> None:
        with suppress(TrilithonError):  # what the build came to matters more
            self._client.files.delete(file_id)

    def _followed(self, name: str, *, told: Callable[[str], str] = str) -> Index:
        """
        The index at the end of its build.

        Args:
            told: makes the server's words the caller's.
        Raises:
            FailedPrecondition: `index_build_failed`.
        """
        with Progress("encode, in %", total=100) as progress:
            while (index := self._client.retrieval.get_index(name)).state == "building":
                progress.update(int(100 * index.progress))
                time.sleep(POLL_S)
        if index.error:
            raise FailedPrecondition(f"index {name!r} was not built: {told(index.error)}", code="index_build_failed")
        return index


class FolderDoor:
    """Indexes of a folder. `model`: an encoder's name in the local store, or its directory."""

    def __init__(self, folder: Path, model: str | None) -> None:
        self._model = model
        self._local = _load("local_index")
        self._store = _load("knowledge.index").IndexStore(folder)
        config = _extra.load("trilithon_parallel.config", verb="index", extra="engine")
        self._model_error: type[Exception] = config.ModelError

    def build(self, name: str, file: Path, *, backend: str | None) -> Index:
        """Read, encode, publish."""
        if self._store.holds(name):
            raise _taken(name)
        try:
            passages = _load("knowledge.passages").read_passages(file)
        except OSError as error:
            raise UsageError(f"FILE must be a readable file of passages. Given: {file} ({error.strerror}).") from None
        settings = _load("knowledge.stored").Settings(backend=backend or "flat")
        return self._publish(name, passages, settings, self._model or ENCODER)

    def refresh(self, name: str) -> Index:
        """Encode the stored passages again, by the encoder that built them unless another is named."""
        passages, settings = self._local.stored(self._store, name)
        return self._publish(name, passages, settings, self._known(name))

    def search(self, name: str, queries: Sequence[str], *, top_k: int, mode: str | None) -> SearchResults:
        """Search here; the encoder is loaded where vectors are compared."""
        wanted = mode or "dense"
        if wanted == "bm25":
            found, model = self._local.search(self._store, name, queries, None, top_k=top_k, mode=wanted), ""
        else:
            model = self._known(name)
            with self._encoder(model) as encoder:
                found = self._local.search(self._store, name, queries, encoder, top_k=top_k, mode=wanted)
        results = tuple(Hits(passages=tuple(map(_passage, hits))) for hits in found.hits)
        return SearchResults(results=results, index_version=found.index_version, model=model)

    def list(self) -> Sequence[Index]:
        """Read the folder."""
        return [self._listed(name) for name in self._store.names()]

    def delete(self, name: str) -> None:
        """Remove its files."""
        self._store.delete(name)

    def close(self) -> None:
        """Nothing is open."""

    def _publish(self, name: str, passages: Sequence[Any], settings: Any, model: str) -> Index:
        with self._encoder(model) as encoder, Progress("encode passages", total=len(passages)) as progress:
            told: Callable[[int, int], None] = lambda done, total: progress.update(done, total=total)  # noqa: E731
            created = int(time.time())
            self._local.build(self._store, name, passages, encoder, settings=settings, created=created, told=told)
        return self._index(name)

    def _known(self, name: str) -> str:
        return self._model or str(self._store.manifest(name).encoder.model)

    def _encoder(self, model: str) -> Any:
        try:
            directory = _store.resolve(model)
            return self._local.LocalEncoder(directory, name=model)
        except (NotFound, self._model_error) as error:
            raise UsageError(f"--model must be an encoder of this machine. {error}") from None

    def _listed(self, name: str) -> Index:
        """`_index`; a broken one is told as a server tells it."""
        try:
            return self._index(name)
        except (DataLoss, FailedPrecondition) as error:
            return Index(name=name, state="failed", error=str(error))

    def _index(self, name: str) -> Index:
        manifest = self._store.manifest(name)
        return Index(
            name=name,
            version=manifest.version,
            passages=manifest.count,
            model_digest=manifest.encoder.model_digest,
            state="ready",
            progress=1.0,
            model=manifest.encoder.model,
            backend=manifest.backend,
        )


def _taken(name: str) -> AlreadyExists:
    hint = "Refresh it, delete it first, or choose another name."
    return AlreadyExists(f"index {name!r} is there already.", code="name_taken", hint=hint)


def _passage(hit: Any) -> Passage:
    found = hit.passage
    return Passage(id=found.id, score=hit.score, title=found.title, text=found.text, logprob=hit.logprob)


def _load(name: str) -> ModuleType:
    return _extra.load(f"trilithon_server.{name}", verb="index", extra="engine")
