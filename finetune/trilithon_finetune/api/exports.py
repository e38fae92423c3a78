"""
What a job made as a zip file of its owner, also as a model directory where the job made an adapter.

Merging loads torch and the whole base, so a process does it beside the front, in a directory of the store that is
there only meanwhile. The files of an answer are ready when it comes.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from trilithon.errors import FailedPrecondition, Internal
from trilithon_finetune.api import results
from trilithon_finetune.api.door import Door
from trilithon_finetune.api.processes import Turns, output_of
from trilithon_finetune.jobs.records import File, Job
from trilithon_server.engine.identity import model_digest

COMMAND = (sys.executable, "-P", "-m", "trilithon_finetune.merging")
SCRATCH = ".merge-"
"""Prefix of directories in the store where a model is merged."""
LIMIT_S = 1800.0

_log = logging.getLogger(__name__)


class Exports:
    """
    Args:
        door: whose jobs and models count.
        command: merges; gets the base's directory, the adapter's, and the one to write.
        limit_s: how long that may take.
    """

    def __init__(self, door: Door, *, command: Sequence[str] = COMMAND, limit_s: float = LIMIT_S) -> None:
        self._door, self._command, self._limit_s = door, tuple(command), limit_s
        self._turns = Turns("exports", running=1, waiting=8)

    async def export(self, job_id: str, *, tenant: str, step: int | None, format: str | None) -> File:
        """
        A zip file of purpose `fine-tune-results`. Args and Raises: as of `results.export`; also

        Raises:
            FailedPrecondition: `base_mismatch`, the base of that name is another one by now.
            Overloaded, DeadlineExceeded: too many at once, or it takes too long.
        """
        job = await self._door.run(self._door.jobs.get, job_id, tenant=tenant)
        if format != "model" or results.made(job) != "peft":
            return await self._door.run(results.export, self._door, job_id, tenant=tenant, step=step, format=format)
        files = await self._door.run(results.exported_files, self._door, job_id, tenant=tenant, step=step)
        async with self._turns.taken():
            base = await self._door.run(self._base, job)
            scratch = Path(await self._door.run(tempfile.mkdtemp, prefix=SCRATCH, dir=self._door.paths.root))
            try:
                merged = scratch / "model"
                await self._merge(job, base, files[0].parent, merged)
                name = results.archive_name(job_id, step, "model")
                paths = await self._door.run(lambda: sorted(merged.iterdir()))
                return await self._door.run(results.archive, self._door, paths, tenant=tenant, filename=name)
            finally:
                await self._door.run(shutil.rmtree, scratch, ignore_errors=True)

    def _base(self, job: Job) -> Path:
        """The directory of the model that the job's adapter stands on."""
        begun = self._door.catalog.get(job.model, tenant=job.tenant)
        name = begun.base if begun is not None and begun.kind == "adapter" else job.model
        path = Path(self._door.base_paths(name, tenant=job.tenant)["model_dir"])
        if job.base_digest and (digest := model_digest(path)) != job.base_digest:
            raise FailedPrecondition(
                f"{job.id} was trained on a model `{name}` with digest {job.base_digest[:12]}. "
                f"Here it has digest {digest[:12]}.",
                code="base_mismatch",
                hint="Export the adapter, and merge it where its base is.",
            )
        return path

    async def _merge(self, job: Job, base: Path, adapter: Path, out: Path) -> None:
        since = time.monotonic()
        _log.info("merge_started", extra={"job_id": job.id})
        late = f"merging may take at most {self._limit_s:g} s. Export the adapter, and merge it yourself."
        output = await output_of((*self._command, str(base), str(adapter), str(out)), limit_s=self._limit_s, late=late)
        if not await self._door.run(out.is_dir):
            _log.error(
                "merge_failed", extra={"job_id": job.id, "last_lines": output[-2000:].decode("utf-8", "replace")}
            )
            raise Internal(f"the adapter of {job.id} could not be merged into its base.", code="export_failed")
        _log.info("merged", extra={"job_id": job.id, "seconds": round(time.monotonic() - since, 3)})
