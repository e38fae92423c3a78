"""
The indexes that a server keeps: opened when they are first asked for, built in the background, each tenant's own.

    ROOT/SHA256 of tenant/      an `IndexStore`

One build runs at a time, the others wait their turn; nothing here blocks the event loop. A build that the server's end
cuts off is forgotten: the version that was served before is served again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from trilithon.errors import AlreadyExists, Conflict, DataLoss, FailedPrecondition, NotFound, TrilithonError
from trilithon_server.knowledge.index import IndexStore, not_found
from trilithon_server.knowledge.live import LiveIndex
from trilithon_server.knowledge.manifest import Encoder, Manifest
from trilithon_server.knowledge.passages import Passage
from trilithon_server.knowledge.stored import Settings
from trilithon_server.knowledge.version import IndexVersion
from trilithon_server.validation import shown

MAX_INDEXES = 64
"""Of one tenant."""

State = Literal["building", "ready", "failed"]

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """
    What is known of an index.

    Attributes:
        manifest: of the version that is served; None: none yet.
        progress: share of the passages that are encoded, 0 to 1.
        error: why the last build failed, or no version can be told of: its files are broken; empty where neither.
    """

    name: str
    state: State
    manifest: Manifest | None
    progress: float
    error: str


class Build:
    """A build on its way: its work tells how far it is, and publishes once."""

    def __init__(self, indexes: Indexes, tenant: str, name: str) -> None:
        self._indexes, self._tenant, self._name = indexes, tenant, name
        self.progress = 0.0

    def told(self, done: int, total: int) -> None:
        """So many of the passages are encoded."""
        self.progress = done / total

    async def publish(
        self, passages: Sequence[Passage], vectors_MH: NDArray[np.float32], *, encoder: Encoder, settings: Settings
    ) -> None:
        """
        Write the next version, open it, and serve it from now on.

        Raises:
            InvalidArgument: `passages_invalid`, `vectors_invalid`, `index_invalid`.
            OSError: the disk does not take it.
        """
        store = self._indexes.store(self._tenant)

        def write() -> IndexVersion:
            store.publish(
                self._name, passages, vectors_MH, encoder=encoder, created=int(time.time()), settings=settings
            )
            return store.open(self._name, model_digest=encoder.model_digest)

        # Once begun it is brought to its end: a deletion that comes meanwhile must find a whole index.
        task = asyncio.create_task(asyncio.to_thread(write))
        try:
            version = await _to_its_end(task)
        except asyncio.CancelledError:
            if task.done() and not task.cancelled() and task.exception() is None:
                task.result().close()
            raise
        self._indexes.serve(self._tenant, self._name, version)


Work = Callable[[Build], Awaitable[None]]


@dataclass(slots=True, eq=False)
class _Held:
    """One index in this process."""

    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    live: LiveIndex | None = None
    build: Build | None = None
    task: asyncio.Task[None] | None = None
    error: str = ""
    deleting: bool = False

    @property
    def is_blank(self) -> bool:
        """Whether nothing is known of it."""
        return self.live is None and self.build is None and not self.error and not self.deleting

    def serve(self, version: IndexVersion) -> LiveIndex:
        """Serve a version unless a newer one is: one that was opened may have been overtaken meanwhile."""
        if self.live is None:
            self.live = LiveIndex(version)
        elif self.live.version < version.version:
            self.live.swap(version)
        else:
            version.close()
        return self.live


class Indexes:
    """
    Args:
        root: made when something is first built.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._held: dict[tuple[str, str], _Held] = {}
        self._turn = asyncio.Semaphore(1)

    def store(self, tenant: str) -> IndexStore:
        """The indexes of a tenant on the disk."""
        return IndexStore(self._root / hashlib.sha256(tenant.encode()).hexdigest())

    async def live(self, tenant: str, name: str) -> LiveIndex:
        """
        The index of that name, opened in a thread where it is not yet: all of its files are read once.

        Raises:
            NotFound: `index_not_found`. FailedPrecondition: `index_building`, no version of it is there yet.
            DataLoss: `index_corrupt`, a file is missing or was changed.
        """
        store, held = self.store(tenant), self._held.setdefault((tenant, name), _Held())
        if held.deleting:
            raise not_found(name)
        try:
            async with held.opening:
                return held.live or held.serve(await asyncio.to_thread(_opened, store, name))
        except NotFound:
            if held.build is None:
                raise
            message = f"index {shown(name)} is being built, and no version of it is there yet."
            raise FailedPrecondition(message, code="index_building", hint="Ask again when it is ready.") from None
        finally:
            if held.is_blank and self._held.get((tenant, name)) is held:
                del self._held[tenant, name]

    def serve(self, tenant: str, name: str, version: IndexVersion) -> None:
        """Serve a version from now on; searches that have begun end on the one before."""
        self._held[tenant, name].serve(version)

    async def facts(self, tenant: str, name: str) -> Facts:
        """
        What is known of an index; of one whose files are broken, that it failed, and why.

        Raises:
            NotFound: `index_not_found`.
        """
        held = self._held.get((tenant, name))
        manifest, broken = None, ""
        try:
            manifest = await asyncio.to_thread(self.store(tenant).manifest, name)
        except NotFound:
            if held is None or (held.build is None and not held.error):
                raise
        except (DataLoss, FailedPrecondition) as error:
            broken = str(error)
        return _facts(name, held, manifest, broken)

    async def names(self, tenant: str) -> list[str]:
        """Indexes that are there, are being built, or could not be built, in order."""
        there = await asyncio.to_thread(self.store(tenant).names)
        begun = [name for (owner, name), held in self._held.items() if owner == tenant and (held.build or held.error)]
        return sorted({*there, *begun})

    async def create(self, tenant: str, name: str, work: Work) -> None:
        """
        Begin to build an index of a new name.

        Raises:
            InvalidArgument: `index_invalid`, the name. AlreadyExists: `name_taken`.
            FailedPrecondition: `store_full`, the tenant has as many as it may.
        """
        there = await asyncio.to_thread(self.store(tenant).holds, name)
        held = self._held.get((tenant, name))
        if there or (held is not None and held.build is not None):
            message = f"index {shown(name)} is there already."
            raise AlreadyExists(message, code="name_taken", hint="Refresh it, delete it first, or choose another name.")
        if len(await self.names(tenant)) >= MAX_INDEXES:
            message = f"at most {MAX_INDEXES} indexes may be kept. Given: one more, {shown(name)}."
            raise FailedPrecondition(message, code="store_full", hint="Delete some first.")
        self._begin(tenant, name, work)

    async def refresh(self, tenant: str, name: str, work: Work) -> None:
        """
        Begin to build the next version of an index.

        Raises:
            NotFound: `index_not_found`. DataLoss: `index_corrupt`. Conflict: `index_building`.
        """
        await asyncio.to_thread(self.store(tenant).manifest, name)
        self._begin(tenant, name, work)

    def _begin(self, tenant: str, name: str, work: Work) -> None:
        held = self._held.setdefault((tenant, name), _Held())
        if held.build is not None or held.deleting:
            message = f"index {shown(name)} is being {'deleted' if held.deleting else 'built'}."
            raise Conflict(message, code="index_building", hint="Wait for its end.")
        held.build, held.error = Build(self, tenant, name), ""
        held.task = asyncio.create_task(self._run(held, held.build, name, work))

    async def _run(self, held: _Held, build: Build, name: str, work: Work) -> None:
        try:
            async with self._turn:
                await work(build)
        except TrilithonError as error:
            held.error = str(error)
        except OSError as error:
            held.error = f"the index cannot be stored: {error.strerror}."
        except Exception as error:
            _log.error("index_build_failed", extra={"index": name}, exc_info=error)
            held.error = "the build failed inside of the server; its log tells more."
        finally:
            held.build = None

    async def delete(self, tenant: str, name: str) -> None:
        """
        Remove an index, and end what builds it; searches that have begun end as they would.

        Raises:
            NotFound: `index_not_found`.
        """
        held = self._held.setdefault((tenant, name), _Held())
        if held.deleting:
            raise not_found(name)
        held.deleting = True
        # Once begun it is brought to its end: whoever asks meanwhile must not find again what is being removed.
        await _to_its_end(asyncio.create_task(self._delete(held, tenant, name)))

    async def _delete(self, held: _Held, tenant: str, name: str) -> None:
        begun = held.build is not None or bool(held.error)
        try:
            await _ended(held)
            await asyncio.to_thread(self.store(tenant).delete, name)
        except NotFound:
            if not begun:
                raise
        finally:
            self._held.pop((tenant, name), None)

    async def stop(self) -> None:
        """End the builds and let go of every index; idempotent."""
        held, self._held = list(self._held.values()), {}
        await asyncio.gather(*map(_ended, held))


def _facts(name: str, held: _Held | None, manifest: Manifest | None, broken: str) -> Facts:
    if held is not None and held.build is not None:
        return Facts(name=name, state="building", manifest=manifest, progress=held.build.progress, error="")
    error = broken or (held.error if held is not None else "")
    state: State = "failed" if manifest is None else "ready"
    return Facts(name=name, state=state, manifest=manifest, progress=0.0 if manifest is None else 1.0, error=error)


def _opened(store: IndexStore, name: str) -> IndexVersion:
    """The current version; that queries are of its own encoder is seen when they are searched."""
    return store.open(name, model_digest=store.manifest(name).encoder.model_digest)


async def _ended(held: _Held) -> None:
    if held.task is not None:
        held.task.cancel()
        await asyncio.wait([held.task])
    if held.live is not None:
        held.live.close()


async def _to_its_end(task: asyncio.Task[T]) -> T:
    """The result of a task that nothing interrupts; who is cancelled meanwhile learns it when the task is done."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # nobody else asks for it
        raise
