"""The table of requests in flight, by tenant and request id: where an explicit abort looks."""

from __future__ import annotations

from typing import Any, Protocol

from trilithon_server.served import Call


class Work(Protocol):
    """Something that can be ended before its time: a `Generation` or an `EngineStream`."""

    def abort(self, cause: str) -> Any: ...


class Running:
    """One tenant never finds another's requests; ids may repeat, and then name all of their requests."""

    def __init__(self) -> None:
        self._work: dict[tuple[str, str], list[Work]] = {}

    def add(self, call: Call, work: Work) -> None:
        """Enter work under its call."""
        self._work.setdefault((call.principal.tenant, call.request_id), []).append(work)

    def remove(self, call: Call, work: Work) -> None:
        """Take it out again."""
        key = (call.principal.tenant, call.request_id)
        left = [item for item in self._work.get(key, ()) if item is not work]
        if left:
            self._work[key] = left
        else:
            self._work.pop(key, None)

    def abort(self, call: Call, request_id: str) -> bool:
        """End a request of the caller's tenant; whether there was one."""
        work = list(self._work.get((call.principal.tenant, request_id), ()))
        for item in work:
            item.abort("cancelled")
        return bool(work)
