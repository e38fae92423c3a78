"""What is served, and what an operator does with adapters and aliases: `client.models` of both clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from trilithon import _requests
from trilithon._parameters import CallOptions
from trilithon._transport import DELETE_ALIAS, GET_MODEL, LIST_MODELS, LOAD_ADAPTER, SET_ALIAS, UNLOAD_ADAPTER
from trilithon._types import DeletedAlias, Model, ModelPage, Unloaded

if TYPE_CHECKING:
    from trilithon._async_client import AsyncClient
    from trilithon._client import Client


class Models:
    """What is served; reached as `client.models`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, *, kind: str | None = None, **options: Unpack[CallOptions]) -> tuple[Model, ...]:
        """Every model that the key may see, or those of one kind: base, adapter, merged, alias or encoder."""
        found: tuple[Model, ...] = ()
        while True:
            fields = _requests.plain("list", {"kind": kind, "after": found[-1].id if found else None}, options)
            page = self._client._call(LIST_MODELS, fields, options, ModelPage)
            found += page.data
            if not page.has_more or not page.data:
                return found

    def get(self, id: str, **options: Unpack[CallOptions]) -> Model:
        """One model. Raises NotFound."""
        return self._client._call(GET_MODEL, _requests.plain("get", {"id": id}, options), options, Model)

    def load(
        self,
        id: str,
        *,
        alias: str | None = None,
        allow_template_mismatch: bool | None = None,
        **options: Unpack[CallOptions],
    ) -> Model:
        """
        Load an adapter before its first request, which would load it too. Needs the admin scope.

        Args:
            alias: a name to point to it once it is loaded.
            allow_template_mismatch: load it although it was trained with another chat template than its base has.
        Raises:
            NotFound, FailedPrecondition: there is none, or it cannot be loaded.
        """
        fields = {"id": id, "alias": alias, "allow_template_mismatch": allow_template_mismatch}
        return self._client._call(LOAD_ADAPTER, _requests.plain("load", fields, options), options, Model)

    def unload(self, id: str, *, drain: bool | None = None, **options: Unpack[CallOptions]) -> Unloaded:
        """
        Take an adapter out of memory once its requests have ended; its next use loads it again. Needs the admin scope.

        Args:
            drain: answer when they have ended, not at once.
        """
        fields = _requests.plain("unload", {"id": id, "drain": drain}, options)
        return self._client._call(UNLOAD_ADAPTER, fields, options, Unloaded)

    def set_alias(
        self, alias: str, target: str, *, expected_target: str | None = None, **options: Unpack[CallOptions]
    ) -> Model:
        """
        Point an alias to a model: later requests mean it, those in flight keep theirs. Needs the admin scope.

        Args:
            expected_target: what it must stand for now; empty: it must be new; None: anything.
        Raises:
            Conflict: it stands for something else. NotFound: there is no such target.
        """
        fields = {"alias": alias, "target": target, "expected_target": expected_target}
        return self._client._call(SET_ALIAS, _requests.plain("set_alias", fields, options), options, Model)

    def delete_alias(
        self, alias: str, *, expected_target: str | None = None, **options: Unpack[CallOptions]
    ) -> DeletedAlias:
        """
        Take an alias away; the model that it stands for stays, and requests in flight go on. Needs the admin scope.

        Args:
            expected_target: what it must stand for now; None: anything.
        Raises:
            Conflict: it stands for something else. NotFound: there is no such alias.
        """
        fields = _requests.plain("delete_alias", {"alias": alias, "expected_target": expected_target}, options)
        return self._client._call(DELETE_ALIAS, fields, options, DeletedAlias)


class AsyncModels:
    """What is served; reached as `client.models`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self, *, kind: str | None = None, **options: Unpack[CallOptions]) -> tuple[Model, ...]:
        """Every model that the key may see, or those of one kind: base, adapter, merged, alias or encoder."""
        found: tuple[Model, ...] = ()
        while True:
            fields = _requests.plain("list", {"kind": kind, "after": found[-1].id if found else None}, options)
            page = await self._client._call(LIST_MODELS, fields, options, ModelPage)
            found += page.data
            if not page.has_more or not page.data:
                return found

    async def get(self, id: str, **options: Unpack[CallOptions]) -> Model:
        """One model. Raises NotFound."""
        return await self._client._call(GET_MODEL, _requests.plain("get", {"id": id}, options), options, Model)

    async def load(
        self,
        id: str,
        *,
        alias: str | None = None,
        allow_template_mismatch: bool | None = None,
        **options: Unpack[CallOptions],
    ) -> Model:
        """
        Load an adapter before its first request, which would load it too. Needs the admin scope.

        Args:
            alias: a name to point to it once it is loaded.
            allow_template_mismatch: load it although it was trained with another chat template than its base has.
        Raises:
            NotFound, FailedPrecondition: there is none, or it cannot be loaded.
        """
        fields = {"id": id, "alias": alias, "allow_template_mismatch": allow_template_mismatch}
        return await self._client._call(LOAD_ADAPTER, _requests.plain("load", fields, options), options, Model)

    async def unload(self, id: str, *, drain: bool | None = None, **options: Unpack[CallOptions]) -> Unloaded:
        """
        Take an adapter out of memory once its requests have ended; its next use loads it again. Needs the admin scope.

        Args:
            drain: answer when they have ended, not at once.
        """
        fields = _requests.plain("unload", {"id": id, "drain": drain}, options)
        return await self._client._call(UNLOAD_ADAPTER, fields, options, Unloaded)

    async def set_alias(
        self, alias: str, target: str, *, expected_target: str | None = None, **options: Unpack[CallOptions]
    ) -> Model:
        """
        Point an alias to a model: later requests mean it, those in flight keep theirs. Needs the admin scope.

        Args:
            expected_target: what it must stand for now; empty: it must be new; None: anything.
        Raises:
            Conflict: it stands for something else. NotFound: there is no such target.
        """
        fields = {"alias": alias, "target": target, "expected_target": expected_target}
        return await self._client._call(SET_ALIAS, _requests.plain("set_alias", fields, options), options, Model)

    async def delete_alias(
        self, alias: str, *, expected_target: str | None = None, **options: Unpack[CallOptions]
    ) -> DeletedAlias:
        """
        Take an alias away; the model that it stands for stays, and requests in flight go on. Needs the admin scope.

        Args:
            expected_target: what it must stand for now; None: anything.
        Raises:
            Conflict: it stands for something else. NotFound: there is no such alias.
        """
        fields = _requests.plain("delete_alias", {"alias": alias, "expected_target": expected_target}, options)
        return await self._client._call(DELETE_ALIAS, fields, options, DeletedAlias)
