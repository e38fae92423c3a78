"""Random requests against the hosting alone: never too many engines, none stopped that is held, none forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_tasks import Task

from trilithon.errors import TrilithonError
from trilithon_server.auth import Principal
from trilithon_server.catalog import CatalogEntry
from trilithon_server.config import EngineConfig, ServeConfig
from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.engine.group import EngineGroup
from trilithon_server.engine.hosted import HostedEngines
from trilithon_server.engine.spec import EngineSpec
from trilithon_server.engine_client import EngineClient
from trilithon_server.front import load_model
from trilithon_server.hosting import Hosting
from trilithon_server.metrics import Metrics, RequestRecord
from trilithon_server.served import Call

MOST = 2


class StandIn:
    """A supervisor that starts and stops at its own pace, and complains when it is asked for what cannot be."""

    def __init__(self, config: ServeConfig, rng: random.Random, sockets: Path) -> None:
        self.clients: dict[str, EngineClient] = {}
        self.running: set[str] = set()
        self.most = 0
        self.starts = 0
        self._config, self._rng, self._sockets = config, rng, sockets
        self._tasks: set[asyncio.Task[None]] = set()
        self.hosting = Hosting(
            config,
            make_client=self._client,
            load=lambda engine, client: load_model(engine, client, config),
            report=self._report,
            metrics=Metrics(),
        )

    def _client(self, name: str) -> EngineClient:
        client = EngineClient(name=name, socket_path=self._sockets / name, limits=self._config.limits)
        self.clients[name] = client
        return client

    def _report(self, *, event: str, name: str, **rest: Any) -> None:
        if event == "engine_start":
            assert name not in self.running
            self.running.add(name)
            self.starts += 1
            self.most = max(self.most, len(self.running))
            self._later(self._start(name))
        else:
            assert name not in HELD
            self._later(self._stop(name))

    def _later(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self, name: str) -> None:
        await asyncio.sleep(self._rng.random() * 0.02)
        client = self.clients[name]
        if name in self.running and client.state == "loading":
            client.hello, client.state = wire.Hello(vocab_size=256, max_context_tokens=64), "ready"
            for listener in client.hello_listeners:
                listener()

    async def _stop(self, name: str) -> None:
        await asyncio.sleep(self._rng.random() * 0.01)
        self.running.discard(name)
        self.hosting.engine_event(name, "stopped", cause="", kind="")


HELD: dict[str, int] = {}
"""Calls at work by engine name."""


def entry(number: int, path: Path) -> CatalogEntry:
    """A model of the catalogue."""
    return CatalogEntry(
        name=f"m{number}", kind="model", base="base", base_digest="", path=path, digest=str(number), tenant="t"
    )


def config_of(model: Path) -> ServeConfig:
    """A server with one engine and two places."""
    engine = EngineConfig(name="main", model=str(model), served_name="base", dtype="float32")
    return ServeConfig.model_validate(
        {"engines": [engine.model_dump()], "server": {"max_hosted_models": MOST, "hosted_memory_fraction": 0.01}}
    )


async def one_call(hosting: Hosting, wanted: CatalogEntry, *, patience_s: float, work_s: float) -> str:
    """A request: wait for the model, hold it for a while, let it go; how it ended."""
    now = time.monotonic()
    record = RequestRecord(route="r", model="")
    principal = Principal(key_id="k", tenant="t", scopes=frozenset({"user"}))
    call = Call(
        principal=principal, request_id="r", route="r", arrived_s=now, deadline_s=now + patience_s, record=record
    )
    try:
        model = await hosting.ensure(wanted, call)
        name = model.engine.name
        HELD[name] = HELD.get(name, 0) + 1
        try:
            assert model.name == wanted.name
            await asyncio.sleep(work_s)
            assert model.engine.state == "ready"
        finally:
            HELD[name] -= 1
            if not HELD[name]:
                del HELD[name]
    except TrilithonError as error:
        return error.code
    finally:
        for end in call.ends:
            end()
    return "ok"


async def settled(hosting: Hosting) -> None:
    """Return once every engine that has a place is ready; fails when that takes for ever."""
    end = time.monotonic() + 30
    while any(client.state != "ready" for client in hosting.clients):
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("seed", range(4))
async def test_R6_any_schedule_keeps_the_law(task_dirs: dict[Task, Path], tmp_path: Path, seed: int) -> None:
    """
    Hundreds of requests for five models in two places, some of which leave early: at most two engines at any moment,
    none stopped while a call holds it, every refusal typed, and in the end what runs is what the table holds.

    Inverse: without the look at `stopping` behind `_prepare` an engine is started that nobody will stop.
    """
    HELD.clear()
    rng = random.Random(seed)
    stand_in = StandIn(config_of(task_dirs["classify"]), rng, tmp_path)
    hosting = stand_in.hosting
    tasks: list[asyncio.Task[str]] = []
    for _ in range(150):
        wanted = entry(rng.randrange(5), task_dirs["classify"])
        patience_s = rng.choice([0.0, 0.005, 0.02, 10.0, 10.0, 10.0])
        work = one_call(hosting, wanted, patience_s=patience_s, work_s=rng.random() * 0.004)
        tasks.append(asyncio.create_task(work))
        if rng.random() < 0.1:
            rng.choice(tasks).cancel()
        await asyncio.sleep(rng.random() * 0.004)
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    await settled(hosting)

    told = {end for end in ends if isinstance(end, str)}
    others = [end for end in ends if not isinstance(end, str | asyncio.CancelledError)]
    assert others == []
    assert told <= {"ok", "queue_timeout", "hosting_full"}
    assert "ok" in told
    assert stand_in.most <= MOST
    assert stand_in.starts > MOST
    assert {client.name for client in hosting.clients} == stand_in.running
    await hosting.stop()


async def test_only_so_many_may_wait_for_a_model(task_dirs: dict[Task, Path], tmp_path: Path) -> None:
    """The queue in front of a model that loads is bounded by count."""
    config = config_of(task_dirs["classify"])
    config = config.model_copy(update={"limits": config.limits.model_copy(update={"max_queue_requests": 3})})
    stand_in = StandIn(config, random.Random(0), tmp_path)
    wanted = entry(0, task_dirs["classify"])
    ends = await asyncio.gather(*(one_call(stand_in.hosting, wanted, patience_s=10.0, work_s=0.0) for _ in range(5)))
    await stand_in.hosting.stop()

    assert sorted(ends) == ["ok", "ok", "ok", "queue_full", "queue_full"]


async def test_a_drain_refuses_who_waits(task_dirs: dict[Task, Path], tmp_path: Path) -> None:
    """Requests that wait for a model when the drain begins are told so at once, and later ones too."""
    stand_in = StandIn(config_of(task_dirs["classify"]), random.Random(0), tmp_path)
    wanted = entry(0, task_dirs["classify"])
    waiting = asyncio.create_task(one_call(stand_in.hosting, wanted, patience_s=10.0, work_s=0.0))
    await asyncio.sleep(0)
    stand_in.hosting.drain()
    late = await one_call(stand_in.hosting, wanted, patience_s=10.0, work_s=0.0)

    assert (await waiting, late) == ("draining", "draining")
    await stand_in.hosting.stop()


def test_an_external_launch_starts_nothing() -> None:
    """Where others start the ranks, the reason goes back to the front; a malformed wish is refused as well."""
    told: list[tuple[str, str, str]] = []

    def tell(name: str, state: str, *, kind: str = "", cause: str = "", rank: int = -1) -> None:
        told.append((name, state, cause))

    def never(spec: EngineSpec) -> EngineGroup:
        raise AssertionError(spec)

    external = HostedEngines(make_group=never, tell=tell, may_restart=lambda: True, refusal="started by someone else")
    external.on_event({"event": "engine_start", "name": "hosted-1", "spec": "{}"})
    local = HostedEngines(make_group=never, tell=tell, may_restart=lambda: True)
    with contextlib.suppress(AssertionError):
        local.on_event({"event": "engine_start", "name": "hosted-2", "spec": '{"name": "other", "model_dir": "x"}'})
    local.on_event({"event": "engine_start", "name": "hosted-3"})
    local.on_event({"event": "engine_stop", "name": "hosted-4"})

    assert [(name, state) for name, state, _ in told] == [
        ("hosted-1", "failed"), ("hosted-2", "failed"), ("hosted-3", "failed"), ("hosted-4", "stopped"),
    ]  # fmt: skip
    assert told[0][2] == "started by someone else"
