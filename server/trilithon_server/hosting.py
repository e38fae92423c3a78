"""
Models that are started when the first request asks for them: whole directories that finetuning made.

    ensure() --> a slot (stop the least recently used idle one) --> engine_start --> supervisor starts the ranks
                 --> the leader says hello --> every request that waited goes on

A hosted engine is no part of the server's readiness: while it loads, and when it cannot be loaded, its own requests
wait or are refused, and nobody else's. A request holds the model for as long as its call lives, so what is stopped is
idle: no request in flight is ever cut.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from trilithon.errors import DeadlineExceeded, FailedPrecondition, Overloaded, TrilithonError
from trilithon_server.catalog import CatalogEntry
from trilithon_server.config import EngineConfig, ServeConfig
from trilithon_server.config_sources import is_seq2seq
from trilithon_server.engine_client import EngineClient
from trilithon_server.errors import draining
from trilithon_server.metrics import Metrics
from trilithon_server.preflight import ModelRefused, check_model, engine_spec
from trilithon_server.served import Call, ServedModel

Report = Callable[..., None]
"""Sends an event to the supervisor."""

Load = Callable[[EngineConfig, EngineClient], ServedModel]
"""Reads tokenizer, template and shape of a model directory; runs in a thread."""

HostedState = Literal["available", "loading", "ready", "failed"]

REMEMBER_FAILURE_S = 60.0  # a model that cannot be loaded is not tried again for this long
STOP_WAIT_S = 30.0  # the supervisor kills what does not end by itself long before that
_POLL_S = 0.1  # how late an engine that became idle by itself is seen

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Hosted:
    """One model that has an engine, or will have."""

    entry: CatalogEntry
    engine: EngineConfig
    client: EngineClient
    model: ServedModel | None = None
    users: int = 0
    """Calls that hold it: waiting for it, or at work."""
    last_used_s: float = 0.0
    waiters: set[asyncio.Future[None]] = field(default_factory=set)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    """The supervisor has said that its ranks are gone."""
    refusal: Callable[[], TrilithonError] | None = None
    """Why it will not be there; a new error for each request, since errors carry their request's id."""
    task: asyncio.Task[None] | None = None
    started: bool = False
    stopping: bool = False

    @property
    def ready(self) -> bool:
        """Whether requests can go to it now."""
        return self.model is not None and self.client.takes_requests

    @property
    def idle(self) -> bool:
        """Whether it may be stopped."""
        return self.started and not self.stopping and not self.users and not self.client.in_flight

    def wake(self) -> None:
        """Let everyone who waits for it go on, or fail with its error."""
        for waiter in self.waiters:
            if waiter.done():
                continue
            if self.refusal is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(self.refusal())
        self.waiters.clear()


class Hosting:
    """
    Starts engines for finetuned model directories on demand and stops those that nobody uses.

    Args:
        config: the server's; `server.max_hosted_models` at once, `server.hosted_memory_fraction` of the memory each.
        make_client: a client for an engine of that name.
        load: what the service needs of a model directory.
        report: to the supervisor.
        metrics: show what runs.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        make_client: Callable[[str], EngineClient],
        load: Load,
        report: Report,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._make_client = make_client
        self._load = load
        self._report = report
        self._metrics = metrics
        self._hosted: dict[tuple[str, str, str], _Hosted] = {}
        self._failed: dict[tuple[str, str, str], tuple[float, str]] = {}  # when, and the reason
        self._running: dict[str, _Hosted] = {}  # by engine name: those that hold a slot
        self._ends: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Lock()
        self._changed = asyncio.Event()
        self._count = 0
        self._draining = False

    # -- for the service ------------------------------------------------------------------------------------

    async def ensure(self, entry: CatalogEntry, call: Call) -> ServedModel:
        """
        The model behind a catalogue entry, started if it is not running; `call` holds it until it ends.

        Raises:
            FailedPrecondition: `model_load_failed`, with the reason.
            Overloaded: `queue_full`, as many requests wait for this model as may; `hosting_full`, every engine that
                may run is at work and none became idle in time.
            DeadlineExceeded: `queue_timeout`, the model was not there in time.
            Unavailable: `draining`.
        """
        hosted = self._hosted.get(_key(entry))
        if self._draining and (call.late or hosted is None or not hosted.ready):
            raise draining()
        hosted = hosted or self._begin(entry)
        hosted.users += 1
        hosted.last_used_s = time.monotonic()
        call.ends.append(lambda: self._release(hosted))
        while not hosted.ready:
            await self._wait(hosted, call)
        assert hosted.model is not None  # it is ready
        return hosted.model

    def state(self, entry: CatalogEntry) -> HostedState:
        """Whether a model of the catalogue answers now, would have to be loaded, or cannot be."""
        hosted = self._hosted.get(_key(entry))
        if hosted is not None:
            return "ready" if hosted.ready else "loading"
        return "failed" if self._known_failure(_key(entry)) is not None else "available"

    def running(self, entry: CatalogEntry) -> ServedModel | None:
        """What runs of a catalogue entry now."""
        hosted = self._hosted.get(_key(entry))
        return hosted.model if hosted is not None else None

    @property
    def models(self) -> list[ServedModel]:
        """What runs now."""
        return [hosted.model for hosted in self._running.values() if hosted.model is not None]

    # -- for the front --------------------------------------------------------------------------------------

    @property
    def clients(self) -> list[EngineClient]:
        """Engines that hold a slot, those that load included."""
        return [hosted.client for hosted in self._running.values()]

    def engine_event(self, name: str, state: str, *, cause: str, kind: str) -> None:
        """The supervisor's word on a hosted engine."""
        hosted = self._running.get(name)
        if hosted is None:
            return
        if state == "stopped":
            hosted.stopped.set()
        elif state == "failed":
            hosted.client.engine_event("failed", cause=cause, kind=kind)
            hosted.stopped.set()
            self._fail(hosted, cause)
        elif state in ("lost", "loading"):
            hosted.client.engine_event("lost" if state == "lost" else "loading", cause=cause, kind=kind)

    def drain(self) -> None:
        """Start nothing more and refuse who waits; requests in flight go on."""
        self._draining = True
        for hosted in list(self._hosted.values()):
            hosted.client.drain()
            if not hosted.ready:
                hosted.refusal = draining
                hosted.wake()

    async def stop(self) -> None:
        """Disconnect from every hosted engine; their ranks end with the supervisor. Idempotent."""
        self._draining = True
        everyone = {*self._hosted.values(), *self._running.values()}
        tasks = [hosted.task for hosted in everyone if hosted.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._ends, return_exceptions=True)
        await asyncio.gather(*(_end(hosted) for hosted in everyone))

    # -- waiting --------------------------------------------------------------------------------------------

    async def _wait(self, hosted: _Hosted, call: Call) -> None:
        limits = self._config.limits
        if hosted.refusal is not None:
            raise hosted.refusal()
        if len(hosted.waiters) >= limits.max_queue_requests:
            message = (
                f"at most {limits.max_queue_requests} requests may wait for `{hosted.entry.name}` to load. "
                "Retry in 5 s."
            )
            raise Overloaded(message, code="queue_full", retry_after_s=5.0)
        end_s = call.arrived_s + limits.default_queue_timeout_ms / 1000
        if call.deadline_s is not None:
            end_s = min(end_s, call.deadline_s)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        hosted.waiters.add(waiter)
        try:
            async with asyncio.timeout(end_s - time.monotonic()):
                await waiter
        except TimeoutError:
            waited_ms = round(1000 * (time.monotonic() - call.arrived_s))
            if not hosted.started:
                message = (
                    f"every model that may run at once ({self._config.server.max_hosted_models}) is at work, and none "
                    f"became idle within {waited_ms} ms. Retry later, or have server.max_hosted_models raised."
                )
                raise Overloaded(message, code="hosting_full", retry_after_s=5.0) from None
            message = f"`{hosted.entry.name}` was still loading after {waited_ms} ms."
            raise DeadlineExceeded(message, code="queue_timeout", retry_after_s=5.0) from None
        finally:
            hosted.waiters.discard(waiter)

    def _release(self, hosted: _Hosted) -> None:
        hosted.users -= 1
        hosted.last_used_s = time.monotonic()
        self._changed.set()

    # -- starting -------------------------------------------------------------------------------------------

    def _begin(self, entry: CatalogEntry) -> _Hosted:
        key = _key(entry)
        known = self._known_failure(key)
        if known is not None:
            raise _load_failed(entry, known)
        self._count += 1
        engine = hosted_engine(self._config, entry, name=f"hosted-{self._count}")
        hosted = _Hosted(entry, engine, self._make_client(engine.name))
        hosted.client.hello_listeners.append(hosted.wake)
        self._hosted[key] = hosted
        hosted.task = asyncio.create_task(self._start(hosted), name=engine.name)
        return hosted

    async def _start(self, hosted: _Hosted) -> None:
        try:
            await self._take_slot(hosted)
            if not hosted.users:  # everyone who waited has left
                self._forget(hosted)
                return
            hosted.started = True
            spec, model = await asyncio.to_thread(self._prepare, hosted)
        except (ModelRefused, OSError, ValueError) as error:
            self._fail(hosted, str(error))
            return
        except Exception as error:
            _log.error("internal_error", extra={"model": hosted.entry.name}, exc_info=error)
            self._fail(hosted, "the server could not read it; its log has the cause.")
            return
        if hosted.stopping:  # everyone who waited has left meanwhile, and another model has its place
            return
        _log.info("hosting", extra={"engine": hosted.engine.name, "model": hosted.entry.name})
        hosted.model = model
        self._metrics.watch_engine(hosted.entry.name, hosted.client)
        await hosted.client.start()
        self._report(event="engine_start", name=hosted.engine.name, spec=spec)

    def _prepare(self, hosted: _Hosted) -> tuple[str, ServedModel]:
        """What can be known without starting anything, and what the ranks are told. Encoders run in fp32."""
        engine = hosted.engine
        if check_model(engine) == "encoder":
            engine = engine.model_copy(update={"dtype": "float32"})
        spec = engine_spec(engine, limits_queue=self._config.limits.max_queue_requests)
        return spec.to_json(), self._load(engine, hosted.client)

    async def _take_slot(self, hosted: _Hosted) -> None:
        async with self._slots:
            while len(self._running) >= self._config.server.max_hosted_models and hosted.users:
                self._changed.clear()
                idle = [item for item in self._running.values() if item.idle]
                if idle:
                    await self._stop(min(idle, key=lambda item: item.last_used_s))
                    continue
                try:
                    async with asyncio.timeout(_POLL_S):
                        await self._changed.wait()
                except TimeoutError:
                    continue
            if hosted.users:
                self._running[hosted.engine.name] = hosted

    async def _stop(self, hosted: _Hosted) -> None:
        """Take an idle engine out of service and wait until its ranks are gone."""
        hosted.stopping = True
        self._hosted.pop(_key(hosted.entry), None)  # who asks for it from here on begins anew
        _log.info("hosting_ends", extra={"engine": hosted.engine.name, "model": hosted.entry.name})
        hosted.client.drain()
        self._report(event="engine_stop", name=hosted.engine.name)
        try:
            async with asyncio.timeout(STOP_WAIT_S):
                await hosted.stopped.wait()
        except TimeoutError:
            _log.error("hosting_stop_timeout", extra={"engine": hosted.engine.name, "seconds": STOP_WAIT_S})
        self._forget(hosted)
        await _end(hosted)

    # -- ends -----------------------------------------------------------------------------------------------

    def _fail(self, hosted: _Hosted, reason: str) -> None:
        _log.warning("hosting_failed", extra={"model": hosted.entry.name, "cause": reason})
        hosted.refusal = lambda: _load_failed(hosted.entry, reason)
        self._failed[_key(hosted.entry)] = (time.monotonic(), reason)
        self._forget(hosted)
        hosted.wake()
        end = asyncio.create_task(_end(hosted), name=f"{hosted.engine.name}-end")
        self._ends.add(end)
        end.add_done_callback(self._ends.discard)

    def _forget(self, hosted: _Hosted) -> None:
        """Free its slot."""
        if self._hosted.get(_key(hosted.entry)) is hosted:
            del self._hosted[_key(hosted.entry)]
        if self._running.pop(hosted.engine.name, None) is not None and hosted.model is not None:
            self._metrics.forget_engine(hosted.client)
        self._changed.set()

    def _known_failure(self, key: tuple[str, str, str]) -> str | None:
        failed_s, reason = self._failed.get(key, (0.0, None))
        if reason is not None and time.monotonic() - failed_s > REMEMBER_FAILURE_S:
            del self._failed[key]
            return None
        return reason


def hosted_engine(config: ServeConfig, entry: CatalogEntry, *, name: str) -> EngineConfig:
    """
    How a finetuned model is run: on one rank, as its base is run here where the base is served, else as the first
    engine is. Its cache takes `server.hosted_memory_fraction` of the memory left; its threads are a fair share.
    """
    base = next((engine for engine in config.engines if engine.served_name == entry.base), None)
    pattern = base or config.engines[0]
    cores = len(os.sched_getaffinity(0))
    return pattern.model_copy(
        update={
            "name": name,
            "model": str(entry.path),
            "served_name": entry.name,
            "tp": 1,
            "pp": 1,
            "dtype": base.dtype if base is not None else "float32",
            "max_context": base.max_context if base is not None else None,
            "kv_cache_bytes": None,
            "memory_fraction": config.server.hosted_memory_fraction,
            "num_threads": max(1, cores // (len(config.engines) + config.server.max_hosted_models)),
            "chat_template": None,
            "batch_invariant": pattern.batch_invariant and not is_seq2seq(entry.path),
        }
    )


async def _end(hosted: _Hosted) -> None:
    await hosted.client.stop()
    if hosted.model is not None and hosted.model.checker is not None:
        await hosted.model.checker.stop()


def _key(entry: CatalogEntry) -> tuple[str, str, str]:
    return entry.tenant, entry.name, entry.digest


def _load_failed(entry: CatalogEntry, reason: str) -> FailedPrecondition:
    """The reason without the server's paths (bar S7)."""
    said = reason.replace(str(entry.path), "its directory").strip() or "its ranks did not start."
    return FailedPrecondition(
        f"model `{entry.name}` cannot be loaded: {said}",
        code="model_load_failed",
        hint="Name another model, or make it anew.",
    )
