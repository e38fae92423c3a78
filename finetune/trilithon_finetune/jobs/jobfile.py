"""The files by which a worker tells a phase what to do, and that it may."""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trilithon import _store
from trilithon.errors import NotFound
from trilithon_finetune.config import parse_config
from trilithon_finetune.errors import JobError
from trilithon_finetune.jobs.outcome import AttemptFailed
from trilithon_finetune.jobs.records import File, Job
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.sources import Source, sources_of
from trilithon_server.catalog import Catalog

LEASE_FILE = "lease"
"""In the directory of an attempt: while it is there, the attempt may run and move pointers."""
LOCK_FILE = "lock"
"""In the directory of a job: held by every process that runs for it."""


def write_job_file(
    job: Job, *, jobs: Jobs, catalog: Catalog, models: Mapping[str, Path], concepts: Mapping[str, Path]
) -> None:
    """
    Write `job.json`: where a phase finds the job's configuration, its models and its data.

    Raises:
        AttemptFailed: `model_not_found`, concepts that are not known, or a file of the job is gone.
    """
    paths = jobs.paths.job(job.id)
    training = _file(jobs, job, job.training_file, "training")
    validation = None if job.validation_file is None else _file(jobs, job, job.validation_file, "validation")
    model, adapter = _model(job.model, tenant=job.tenant, catalog=catalog, models=models)
    sources = sources_of(parse_config(dict(job.resolved or job.config), where="job"))
    document: dict[str, Any] = {
        "job_id": job.id,
        "tenant": job.tenant,
        "name": job.name,
        "config": job.resolved or job.config,
        "model_dir": str(model),
        "adapter_dir": None if adapter is None else str(adapter),
        "training_path": str(jobs.paths.file(training.sha256)),
        "training_name": training.filename,
        "validation_path": None if validation is None else str(jobs.paths.file(validation.sha256)),
        "validation_name": None if validation is None else validation.filename,
        "store": str(jobs.paths.root),
        "base_digest": job.base_digest,
        "data_digest": job.data_digest,
        "template_digest": job.template_digest,
    }
    for source in sources:
        document |= _place(source, job, jobs=jobs, catalog=catalog, models=models, concepts=concepts)
    _replace(paths.spec, json.dumps(document, indent=1))


def _place(
    source: Source, job: Job, *, jobs: Jobs, catalog: Catalog, models: Mapping[str, Path], concepts: Mapping[str, Path]
) -> dict[str, str]:
    """Where that lies which an option names. Raises AttemptFailed."""
    if source.kind == "concepts":
        return {source.key: str(_concepts(source, concepts))}
    if source.kind == "model":
        model, adapter = _model(source.name, tenant=job.tenant, catalog=catalog, models=models, field=source.field)
        if adapter is not None:
            raise _failed(source, "must be a whole model. Given: an adapter", hint="Name its base.")
        return {source.key: str(model)}
    try:
        file = jobs.get_file(source.name, tenant=job.tenant)
    except NotFound:
        raise _failed(source, "is not there any more", hint="Upload it again.") from None
    return {source.key: str(jobs.paths.file(file.sha256)), f"{source.option}_name": file.filename}


def _failed(source: Source, why: str, *, hint: str) -> AttemptFailed:
    message = f"{source.field} {source.name[:64]!r} {why}."
    return AttemptFailed(JobError(code="invalid_config", param=source.field, message=message, hint=hint))


def write_lease(directory: Path, token: int) -> None:
    """Allow the attempt in `directory` to run, to whoever has this token alone."""
    _replace(directory / LEASE_FILE, str(token))


def revoke_lease(directory: Path) -> None:
    """From now on no process of the attempt may start, or move a pointer."""
    (directory / LEASE_FILE).unlink(missing_ok=True)


def _model(
    name: str, *, tenant: str, catalog: Catalog, models: Mapping[str, Path], field: str = "model"
) -> tuple[Path, Path | None]:
    """The directory of a base model, and of the adapter that a job goes on from. Raises AttemptFailed."""
    entry = None if name in models else catalog.get(name, tenant=tenant)
    if entry is None:
        return _base(name, models, field=field), None
    if entry.kind == "model":
        return entry.path, None
    return _base(entry.base, models, field=field), entry.path


def _concepts(source: Source, known: Mapping[str, Path]) -> Path:
    """Facts by their name; a path is the command's, never a request's."""
    if source.name in known:
        return known[source.name].resolve()
    if os.path.isabs(source.name):
        return Path(source.name)
    here = ", ".join(sorted(known)) or "none"
    raise _failed(source, "are not known here", hint=f"Known: {here}. Serve some: server.concepts.")


def _base(name: str, models: Mapping[str, Path], *, field: str) -> Path:
    if name in models:
        return models[name].resolve()
    if os.path.isabs(name) and Path(name).is_dir():
        return Path(name).resolve()
    held = {model.name: model for model in _store.list_models() if not model.problem}
    if name in held:
        return held[name].path.resolve()
    near = difflib.get_close_matches(name, [*models, *held], n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted({*models, *held})) or 'none'}."
    raise AttemptFailed(
        JobError(code="model_not_found", param=field, message=f"model {name[:64]!r} is not known here.", hint=hint)
    )


def _file(jobs: Jobs, job: Job, file_id: str, kind: str) -> File:
    try:
        return jobs.get_file(file_id, tenant=job.tenant)
    except NotFound:
        code, message = f"invalid_{kind}_file", f"{kind}_file {file_id} is not there any more."
        raise AttemptFailed(JobError(code=code, param=f"{kind}_file", message=message)) from None


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
