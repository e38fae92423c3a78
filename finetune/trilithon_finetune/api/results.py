"""
What becomes of a job's result: a zip file for its owner, or an alias that points to it.

An export is the directory that the job made (or a checkpoint's, without its optimizer state) as one zip file, stored
without compression, since weights do not shrink, and with fixed dates, so that the same directory is the same file.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

from trilithon.errors import Conflict, FailedPrecondition, NotFound
from trilithon_finetune.jobs.records import Checkpoint, File, Job
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.jobs.states import JobState
from trilithon_finetune.paths import StorePaths
from trilithon_server.catalog import Catalog, CatalogConflict
from trilithon_server.validation import invalid, shown

MOVES = 8
"""Times that an alias is read again when somebody else moves it in between."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date that a zip file can hold
_ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NOT_EXPORTED = ("manifest.json", "optim.safetensors.index.json")


class Shelf(Protocol):
    """Where jobs and what they made lie: a server's door, or the store itself."""

    @property
    def jobs(self) -> Jobs:
        """The store."""
        ...

    @property
    def paths(self) -> StorePaths:
        """Its directory."""
        ...

    @property
    def catalog(self) -> Catalog:
        """What is served from it."""
        ...


def export(door: Shelf, job_id: str, *, tenant: str, step: int | None, format: str | None) -> File:
    """
    A zip file of purpose `fine-tune-results`. Blocks.

    Args:
        step: of a checkpoint; None: what the job made.
        format: `peft` or `model`; None: as the job made it.
    Raises:
        NotFound: the job or the checkpoint.
        FailedPrecondition: there is no result yet, it has another format, or its files are gone.
    """
    files = exported_files(door, job_id, tenant=tenant, step=step, format=format)
    return archive(door, files, tenant=tenant, filename=archive_name(job_id, step))


def archive_name(job_id: str, step: int | None, format: str = "") -> str:
    """
    What the zip file of an export is called.

    >>> archive_name("ftjob-1", 40, "model")
    'ftjob-1-step-40-model.zip'
    """
    parts = (job_id, "" if step is None else f"step-{step}", format)
    return f"{'-'.join(filter(None, parts))}.zip"


def archive(door: Shelf, files: Sequence[Path], *, tenant: str, filename: str) -> File:
    """A zip file of files, stored for a tenant. Raises FailedPrecondition: one of them is gone."""
    with tempfile.TemporaryFile(dir=door.paths.root) as target:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as out:
            for path in files:
                try:
                    source = path.open("rb")
                except FileNotFoundError:
                    raise FailedPrecondition("the files of the export are gone.", code="result_gone") from None
                with source, out.open(zipfile.ZipInfo(path.name, _EPOCH), "w", force_zip64=True) as entry:
                    shutil.copyfileobj(source, entry, 1 << 20)
        target.seek(0)
        return door.jobs.put_file(target, tenant=tenant, filename=filename, purpose="fine-tune-results")


def exported_files(door: Shelf, job_id: str, *, tenant: str, step: int | None, format: str | None = None) -> list[Path]:
    """The files that an export has, of one directory. Args and Raises: as of `export`."""
    job = door.jobs.get(job_id, tenant=tenant)
    if format not in (None, made(job)):
        raise FailedPrecondition(
            f"the result of {job_id} is of format {made(job)}. Given: {format}.", code="format_unavailable"
        )
    if step is None:
        _require_result(job)
        directory = door.paths.job(job_id).export
    else:
        _checkpoint(door, job, step, tenant=tenant)
        directory = door.paths.job(job_id).run / f"step_{step:08d}"
    files = [path for path in _files(directory) if path.is_file()]
    if not files:
        raise FailedPrecondition(f"the files of {_what(job, step)} are gone.", code="result_gone")
    return files


def made(job: Job) -> Literal["peft", "model"]:
    """The format of what a job makes."""
    tuning = (job.resolved or job.config).get("tuning") or {}
    return "peft" if tuning.get("kind") == "lora" else "model"


def deploy(door: Shelf, job_id: str, *, tenant: str, step: int | None, alias: str) -> tuple[str, str]:
    """
    Point an alias to what a job made, or to one of its checkpoints. Blocks.

    Returns:
        The model's name, and where the alias pointed before (empty: nowhere).
    Raises:
        NotFound: the job or the checkpoint.
        FailedPrecondition: it is not served under a name of its own.
        Conflict: the alias is a model's name, or others keep moving it.
    """
    job = door.jobs.get(job_id, tenant=tenant)
    if step is None:
        _require_result(job)
        model = job.name
    else:
        model = _checkpoint(door, job, step, tenant=tenant).model
    if door.catalog.get(model, tenant=tenant) is None:
        raise FailedPrecondition(
            f"{_what(job, step)} is not served. Checkpoints are, where the job has `deploy.on: checkpoint`.",
            code="not_servable",
        )
    for _ in range(MOVES):
        known = door.catalog.alias(alias, tenant=tenant)
        mine = known.target if known is not None and known.tenant == tenant else ""
        try:
            door.catalog.move_alias(alias, model, tenant=tenant, expected=mine)
        except CatalogConflict as error:
            reason = str(error)
            continue
        return model, mine
    raise Conflict(reason)


def undeploy(door: Shelf, alias: str, *, tenant: str, expected: str | None = None) -> str:
    """
    Take an alias away; the model that it points to stays. Blocks.

    Args:
        expected: where it must point now; None: anywhere.
    Returns:
        Where it pointed.
    Raises:
        NotFound: there is none. Conflict: it points elsewhere.
    """
    try:
        gone = door.catalog.remove_alias(alias, tenant=tenant, expected=expected)
    except CatalogConflict as error:
        raise Conflict(str(error), code="version_conflict") from None
    if gone is None:
        raise NotFound(f"no alias {shown(alias)} of yours.", code="alias_not_found")
    return gone.target


def check_alias(alias: str) -> None:
    """Raises InvalidArgument: it is no name of an alias."""
    if not _ALIAS.fullmatch(alias):
        raise invalid("alias", "must be 1 to 64 of a-z, 0-9, ., _ and -, a letter or digit first", given=alias)


def _require_result(job: Job) -> None:
    if job.state is not JobState.SUCCEEDED:
        raise FailedPrecondition(
            f"job {job.id} must have succeeded. Given: {job.state.value}. Name the `step` of a checkpoint instead.",
            code="job_not_succeeded",
        )


def _checkpoint(door: Shelf, job: Job, step: int, *, tenant: str) -> Checkpoint:
    known: list[Checkpoint] = []
    after: str | None = None
    while True:
        page = door.jobs.checkpoints(job.id, tenant=tenant, after=after, limit=100)
        for item in page.data:
            if item.step == step:
                return item
        known += page.data
        if not page.has_more:
            break
        after = page.data[-1].id
    steps = ", ".join(str(item.step) for item in known[:16]) or "none"
    raise NotFound(
        f"job {job.id} has no checkpoint of step {shown(step)}. Steps: {steps}.", code="checkpoint_not_found"
    )


def _what(job: Job, step: int | None) -> str:
    return f"the result of {job.id}" if step is None else f"step {step} of {job.id}"


def _files(directory: Path) -> Iterator[Path]:
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        hidden = path.name.startswith((".", "optim-"))
        if not hidden and path.name not in _NOT_EXPORTED:
            yield path
