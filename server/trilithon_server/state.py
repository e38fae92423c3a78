"""What the server is doing, as the admin calls of both protocols tell it."""

from __future__ import annotations

import logging
import time
from typing import Any

from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.served import ServedModel
from trilithon_server.service import VERSION, Service


def status(service: Service) -> dict[str, Any]:
    """StatusResponse of `trilithon.api.v1.AdminService`."""
    models = list(service.models.values())
    hello = models[0].engine.hello
    return {
        "version": VERSION,
        "fingerprint": service.fingerprint(hello) if hello is not None else "",
        "uptime_seconds": time.monotonic() - service.started_s,
        "draining": service.draining,
        "engines": [_engine(model) for model in service.running_models],
    }


def _engine(model: ServedModel) -> dict[str, Any]:
    engine = model.engine
    stats, hello = engine.stats or wire.Stats(), engine.hello or wire.Hello()
    return {
        "model": model.name,
        "state": engine.state,
        "cause": engine.cause,
        "tp": hello.tp,
        "pp": hello.pp,
        "dtype": hello.dtype,
        "steps": model.steps,
        "running": stats.running,
        "waiting": engine.queued_requests,
        "queue_tokens": engine.queued_tokens,
        "kv_blocks_free": stats.blocks_free,
        "kv_blocks_cached": stats.blocks_cached,
        "kv_blocks_in_use": stats.blocks_in_use,
        "restarts": sum(engine.losses.values()),
        "startup_seconds": dict(hello.startup_seconds),
        "memory_bytes": dict(hello.memory_bytes),
    }


def set_log_level(level: str) -> str:
    """Change how much this process logs; returns the level before."""
    root = logging.getLogger()
    previous = logging.getLevelName(root.level).lower()
    root.setLevel(level.upper())
    return previous
