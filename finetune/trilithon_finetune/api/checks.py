"""
Checks and estimates for requests: the phase `validate` of a job that does not exist, in a process of its own.

The front loads no torch and must never be slow, and a data file may be large: so the phase's own code runs beside it,
in a scratch directory, within a time limit, and no more than a few at once.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trilithon.errors import FailedPrecondition, Internal, InvalidArgument, Violation
from trilithon_finetune.api.door import Door
from trilithon_finetune.api.processes import Turns, output_of
from trilithon_finetune.config import JobConfig
from trilithon_finetune.errors import JobError
from trilithon_finetune.paths import JobPaths

COMMAND = (sys.executable, "-P", "-m", "trilithon_finetune.phases")
MAX_RUNNING, MAX_WAITING = 2, 16
LIMIT_S = 300.0

_log = logging.getLogger(__name__)


class Checks:
    """
    Args:
        door: whose files and models count.
        command: runs a phase; gets its name, a directory and `--attempt 1`.
        limit_s: how long one may take.
    """

    def __init__(self, door: Door, *, command: Sequence[str] = COMMAND, limit_s: float = LIMIT_S) -> None:
        self._door = door
        self._command = tuple(command)
        self._limit_s = limit_s
        self._turns = Turns("checks", running=MAX_RUNNING, waiting=MAX_WAITING)

    async def validate(self, config: JobConfig, *, tenant: str, max_findings: int = 20) -> Mapping[str, Any]:
        """
        What the phase answers for a job with this configuration: `report`, `estimate`, `resolved` and digests.

        Raises:
            NotFound: the model or a file.
            InvalidArgument: the configuration is one that the phase refuses; a bad file is a report, not an error.
            Overloaded, DeadlineExceeded: too many at once, or it takes too long.
        """
        spec = await self._spec(config, tenant=tenant, max_findings=max_findings)
        async with self._turns.taken():
            return await self._run(spec)

    async def _spec(self, config: JobConfig, *, tenant: str, max_findings: int) -> dict[str, Any]:
        door = self._door
        named = [("training", config.training_file)]
        named += [("validation", config.validation_file)] if config.validation_file is not None else []
        named += [("passages", config.passages)] if config.passages is not None else []
        spec: dict[str, Any] = {
            "job_id": "ftjob-" + "0" * 20,
            "tenant": tenant,
            "name": "estimate",
            "config": config.model_dump(mode="json"),
            "store": str(door.paths.root),
            "validation_path": None,
            "max_findings": max_findings,
            **await door.run(door.base_paths, config.model, tenant=tenant),
        }
        if config.retriever is not None:
            found = await door.run(door.base_paths, config.retriever, tenant=tenant)
            spec["retriever_dir"] = found["model_dir"]
        for which, file_id in named:
            file = await door.run(door.jobs.get_file, file_id, tenant=tenant)
            spec[f"{which}_path"] = str(await door.run(door.jobs.file_path, file_id, tenant=tenant))
            spec[f"{which}_name"] = file.filename
        return spec

    async def _run(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        scratch = Path(await self._door.run(tempfile.mkdtemp, prefix="trilithon-check-"))
        try:
            paths = JobPaths(scratch)
            paths.spec.write_text(json.dumps(spec), encoding="utf-8")
            output = await self._process(scratch)
            try:
                outcome = json.loads((paths.attempt(1) / "validate.json").read_bytes())
            except (OSError, ValueError):
                _log.error("check_failed", extra={"last_lines": output[-2000:].decode("utf-8", "replace")})
                raise Internal("the check ended without an answer.") from None
            return _answer(outcome)
        finally:
            await self._door.run(shutil.rmtree, scratch, ignore_errors=True)

    async def _process(self, scratch: Path) -> bytes:
        late = f"a check may take at most {self._limit_s:g} s. Use `trilithon finetune validate`."
        command = (*self._command, "validate", str(scratch), "--attempt", "1")
        return await output_of(command, limit_s=self._limit_s, late=late)


def _answer(outcome: Mapping[str, Any]) -> Mapping[str, Any]:
    """The phase's data; a refused file has a report too, and is no error of the request."""
    data = outcome.get("data") or {}
    if outcome.get("ok") or "report" in data:
        return dict(data)
    error = JobError.from_json(outcome["error"])
    message = f"{error.message} {error.hint}".strip()
    if error.kind == "internal":
        raise Internal(message)
    if error.kind == "infra":
        raise FailedPrecondition(message, code=error.code)
    details = [Violation(field=error.param, code=error.code, message=message)] if error.param else []
    raise InvalidArgument(message, code=error.code, details=details)
