"""What an operator does with adapters: load and unload them, point aliases to models, and take aliases away."""

from __future__ import annotations

import asyncio
import logging
import re
import time

from trilithon.errors import Conflict, DeadlineExceeded, FailedPrecondition, NotFound
from trilithon_server.adapters import MAX_SHOWN, Names
from trilithon_server.catalog import Catalog, CatalogConflict
from trilithon_server.served import Call
from trilithon_server.validation import invalid, nearest, shown

LOAD_S = 60.0
"""How long an explicit load or unload waits for its end, unless the client's deadline is earlier."""

_ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

_log = logging.getLogger(__name__)


async def load(names: Names, name: str, call: Call, *, alias: str = "", allow_template_mismatch: bool = False) -> str:
    """
    Load an adapter before its first request, and point an alias to it if one is named.

    Returns:
        The name that it is served by: the alias where there is one.
    Raises:
        NotFound: no such model. InvalidArgument: it is no adapter. FailedPrecondition: it cannot be loaded.
    """
    if alias:
        _check_alias(alias)
    adapter = await names.adapter(name, call)
    if allow_template_mismatch and adapter.digest not in names.allowed:
        names.allowed.add(adapter.digest)
        _log.warning("template_mismatch_allowed", extra={"model": adapter.name, "request_id": call.request_id})
    model = names.adapted(adapter)
    await _in_time(model.engine.load_adapter(adapter.wire), call, adapter.name)
    if alias:
        await set_alias(names, alias, adapter.name, None, call)
    return alias or adapter.name


async def unload(names: Names, name: str, call: Call, *, drain: bool = False) -> int:
    """
    Take an adapter out of memory once its requests have ended; its next use loads it again.

    Args:
        drain: wait for that.
    Returns:
        Requests that were at work with it.
    """
    adapter = await names.adapter(name, call)
    base = names.base(adapter)
    if base is None:
        return 0
    base.ready()
    in_flight = base.engine.adapter_requests(adapter.digest)
    gone = base.engine.unload_adapter(adapter.wire)
    if drain:
        await _in_time(gone, call, adapter.name)
    else:
        gone.cancel()
    return in_flight


async def set_alias(names: Names, alias: str, target: str, expected: str | None, call: Call) -> None:
    """
    Point an alias of the caller's tenant to a model.

    Args:
        expected: where it must point now; empty: it must be new; None: wherever it points.
    Raises:
        NotFound: no such target. Conflict: `version_conflict`, it points elsewhere, or the name is a model's.
        FailedPrecondition: `no_catalog`, this server keeps none.
    """
    _check_alias(alias)
    tenant, catalog = call.principal.tenant, _catalog(names)
    found = await names.find(target, tenant)
    if names.is_configured(alias):
        raise Conflict(f"`{alias}` is a model's name and never moves. Choose another alias.")
    try:
        await asyncio.to_thread(catalog.move_alias, alias, found.name, tenant=tenant, expected=expected)
    except CatalogConflict as error:
        raise Conflict(str(error), code="version_conflict") from None


async def delete_alias(names: Names, alias: str, expected: str | None, call: Call) -> str:
    """
    Take an alias of the caller's tenant away; what it points to stays, and requests in flight go on.

    Args:
        expected: where it must point now; None: wherever it points.
    Returns:
        Where it pointed.
    Raises:
        NotFound: `alias_not_found`. Conflict: `version_conflict`, it points elsewhere.
        FailedPrecondition: `no_catalog`, this server keeps none.
    """
    tenant, catalog = call.principal.tenant, _catalog(names)
    try:
        gone = await asyncio.to_thread(catalog.remove_alias, alias, tenant=tenant, expected=expected)
    except CatalogConflict as error:
        raise Conflict(str(error), code="version_conflict") from None
    if gone is None:
        mine = [item.name for item in await asyncio.to_thread(catalog.aliases, tenant=tenant) if item.tenant == tenant]
        listed = ", ".join(f"`{name}`" for name in mine[:MAX_SHOWN]) or "none"
        raise NotFound(
            f"no alias {shown(alias)} of yours. Yours: {listed}.{nearest(alias, mine)}", code="alias_not_found"
        )
    return gone.target


def _catalog(names: Names) -> Catalog:
    if names.catalog is None:
        message = "aliases are kept in a catalogue, and this server has none."
        raise FailedPrecondition(message, code="no_catalog", hint="Set server.catalog to a directory.")
    return names.catalog


def _check_alias(alias: str) -> None:
    if not _ALIAS.fullmatch(alias):
        rule = "must have 1 to 64 characters out of a-z, 0-9, '.', '_' and '-', and begin with a letter or a digit"
        raise invalid("alias", rule, given=alias)


async def _in_time(done: asyncio.Future[None], call: Call, name: str) -> None:
    end_s = time.monotonic() + LOAD_S
    if call.deadline_s is not None:
        end_s = min(end_s, call.deadline_s)
    try:
        async with asyncio.timeout(max(0.0, end_s - time.monotonic())):
            await done
    except TimeoutError:
        message = f"adapter `{name}` was not there in time: its slot, or its requests, took longer."
        raise DeadlineExceeded(message, code="timeout", retry_after_s=5.0) from None
