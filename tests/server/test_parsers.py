"""Clients that leave are noticed behind either of uvicorn's parsers: the application runs here, over a real engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable

import pytest
import uvicorn
from front_server import Front
from served import free_ports

from trilithon_server.config import EngineConfig, ServeConfig
from trilithon_server.engine_client import EngineClient
from trilithon_server.front import load_model
from trilithon_server.http.app import build_app
from trilithon_server.metrics import Metrics
from trilithon_server.service import Service

PARSERS = ("h11", "httptools")


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what nobody announces; the caller sets the time limit."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def application(front: Front, parser: str) -> AsyncIterator[tuple[EngineClient, int]]:
    """The HTTP application in this process, on a connection of its own to the running engine."""
    engine = EngineConfig(name="main", model=str(front.decoder), served_name="tiny")
    config = ServeConfig(engines=(engine,))
    client = EngineClient(name="main", socket_path=front.run_dir / "main.sock", limits=config.limits)
    service = Service(config, [load_model(engine, client, config)], Metrics())
    (port,) = free_ports(1)
    settings = uvicorn.Config(
        build_app(service, config=config), http=parser, lifespan="off", log_config=None, host="127.0.0.1", port=port
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server = uvicorn.Server(settings)
    await client.start()
    task = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(30):
            await until(lambda: server.started and client.state == "ready")
        yield client, port
    finally:
        server.should_exit = True
        await task
        await client.stop()


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
@pytest.mark.parametrize("parser", PARSERS)
async def test_R6_a_client_that_leaves_is_noticed(front: Front, parser: str, stream: bool) -> None:
    """A request whose connection closes is dropped within a second, streamed or not, h11 or httptools."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 500, "ignore_eos": True, "n": 4, "stream": stream}
    raw = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n"
    )

    async with application(front, parser) as (client, port), asyncio.timeout(30):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + b"\r\n" + raw)
        await until(lambda: client.in_flight > 0 and client.queued_requests == 0)
        writer.close()
        async with asyncio.timeout(1.0):
            await client.wait_idle()

    assert client.in_flight == 0
