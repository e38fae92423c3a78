"""One measurement of one server: warm-up, then runs of a cold and a warm pass."""

from __future__ import annotations

import asyncio
import json
import platform
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from trilithon._bench.load import Pass, run_pass
from trilithon._bench.statistics import figures, over_runs
from trilithon._bench.trace import Workload, arrivals_s, body, prompts
from trilithon._bench.wire import Target
from trilithon._version import __version__
from trilithon.cli import _machine
from trilithon.errors import InvalidArgument, NotFound

FORMAT = "trilithon-bench-serve-1"


def measure(
    url: str,
    workload: Workload,
    *,
    model: str | None = None,
    api_key: str | None = None,
    slo: Mapping[str, float] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """
    Measure a server and return the result as JSON values.

    Each run has a cold pass (prompts that the server has not seen) and a warm pass (the same prompts once more), so
    that a prefix cache shows and cannot flatter.

    Args:
        url: http:// or https:// address; a path before /v1 is kept.
        workload: what to ask.
        model: the served name; default: the first that the server lists.
        api_key: sent as a bearer token.
        slo: see `figures`.
        on_progress: called with (what, done, of).
    Raises:
        ConnectionFailed: nothing answers. InvalidArgument: the URL is no HTTP address. NotFound: no model is served.
    """
    target = target_for(url, api_key)
    name = model or first_model(url, api_key)
    cold: list[Pass] = []
    warm: list[Pass] = []

    async def run() -> None:
        async def one(what: str, run_index: int, into: list[Pass] | None) -> None:
            bodies = [body(workload, name, prompt) for prompt in prompts(workload, run_index)]
            open_loop = workload.rate is not None and into is not None

            def report(done: int) -> None:
                if on_progress is not None:
                    on_progress(what, done, len(bodies))

            result = await run_pass(
                target,
                bodies,
                concurrency=None if open_loop else workload.concurrency or 1,
                arrivals_s=arrivals_s(workload, run_index),
                on_done=report,
            )
            if into is not None:
                into.append(result)

        if workload.warmup:
            await one("warm-up", -1, None)
        for index in range(workload.runs):
            await one(f"run {index + 1} cold", index, cold)
            await one(f"run {index + 1} warm", index, warm)

    started = time.time()
    asyncio.run(run())
    passes = {
        kind: [figures(one, answer_len=workload.answer_len, slo=slo or {}) for one in found]
        for kind, found in (("cold", cold), ("warm", warm))
    }
    answers = [answer for one in cold for answer in one.answers]
    return {
        "format": FORMAT,
        "url": url,
        "model": name,
        "fingerprint": next((answer.fingerprint for answer in answers if answer.fingerprint), ""),
        "started_unix_s": started,
        "workload": asdict(workload),
        "workload_digest": workload.digest,
        "slo": dict(slo or {}),
        "machine": machine(),
        "versions": {"trilithon": __version__, "python": platform.python_version()},
        "cold": over_runs(passes["cold"]),
        "warm": over_runs(passes["warm"]),
        "passes": passes,
        "texts": [answer.text for answer in cold[0].answers],
    }


def target_for(url: str, api_key: str | None) -> Target:
    """The completions endpoint of a server."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidArgument(f"`url` must be an http:// or https:// address. Given: {url!r}.", code="invalid_url")
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
    headers = {"authorization": f"Bearer {api_key}"} if api_key is not None else {}
    return Target(parts.hostname, parts.port or (443 if tls else 80), path, headers, tls)


def first_model(url: str, api_key: str | None) -> str:
    """The first model that the server lists."""
    from trilithon import Client

    with Client(url, api_key=api_key, timeout=30) as client:
        models = client.models.list()
    if not models:
        raise NotFound(f"{url} lists no model. Name one with --model.", code="model_not_found")
    return models[0].id


def machine() -> dict[str, Any]:
    """This machine, as results name it."""
    found = _machine.describe()
    return {
        "cpu": found.cpu,
        "num_cpus": found.num_cpus,
        "memory_gib": round((found.memory_bytes or 0) / 2**30),
        "system": found.system,
        "vector_flags": sorted(flag for flag in found.cpu_flags if flag.startswith(("avx", "amx"))),
    }


def save(result: Mapping[str, Any], path: str) -> None:
    """Write a result as JSON."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
