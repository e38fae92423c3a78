"""Health, metrics, pages, and the routes that look after the server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from trilithon.errors import NotFound
from trilithon_server.http import schemas
from trilithon_server.http.exchange import Exchange
from trilithon_server.http.parse import parse
from trilithon_server.metrics import CONTENT_TYPE
from trilithon_server.served import Call
from trilithon_server.service import Service
from trilithon_server.state import set_log_level, status

CSP = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Pages load nothing from elsewhere and run no inline script."""

PAGES = (
    ("/docs", "docs.html", "This document as a page."),
    ("/", "index.html", "The playground."),
    ("/dialogue", "dialogue.html", "The page of conversations that stand on documents and actors."),
    ("/stories", "stories.html", "The page of stories."),
    ("/answers", "answers.html", "The page of questions and the passages that answer them."),
    ("/jobs", "jobs.html", "The page of finetuning jobs; where none are served, it says how to turn them on."),
)
"""Path, file and what it is."""

_MEDIA = {
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".svg": b"image/svg+xml",
}


def web_folder() -> Path | None:
    """The pages: inside the installed package, or `clients/web` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "web", package.parents[1] / "clients" / "web"):
        if (folder / "index.html").is_file():
            return folder
    return None


async def livez(service: Service, exchange: Exchange) -> None:
    """The loop answers; engines are not asked."""
    await exchange.respond_json({"status": "ok", "reason": ""})


async def readyz(service: Service, exchange: Exchange) -> None:
    """Whether every engine answers now."""
    ready, reason = service.readiness()
    document = {"status": "ok" if ready else "unavailable", "reason": "" if ready else reason}
    await exchange.respond_json(document, status=200 if ready else 503)


async def startupz(service: Service, exchange: Exchange) -> None:
    """Whether every engine has been ready once."""
    started = service.has_started()
    document = {"status": "ok" if started else "unavailable", "reason": "" if started else "loading"}
    await exchange.respond_json(document, status=200 if started else 503)


async def metrics(service: Service, exchange: Exchange, call: Call) -> None:
    """Prometheus text."""
    await exchange.respond(200, service.metrics.render(), media=CONTENT_TYPE.encode())


async def openapi(service: Service, exchange: Exchange) -> None:
    """The document that this server keeps to."""
    from trilithon_server.http.openapi import document

    state = exchange.app.state
    await exchange.respond_json(document(state.routes, schemas=state.schemas))


def page(file: str) -> Callable[[Service, Exchange], Awaitable[None]]:
    """The handler of one of `PAGES`."""

    async def show(service: Service, exchange: Exchange) -> None:
        await _page(exchange, file)

    return show


async def static(service: Service, exchange: Exchange) -> None:
    """A file of the pages."""
    await _page(exchange, exchange.path_params["name"])


async def _page(exchange: Exchange, name: str) -> None:
    folder = web_folder()
    file = folder / name if folder is not None else None
    # The name is one path segment; only files that lie there by that very name are read.
    if file is None or file.suffix not in _MEDIA or file.name != name or not file.is_file():
        raise NotFound("no such file.", code="file_not_found")
    headers = [
        (b"content-security-policy", CSP),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-cache"),
    ]
    await exchange.respond(200, file.read_bytes(), media=_MEDIA[file.suffix], headers=headers)


async def admin_status(service: Service, exchange: Exchange, call: Call) -> None:
    """GET /admin/v1/status"""
    await exchange.respond_json(status(service))


async def drain(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /admin/v1/drain"""
    body = parse(schemas.DrainRequest, await exchange.json(), service.limits, parameters=False)
    body.found.raise_if_any()
    in_flight = service.drain(body.body.limit_seconds)
    await exchange.respond_json({"requests_in_flight": in_flight})


async def abort_all(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /admin/v1/abort-all"""
    body = parse(schemas.ModelOnlyRequest, await exchange.json(), service.limits, parameters=False)
    body.found.raise_if_any()
    await exchange.respond_json({"aborted": service.abort_all(body.body.model)})


async def reset_prefix_cache(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /admin/v1/reset-prefix-cache"""
    body = parse(schemas.ModelOnlyRequest, await exchange.json(), service.limits, parameters=False)
    body.found.raise_if_any()
    service.reset_prefix_cache(body.body.model)
    await exchange.respond_json({})


async def log_level(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /admin/v1/log-level"""
    body = parse(schemas.LogLevelRequest, await exchange.json(), service.limits, parameters=False)
    body.found.raise_if_any()
    await exchange.respond_json({"previous": set_log_level(body.body.level)})
