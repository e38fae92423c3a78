"""
Make what a job made a served model: an entry in the catalogue that servers read, and the alias that points to it.

A name means one digest for ever, so registering again is no change. An alias moves by compare-and-swap between two
looks at the lease: a worker that has lost its job cannot move it back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from trilithon_finetune.config import Deploy
from trilithon_finetune.jobs.moves import NewEvent
from trilithon_finetune.jobs.records import Job
from trilithon_finetune.jobs.rows import checkpoint_name
from trilithon_parallel.config import QUERY_DIR, RETRIEVER_DIR
from trilithon_server.catalog import Catalog, CatalogConflict, CatalogEntry
from trilithon_server.encoders import QUESTIONS_SUFFIX, RETRIEVER_SUFFIX
from trilithon_server.engine.identity import model_digest

_TRIES = 10

_BESIDE = {
    QUERY_DIR: QUESTIONS_SUFFIX,
    RETRIEVER_DIR: RETRIEVER_SUFFIX,
    f"{RETRIEVER_DIR}/{QUERY_DIR}": RETRIEVER_SUFFIX + QUESTIONS_SUFFIX,
}
"""Folders of an export, and how their models are called behind the job's name."""


def deploy(
    catalog: Catalog,
    job: Job,
    *,
    path: Path,
    kind: Literal["adapter", "model"],
    digest: str,
    step: int,
    checkpoint: bool,
    check: Callable[[], object],
) -> NewEvent:
    """
    Register a directory under the job's name, or that of its checkpoint, and move the alias where one is asked for.
    What lies in it beside the model, as an encoder of questions, gets a name of its own.

    Args:
        check: raises when the job is somebody else's.
    Returns:
        The event that tells of it: a warning where the alias could not be moved.
    Raises:
        CatalogConflict: the name means another digest. CatalogError: the catalogue cannot be written.
    """
    settings = Deploy.model_validate((job.resolved or job.config)["deploy"])
    begun = catalog.get(job.model, tenant=job.tenant)
    name = checkpoint_name(job.name, step) if checkpoint else job.name
    check()
    entry = CatalogEntry(
        name=name,
        kind=kind,
        base=begun.base if begun is not None and begun.kind == "adapter" else job.model,
        base_digest=job.base_digest,
        path=path.resolve(),
        digest=digest,
        tenant=job.tenant,
        task=job.task,
        job_id=job.id,
        step=step,
        template_digest=job.template_digest,
        created=job.created_at,
    )
    for folder, suffix in _BESIDE.items():
        if (inner := entry.path / folder).is_dir():
            catalog.register(replace(entry, name=name + suffix, path=inner, digest=model_digest(inner)))
    catalog.register(entry)
    data: dict[str, Any] = {"model": name, "step": step, "digest": digest}
    if settings.alias is None or settings.on == "never":
        return NewEvent(kind="deployed", message=f"The model {name} is served.", data=data)
    try:
        previous = _move(catalog, settings.alias, name, tenant=job.tenant, check=check)
    except CatalogConflict as error:
        message = f"The model {name} is served, and its alias was not moved: {error}"
        return NewEvent(kind="warning", level="warn", message=message, data=data)
    data |= {"alias": settings.alias, "previous": previous}
    return NewEvent(kind="deployed", message=f"The model {name} is served, also as {settings.alias}.", data=data)


def _move(catalog: Catalog, alias: str, target: str, *, tenant: str, check: Callable[[], object]) -> str:
    """Point the alias to `target`; to what it pointed before, empty where it is new."""
    for left in reversed(range(_TRIES)):
        known = catalog.alias(alias, tenant=tenant)
        points = known.target if known is not None and known.tenant == tenant else ""
        check()
        try:
            catalog.move_alias(alias, target, tenant=tenant, expected=points)
        except CatalogConflict:
            if not left:
                raise
        else:
            return points
    raise AssertionError("unreachable: the loop above returns or raises")
