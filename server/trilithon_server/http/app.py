"""The HTTP application: the table of routes, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route as PathRoute
from starlette.routing import Router

from trilithon_server.auth import PUBLIC_PATHS
from trilithon_server.config import ServeConfig
from trilithon_server.extension import Extension
from trilithon_server.http import (
    adapters,
    dialogue,
    extract,
    native,
    openai,
    openqa,
    operations,
    retrieval,
    schemas,
    stories,
    synthesis,
)
from trilithon_server.http.endpoint import Endpoint, NotFoundEndpoint, Route
from trilithon_server.service import Service

REQUEST_HEADERS = ("authorization", "content-type", "idempotency-key", "last-event-id", "x-api-key", "x-request-id")
"""What a page of an allowed origin may send."""

_MODEL_QUERY = {
    "after": {"type": "string"},
    "limit": {"type": "integer", "minimum": 0, "maximum": 1000},
    "kind": {"enum": ["base", "adapter", "merged", "alias", "encoder"]},
}

ROUTES: tuple[Route, ...] = (
    Route(
        method="GET", path="/livez", access="public", handler=operations.livez, answer="Health",
        summary="The server's loop answers.",
    ),
    Route(
        method="GET", path="/readyz", access="public", handler=operations.readyz, answer="Health",
        summary="Every engine answers now.",
    ),
    Route(
        method="GET", path="/health", access="public", handler=operations.readyz, answer="Health",
        summary="The same as /readyz.",
    ),
    Route(
        method="GET", path="/startupz", access="public", handler=operations.startupz, answer="Health",
        summary="Every engine has been ready once.",
    ),
    Route(
        method="GET", path="/metrics", handler=operations.metrics, counted=False, media="text/plain",
        summary="Metrics in Prometheus' text form.",
    ),
    Route(
        method="GET", path="/openapi.json", access="ui", handler=operations.openapi, counted=False,
        summary="This document.",
    ),
    *(
        Route(
            method="GET", path=path, access="ui", handler=operations.page(file), counted=False, media="text/html",
            summary=summary,
        )
        for path, file, summary in operations.PAGES
    ),
    Route(
        method="GET", path="/static/{name}", access="ui", handler=operations.static, counted=False,
        media="*/*", summary="A file of the pages.",
    ),
    Route(
        method="GET", path="/v1/models", handler=openai.models, answer="Models", query=_MODEL_QUERY, counted=False,
        summary="What is served.",
    ),
    Route(
        method="GET", path="/v1/models/{id}", handler=openai.model, answer="Model", counted=False,
        summary="One model.",
    ),
    Route(
        method="POST", path="/v1/chat/completions", handler=openai.chat, request=schemas.ChatRequest,
        parameters=True, openai=True, hidden=openai.CHAT_HIDDEN, answer="ChatAnswer", stream=True,
        summary="An answer to a conversation, in OpenAI's shape.",
    ),
    Route(
        method="POST", path="/v1/completions", handler=openai.completions, request=schemas.CompletionRequest,
        parameters=True, openai=True, answer="CompletionAnswer", stream=True,
        summary="Text that goes on from a prompt, in OpenAI's shape.",
    ),
    Route(
        method="POST", path="/v1/embeddings", handler=openai.embeddings, request=schemas.EmbeddingRequest,
        parameters=True, openai=True, hidden=openai.EMBEDDING_HIDDEN, answer="EmbeddingAnswer",
        summary="Vectors of texts, in OpenAI's shape.",
    ),
    Route(
        method="POST", path="/v1/generate", handler=native.generate, request=schemas.GenerateRequest,
        parameters=True, answer="GenerateAnswer", stream=True,
        summary="Text that goes on from a prompt or a conversation.",
    ),
    Route(
        method="POST", path="/v1/score", handler=native.score_route, request=schemas.ScoreRequest,
        parameters=True, hidden=native.SCORE_HIDDEN, answer="ScoreAnswer",
        summary="Log-probabilities of given continuations.",
    ),
    Route(
        method="POST", path="/v1/tokenize", handler=native.tokenize_route, request=schemas.TokenizeRequest,
        answer="TokenizeAnswer", summary="Texts to token ids.",
    ),
    Route(
        method="POST", path="/v1/detokenize", handler=native.detokenize_route, request=schemas.DetokenizeRequest,
        answer="DetokenizeAnswer", summary="Token ids to texts.",
    ),
    Route(
        method="POST", path="/v1/render", handler=native.render_route, request=schemas.RenderRequest,
        answer="RenderAnswer", summary="A conversation as the model's template renders it.",
    ),
    *extract.ROUTES,
    *dialogue.ROUTES,
    *stories.ROUTES,
    *retrieval.ROUTES,
    *openqa.ROUTES,
    *synthesis.ROUTES,
    *adapters.ROUTES,
    Route(
        method="DELETE", path="/v1/requests/{id}", handler=native.abort, answer="AbortAnswer", counted=False,
        summary="End a request of the same key.",
    ),
    Route(
        method="PUT", path="/api", handler=native.megatron, request=schemas.MegatronRequest, answer="MegatronAnswer",
        summary="Text generation with the body of Megatron-LM's server.",
    ),
    Route(
        method="GET", path="/admin/v1/status", access="admin", handler=operations.admin_status,
        answer="StatusAnswer", counted=False, summary="What the server is doing.",
    ),
    Route(
        method="POST", path="/admin/v1/drain", access="admin", handler=operations.drain,
        request=schemas.DrainRequest, answer="DrainAnswer", counted=False,
        summary="Take no more work, finish what is in flight, then stop.",
    ),
    Route(
        method="POST", path="/admin/v1/abort-all", access="admin", handler=operations.abort_all,
        request=schemas.ModelOnlyRequest, answer="AbortAllAnswer", counted=False,
        summary="End every request, queued or running.",
    ),
    Route(
        method="POST", path="/admin/v1/reset-prefix-cache", access="admin", handler=operations.reset_prefix_cache,
        request=schemas.ModelOnlyRequest, counted=False,
        summary="Forget every cached block that no request holds.",
    ),
    Route(
        method="POST", path="/admin/v1/log-level", access="admin", handler=operations.log_level,
        request=schemas.LogLevelRequest, answer="LogLevelAnswer", counted=False, summary="Change how much is logged.",
    ),
)  # fmt: skip
"""Every route: what is served, what the OpenAPI document says and what the key test walks."""

assert {route.path for route in ROUTES if route.access == "public"} == set(PUBLIC_PATHS)


def all_routes(extensions: Sequence[Extension]) -> tuple[Route, ...]:
    """The server's own routes and those of its extensions."""
    return (*ROUTES, *(route for extension in extensions for route in extension.routes))


def build_app(service: Service, *, config: ServeConfig, extensions: Sequence[Extension] = ()) -> Starlette:
    """
    The ASGI application over a service.

    Args:
        service: answers.
        config: for the origins that browsers may call from.
        extensions: whose routes are served too.
    """
    by_path: dict[str, list[Route]] = {}
    routes = all_routes(extensions)
    for route in routes:
        by_path.setdefault(route.path, []).append(route)
    paths: Sequence[PathRoute] = [
        PathRoute(path.replace("{id}", "{id:path}"), Endpoint(service, methods)) for path, methods in by_path.items()
    ]
    middleware = []
    if config.server.allow_origin:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(config.server.allow_origin),
                allow_methods=["GET", "POST", "PUT", "DELETE"],
                allow_headers=list(REQUEST_HEADERS),
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    app = Starlette(middleware=middleware)
    app.state.routes = routes
    app.state.schemas = {name: schema for extension in extensions for name, schema in extension.schemas.items()}
    app.router = Router(routes=paths, default=NotFoundEndpoint(service), redirect_slashes=False)
    return app
