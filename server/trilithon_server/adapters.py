"""
Names beyond the configured models: adapters, models that jobs made, aliases. A tenant sees its own and everyone's.

    name --> configured model | configured adapter | alias -> one of these | entry of the catalogue
                                                                |-> adapter: the base's engine, with that adapter
                                                                '-> model: an engine of its own (hosting.py)

An adapter needs no verb before its first use: a request carries its digest and its directory, and the engine loads it
where it is not loaded, once for all who wait. What a request has resolved stays what it is for that request: a moved
alias means another model only to requests that come later.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from trilithon.errors import FailedPrecondition, InvalidArgument, NotFound
from trilithon_server.catalog import Alias, Catalog, CatalogEntry
from trilithon_server.config import EngineConfig
from trilithon_server.errors import draining
from trilithon_server.hosting import Hosting
from trilithon_server.served import AdapterRef, Call, ServedModel
from trilithon_server.task_model import known_capabilities
from trilithon_server.text.template import TEMPLATE_FILE, ChatTemplate, template_digest
from trilithon_server.validation import invalid, nearest, shown

MAX_SHOWN = 20
"""Names that an error lists."""

_FILES = ("adapter_config.json", "adapter_model.safetensors")

ENCODER_TASKS = ("ner", "relation", "classify", "span_qa", "answer_gen", "mlm")
"""Tasks whose models are encoders."""


class Names:
    """
    What every name means.

    Args:
        models: the configured ones by name.
        engines: their settings in the same order, for their adapters.
        catalog: of what jobs made; None without one.
        hosting: runs whole models of the catalogue; None where there is none.
    Raises:
        ValueError: a configured adapter's files are missing, or its name is taken; one sentence.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        engines: tuple[EngineConfig, ...],
        *,
        catalog: Catalog | None,
        hosting: Hosting | None,
    ) -> None:
        self._models, self.catalog, self._hosting = models, catalog, hosting
        self.allowed: set[str] = set()
        """Digests of adapters whose other chat template an operator has allowed."""
        self._configured: dict[str, AdapterRef] = {}
        for model, engine in zip(models.values(), engines, strict=True):
            for name, path in engine.adapters.items():
                if name in models or name in self._configured:
                    raise ValueError(f"adapter {name} must have a name of its own. Given: one that is served already.")
                self._configured[name] = adapter_in(Path(path), name=name, base=model.name)

    # -- requests -------------------------------------------------------------------------------------------

    async def resolve(self, name: str, call: Call) -> ServedModel:
        """
        The model that a call means; an empty name means the only configured one.

        Raises:
            NotFound: `model_not_found`, naming the choices.
            Unavailable: `draining`, the call began after the drain did.
            FailedPrecondition: `base_mismatch`, `template_mismatch`, `adapters_unsupported`; what hosting raises.
        """
        model = self._models.get(name) if name else self._only()
        if model is None:
            found = await self.find(name, call.principal.tenant)
            model = await self._serve(found, call) if isinstance(found, CatalogEntry) else self.adapted(found)
        call.record.model = model.label
        if call.late:
            raise draining(call.request_id)
        return model

    async def on(self, model: str, adapter: str, call: Call) -> str:
        """
        The name of an adapter that a request asks for on top of a model; an empty model means the adapter's own.

        Raises:
            NotFound: `adapter_not_found`.
        """
        try:
            found = await self.adapter(adapter, call)
        except (NotFound, InvalidArgument):
            raise NotFound(
                f"no adapter {shown(adapter)}. GET /v1/models lists them.", code="adapter_not_found"
            ) from None
        base = self.base(found)
        if model and (base is None or model not in (base.name, adapter)):
            raise NotFound(
                f"no adapter {shown(adapter)} on model {shown(model)}; it stands on `{found.base}`.",
                code="adapter_not_found",
            )
        return adapter

    async def adapter(self, name: str, call: Call) -> AdapterRef:
        """
        The adapter of that name.

        Raises:
            NotFound: no such model. InvalidArgument: it is no adapter.
        """
        found = await self.find(name, call.principal.tenant)
        if isinstance(found, AdapterRef):
            return found
        if isinstance(found, CatalogEntry) and found.kind == "adapter":
            return _of_entry(found)
        raise invalid("id", "must name an adapter", given=name, code="unsupported_model")

    def is_configured(self, name: str) -> bool:
        """Whether the configuration gives the name away, so that no catalogue can."""
        return name in self._models or name in self._configured

    def _only(self) -> ServedModel | None:
        return next(iter(self._models.values())) if len(self._models) == 1 else None

    async def find(self, name: str, tenant: str) -> AdapterRef | ServedModel | CatalogEntry:
        """
        What a name means; a configured model is itself.

        Raises:
            NotFound: `model_not_found`, naming the choices.
        """
        configured = self._models.get(name) or self._configured.get(name)
        if configured is not None:
            return configured
        if self.catalog is not None:
            found = await asyncio.to_thread(self._look_up, self.catalog, name, tenant)
            if found is not None:
                return found
        raise await self._not_found(name, tenant)

    def _look_up(self, catalog: Catalog, name: str, tenant: str) -> AdapterRef | ServedModel | CatalogEntry | None:
        entry = catalog.get(name, tenant=tenant)
        if entry is not None:
            return entry
        alias = catalog.alias(name, tenant=tenant)
        target = alias.target if alias is not None else ""
        return self._models.get(target) or self._configured.get(target)

    async def _not_found(self, name: str, tenant: str) -> NotFound:
        names = [item["id"] for item in await self.listing(tenant)]
        listed = ", ".join(f"`{item}`" for item in names[:MAX_SHOWN])
        more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
        what = f"no model {shown(name)}" if name else "several models are served; name one"
        return NotFound(f"{what}. Served here: {listed}{more}.{nearest(name, names)}", code="model_not_found")

    async def _serve(self, entry: CatalogEntry, call: Call) -> ServedModel:
        if entry.kind == "adapter":
            return self.adapted(_of_entry(entry))
        if self._hosting is None:
            raise FailedPrecondition(f"model `{entry.name}` cannot be run by this server.", code="model_load_failed")
        return await self._hosting.ensure(entry, call)

    def adapted(self, found: AdapterRef | ServedModel) -> ServedModel:
        """The base with an adapter; refuses what cannot be served as it was trained."""
        if isinstance(found, ServedModel):
            return found
        base = self.base(found) or self._refuse_base(found)
        hello = base.ready()
        if not hello.max_adapters:
            raise FailedPrecondition(
                f"model `{found.name}` is an adapter, and `{base.name}` is served without adapters.",
                code="adapters_unsupported",
                hint="Serve it with backend torch and max_adapters above 0.",
            )
        wanted, given = _template_of(found, base), base.template_digest
        if wanted and wanted != given and found.digest not in self.allowed:
            raise FailedPrecondition(
                f"adapter `{found.name}` was trained with chat template {wanted[:12]}. "
                f"Given: `{base.name}` is served with {given[:12] or 'none'}.",
                code="template_mismatch",
                hint="Serve the base with the adapter's template (--chat-template), or load the adapter with "
                "allow_template_mismatch.",
            )
        return base.with_adapter(replace(found, base=base.name))

    def base(self, adapter: AdapterRef) -> ServedModel | None:
        """The served model that an adapter stands on: of that name, or of the very weights under another one."""
        named = self._models.get(adapter.base)
        if not adapter.base_digest:
            return named
        for model in ([named] if named is not None else []) + list(self._models.values()):
            if model.engine.hello is not None and model.engine.hello.model_digest == adapter.base_digest:
                return model
        return None

    def _refuse_base(self, adapter: AdapterRef) -> NoReturn:
        served = {name: model.ready().model_digest for name, model in self._models.items()}
        listed = ", ".join(f"`{name}` ({digest[:12]})" for name, digest in served.items())
        raise FailedPrecondition(
            f"adapter `{adapter.name}` stands on `{adapter.base}` ({adapter.base_digest[:12]}). Served here: {listed}.",
            code="base_mismatch",
            hint="Serve the base that it was trained on, or train it again on one of these.",
        )

    # -- what is served -------------------------------------------------------------------------------------

    async def listing(self, tenant: str) -> list[dict[str, Any]]:
        """Everything that a tenant may name: configured models, adapters, what jobs made, aliases."""
        rows = [model.describe() for model in self._models.values()]
        rows += [self._describe(adapter) for adapter in self._configured.values()]
        if self.catalog is None:
            return rows
        entries, aliases = await asyncio.to_thread(_held, self.catalog, tenant)
        taken = {row["id"] for row in rows}
        made: dict[str, dict[str, Any]] = {}
        links: dict[str, Alias] = {}
        for owner in dict.fromkeys(("", tenant)):  # a tenant's own name hides everyone's
            for entry in entries:
                if entry.tenant == owner and entry.name not in taken:
                    made[entry.name] = self._describe(entry)
                    links.pop(entry.name, None)
            for alias in aliases:
                if alias.tenant == owner and alias.name not in taken:
                    links[alias.name] = alias
                    made.pop(alias.name, None)
        rows += made.values()
        known = {row["id"]: row for row in rows}
        for name, alias in links.items():
            if alias.target in known:
                rows.append({**known[alias.target], "id": name, "kind": "alias", "alias_of": alias.target})
        return rows

    async def describe(self, name: str, tenant: str) -> dict[str, Any]:
        """
        One of them.

        Raises:
            NotFound: `model_not_found`.
        """
        for row in await self.listing(tenant):
            if row["id"] == name:
                return row
        raise await self._not_found(name, tenant)

    def _describe(self, what: AdapterRef | CatalogEntry) -> dict[str, Any]:
        if isinstance(what, CatalogEntry) and what.kind == "model":
            return self._describe_model(what)
        adapter = _of_entry(what) if isinstance(what, CatalogEntry) else what
        base = self.base(adapter)
        state = "failed"
        if base is not None:
            state = "ready" if adapter.digest in base.engine.adapters else "available"
        known = (base or next(iter(self._models.values()))).describe()
        return {
            **known,
            "id": adapter.name,
            "kind": "adapter",
            "base": adapter.base,
            "digest": adapter.digest,
            "template_digest": adapter.template_digest or known["template_digest"],
            "state": state,
            "created": adapter.created,
            "capabilities": known["capabilities"] if base is not None else [],
            "job_id": adapter.job_id,
            "job_step": adapter.step,
        }

    def _describe_model(self, entry: CatalogEntry) -> dict[str, Any]:
        running = self._hosting.running(entry) if self._hosting is not None else None
        known = running.describe() if running is not None else {"created": entry.created, "digest": entry.digest}
        return {
            **BLANK,
            "capabilities": known_capabilities(entry.task),
            **known,
            "id": entry.name,
            "kind": "encoder" if entry.task in ENCODER_TASKS else "merged",
            "base": entry.base,
            "template_digest": entry.template_digest,
            "state": self._hosting.state(entry) if self._hosting is not None else "failed",
            "job_id": entry.job_id,
            "job_step": entry.step,
        }


BLANK: dict[str, Any] = {
    "tokenizer_digest": "",
    "max_context_tokens": 0,
    "max_output_tokens": 0,
    "vocab_size": 0,
    "dtype": "",
    "quantization": "",
    "tp": 0,
    "pp": 0,
    "capabilities": [],
    "defaults": {},
}
"""What is not known of a model that has never run here."""


def _held(catalog: Catalog, tenant: str) -> tuple[list[CatalogEntry], list[Alias]]:
    return catalog.entries(tenant=tenant), catalog.aliases(tenant=tenant)


def _template_of(adapter: AdapterRef, base: ServedModel) -> str:
    """The digest of the chat template that an adapter was trained with; empty where none is known."""
    if adapter.template_digest or not adapter.template:
        return adapter.template_digest
    tokens = dict(base.template.tokens) if base.template is not None else {}
    return template_digest(ChatTemplate(adapter.template, tokens=tokens), base.tokenizer)


def _of_entry(entry: CatalogEntry) -> AdapterRef:
    return AdapterRef(
        name=entry.name,
        base=entry.base,
        base_digest=entry.base_digest,
        digest=entry.digest,
        directory=str(entry.path),
        checked=True,
        template_digest=entry.template_digest,
        job_id=entry.job_id,
        step=entry.step,
        created=entry.created,
    )


def adapter_in(directory: Path, *, name: str, base: str) -> AdapterRef:
    """
    An adapter by its directory; its identity is that of its files as they are now.

    Raises:
        ValueError: they are missing; one sentence.
    """
    digest = hashlib.sha256()
    for file in _FILES:
        try:
            with (directory / file).open("rb") as source:
                digest.update(hashlib.file_digest(source, "sha256").digest())
        except OSError as error:
            rule = f"adapter {name} must be a directory with {' and '.join(_FILES)}"
            raise ValueError(f"{rule}. Given: {directory} ({error.strerror}).") from None
    template = directory / TEMPLATE_FILE
    return AdapterRef(
        name=name,
        base=base,
        digest=digest.hexdigest(),
        directory=str(directory.resolve()),
        template=template.read_text(encoding="utf-8") if template.is_file() else "",
        created=int((directory / _FILES[1]).stat().st_mtime),
    )
