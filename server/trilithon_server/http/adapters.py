"""The routes that load and unload adapters, move aliases and take them away."""

from __future__ import annotations

from trilithon_server import adapter_verbs
from trilithon_server.http import schemas
from trilithon_server.http.endpoint import Route
from trilithon_server.http.exchange import Exchange
from trilithon_server.http.openai import model_dict
from trilithon_server.http.parse import parse
from trilithon_server.served import Call
from trilithon_server.service import Service
from trilithon_server.validation import invalid


async def load(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/adapters"""
    parsed = parse(schemas.LoadAdapterRequest, await exchange.json(), service.limits, parameters=False)
    parsed.found.raise_if_any()
    body = parsed.body

    async def work() -> None:
        name = await adapter_verbs.load(
            service.names, body.id, call, alias=body.alias, allow_template_mismatch=body.allow_template_mismatch
        )
        await _tell(service, exchange, call, name)

    await exchange.race(work())


async def unload(service: Service, exchange: Exchange, call: Call) -> None:
    """DELETE /v1/adapters/{id}"""
    drain = exchange.query(("drain",)).get("drain", "false")
    if drain not in ("true", "false"):
        raise invalid("drain", "must be true or false", given=drain)

    async def work() -> None:
        in_flight = await adapter_verbs.unload(service.names, exchange.path_params["id"], call, drain=drain == "true")
        await exchange.respond_json({"requests_in_flight": in_flight})

    await exchange.race(work())


async def move(service: Service, exchange: Exchange, call: Call) -> None:
    """PUT /v1/aliases/{name}"""
    parsed = parse(schemas.AliasRequest, await exchange.json(), service.limits, parameters=False)
    parsed.found.raise_if_any()
    name, body = exchange.path_params["name"], parsed.body
    await adapter_verbs.set_alias(service.names, name, body.target, body.expected_target, call)
    await _tell(service, exchange, call, name)


async def delete(service: Service, exchange: Exchange, call: Call) -> None:
    """DELETE /v1/aliases/{name}"""
    expected = exchange.query(("expected_target",)).get("expected_target")
    name = exchange.path_params["name"]
    target = await adapter_verbs.delete_alias(service.names, name, expected, call)
    await exchange.respond_json({"alias": name, "target": target})


async def _tell(service: Service, exchange: Exchange, call: Call, name: str) -> None:
    await exchange.respond_json(model_dict(await service.names.describe(name, call.principal.tenant)))


ROUTES: tuple[Route, ...] = (
    Route(
        method="POST", path="/v1/adapters", access="admin", handler=load, request=schemas.LoadAdapterRequest,
        answer="Model", counted=False, more_errors=("409",),
        summary="Load an adapter before its first request.",
    ),
    Route(
        method="DELETE", path="/v1/adapters/{id}", access="admin", handler=unload, answer="UnloadAnswer",
        counted=False, more_errors=("503", "504"), query={"drain": {"enum": ["true", "false"]}},
        summary="Take an adapter out of memory once its requests have ended; its next use loads it again.",
    ),
    Route(
        method="PUT", path="/v1/aliases/{name}", access="admin", handler=move, request=schemas.AliasRequest,
        answer="Model", counted=False, more_errors=("409",), summary="Point an alias to a model.",
    ),
    Route(
        method="DELETE", path="/v1/aliases/{name}", access="admin", handler=delete, answer="DeletedAlias",
        counted=False, more_errors=("409", "503"), query={"expected_target": {"type": "string", "minLength": 1}},
        summary="Take an alias away; the model that it stands for stays.",
    ),
)  # fmt: skip
