"""
What both fronts call: the job store from an event loop.

The store's methods block, so they run in a small pool of threads. What is in flight is known, so that a drain can wait
for it; streams of events have no end of their own and are ended by the drain's first word. Events are read from the
table again and again, less often while nothing happens: whoever writes them need not know who reads. PostgreSQL's
NOTIFY would save a reader a second at most, and has the commits of all writers wait for one lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

from trilithon import _store
from trilithon.errors import NotFound, Overloaded, Unavailable
from trilithon_finetune.config import JobConfig
from trilithon_finetune.errors import FinetuneError
from trilithon_finetune.jobs.records import Event
from trilithon_finetune.jobs.reservations import reserve
from trilithon_finetune.jobs.service import Jobs, StoreLimits
from trilithon_finetune.jobs.states import FINAL
from trilithon_finetune.paths import StorePaths
from trilithon_finetune.sources import sources_of
from trilithon_parallel.config import load_config
from trilithon_parallel.placement import global_shapes
from trilithon_server.catalog import Catalog
from trilithon_server.config import EngineConfig, ServeConfig
from trilithon_server.errors import draining
from trilithon_server.service import Service
from trilithon_server.validation import invalid, nearest, shown

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 8
POLL_S, MAX_POLL_S = 0.1, 1.0
"""How long a stream waits before it looks again: at first, and at most."""

EVENTS_AT_ONCE = 200

_FINAL_KINDS = frozenset(state.value for state in FINAL)


class Door:
    """
    The store, opened by `open`.

    Args:
        config: with `jobs.store` set.
    """

    def __init__(self, config: ServeConfig) -> None:
        assert config.jobs.store is not None
        self.limits = config.limits
        self.paths = StorePaths(Path(config.jobs.store))
        catalog = config.server.catalog
        self.catalog = Catalog(self.paths.models if catalog is None else Path(catalog))
        self._config = config
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="jobs")
        self._jobs: Jobs | None = None
        self._service: Service | None = None
        self._reservation: Path | None = None
        self._tasks: set[asyncio.Task[object]] = set()
        self._streams = 0
        self._draining = asyncio.Event()
        self._aborted = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def jobs(self) -> Jobs:
        """The store; every method of it blocks."""
        assert self._jobs is not None
        return self._jobs

    async def open(self, service: Service) -> None:
        """
        Raises:
            ValueError: the store cannot be opened.
        """
        self._service = service
        limits = StoreLimits(
            file_bytes=self.limits.max_file_bytes,
            tenant_bytes=self.limits.max_files_bytes,
            tenant_files=self.limits.max_files,
            tenant_jobs=self.limits.max_jobs_per_tenant,
        )
        try:
            self._jobs = await self.run(Jobs, self._config.jobs.database, self.paths, limits=limits)
        except FinetuneError as error:
            raise ValueError(str(error)) from None
        self._reservation = await self.run(self._reserve)
        service.find_file = self.find_file

    async def close(self) -> None:
        """Release the store and its threads; idempotent."""
        jobs, self._jobs = self._jobs, None
        reservation, self._reservation = self._reservation, None
        if reservation is not None:
            await self.run(reservation.unlink, missing_ok=True)
        if jobs is not None:
            await self.run(jobs.close)
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _reserve(self) -> Path:
        """Tell workers on this host what serving takes."""
        jobs, memory = self._config.jobs, self._config.jobs.reserve_memory
        if memory is None:
            memory = sum(_engine_bytes(engine) for engine in self._config.engines)
        return reserve(self.paths, memory_bytes=memory, cores=jobs.reserve_cores)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run something that blocks in one of the door's threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, functools.partial(work, *args, **kwargs))

    async def open_file(self, file_id: str, *, tenant: str) -> BinaryIO:
        """
        The bytes of a file, to be read in threads and closed by the caller.

        Raises:
            NotFound: the tenant has no such file.
        """
        path = await self.run(self.jobs.file_path, file_id, tenant=tenant)
        try:
            return await self.run(path.open, "rb")
        except FileNotFoundError:  # deleted in between
            raise NotFound("no such file.", code="file_not_found") from None

    async def find_file(self, file_id: str, tenant: str) -> Path:
        """
        Where the bytes of a file lie.

        Raises:
            NotFound: the tenant has no such file.
        """
        return await self.run(self.jobs.file_path, file_id, tenant=tenant)

    # -- models ---------------------------------------------------------------------------------------------

    def paths_of(self, config: JobConfig, *, tenant: str) -> dict[str, str]:
        """
        The places of what a configuration names but for its data, as `job.json` has them.

        Raises:
            NotFound: `model_not_found`, `knowledge_not_found`, `file_not_found`. A path is never taken.
            InvalidArgument: a model is an adapter.
        """
        found = self.base_paths(config.model, tenant=tenant)
        for source in sources_of(config):
            if source.kind == "model":
                found[source.key] = self.base_paths(source.name, tenant=tenant, field=source.field)["model_dir"]
            elif source.kind == "concepts":
                found[source.key] = self._concepts(source.name)
            else:
                found[source.key] = str(self.jobs.file_path(source.name, tenant=tenant))
                found[f"{source.option}_name"] = self.jobs.get_file(source.name, tenant=tenant).filename
        return found

    def _concepts(self, name: str) -> str:
        known = self._config.server.concepts
        if known is None or Path(known).stem != name:
            here = "none" if known is None else f"`{Path(known).stem}`"
            message = f"no concepts are named {shown(name)}. Known here: {here}."
            raise NotFound(message, code="knowledge_not_found", hint="Serve some: server.concepts.")
        return known

    def base_paths(self, name: str, *, tenant: str, field: str = "model") -> dict[str, str]:
        """
        The directory of what a job may start from, as `model_dir`: a model served here, a whole model that an earlier
        job made, or a name of the model store.

        Args:
            field: that names it.
        Raises:
            NotFound: `model_not_found`. A path is never taken.
            InvalidArgument: it is an adapter.
        """
        served = {engine.served_name or engine.name: engine.model for engine in self._config.engines}
        if name in served:
            return {"model_dir": served[name]}
        made = self.catalog.get(name, tenant=tenant)
        if made is not None and made.kind == "model":
            return {"model_dir": str(made.path)}
        if made is not None:
            rule = f"must be a whole model, and this is an adapter of `{made.base}`"
            raise invalid(field, rule, given=name, code="invalid_model", todo="Name its base.")
        stored = {model.name: str(model.path) for model in _store.list_models() if not model.problem}
        if name in stored:
            return {"model_dir": stored[name]}
        known = [*served, *stored, *(entry.name for entry in self.catalog.entries(tenant=tenant))]
        names = ", ".join(f"`{item}`" for item in known[:16])
        message = f"no model {shown(name)} to start from. Here are: {names}.{nearest(name, known)}"
        raise NotFound(message, code="model_not_found")

    # -- what is in flight ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """
        The frame of a call that a drain waits for.

        Raises:
            Unavailable: the server is on its way down, or the drain's limit has passed.
        """
        self.refuse_when_draining()
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if not self._aborted:
                raise
            task.uncancel()
            raise _shutting_down() from None
        finally:
            self._tasks.discard(task)
            if not self._tasks:
                self._idle.set()

    def refuse_when_draining(self) -> None:
        """
        Raises:
            Unavailable: the server takes no new work.
        """
        if self._draining.is_set() or (self._service is not None and self._service.draining):
            raise draining()

    def drain(self) -> None:
        """Take no more work, and end streams of events."""
        self._draining.set()

    async def wait_idle(self) -> None:
        """Return when no call is in flight."""
        await self._idle.wait()

    def abort(self) -> None:
        """End the calls that are in flight."""
        self._aborted = True
        for task in self._tasks:
            task.cancel()

    # -- events ---------------------------------------------------------------------------------------------

    async def follow(self, job_id: str, *, tenant: str, after_seq: int = 0, wait: bool = True) -> AsyncGenerator[Event]:
        """
        Events of a job, each once and in order, until the final one; without `wait` until the newest.

        Raises:
            NotFound: there is no such job.
            Overloaded: too many streams.
            Unavailable: the server goes down; the caller resumes elsewhere or later.
        """
        job = await self.run(self.jobs.get, job_id, tenant=tenant)
        if self._streams >= self.limits.max_event_streams:
            raise Overloaded(
                f"the server follows at most {self.limits.max_event_streams} jobs at once. Try again later.",
                code="too_many_streams",
                retry_after_s=5.0,
            )
        self._streams += 1
        try:
            seq, pause_s = after_seq, POLL_S
            while not (job.finished and seq >= job.last_seq):
                events = await self.run(self.jobs.events, job_id, tenant=tenant, after_seq=seq, limit=EVENTS_AT_ONCE)
                for event in events:
                    yield event
                    seq, pause_s = event.seq, POLL_S
                    if event.kind in _FINAL_KINDS:
                        return
                if not events:
                    if not wait:
                        return
                    await self._pause(pause_s)
                    pause_s = min(MAX_POLL_S, 1.5 * pause_s)
                if self._draining.is_set():
                    raise _shutting_down()
        finally:
            self._streams -= 1

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._draining.wait()


def _engine_bytes(engine: EngineConfig) -> int:
    """Weights, and a cache that has a size of its own."""
    shapes = global_shapes(load_config(Path(engine.model)))
    element = 4 if engine.dtype in ("auto", "float32") else 2
    return element * sum(map(math.prod, shapes.values())) + engine.num_ranks * (engine.kv_cache_bytes or 0)


def _shutting_down() -> Unavailable:
    return Unavailable("the server is shutting down.", code="server_shutting_down", retry_after_s=5.0)
