"""What becomes of a job's result on this machine: written as a directory, merged, verified."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from trilithon import _store
from trilithon._job_types import Job
from trilithon.cli import _extra
from trilithon.cli._finetune_doors import Door
from trilithon.cli._output import EXIT_CHECK_FAILED, EXIT_INVALID_DATA, EXIT_OK, explain, print_json, print_table
from trilithon.cli._parser import UsageError
from trilithon.errors import DataLoss, FailedPrecondition


def export(door: Door, job: Job, *, step: int | None, format: str | None, base: str | None, out: Path) -> str:
    """
    Write what a job made, whole or not at all; the format that it has.

    Raises:
        UsageError: the directory is there already.
        TrilithonError: the job has no result, or not in this format; or its base is not here.
    """
    if out.exists():
        raise UsageError(f"-o must name a directory that does not exist. Given: {out}.")
    made = "peft" if (job.config.get("tuning") or {}).get("kind") == "lora" else "model"
    if format == "peft" and made == "model":
        raise FailedPrecondition(f"job {job.id} trained a whole model, which is no adapter. Given: --format peft.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        part = Path(scratch) / "export"
        part.mkdir()
        merging = format == "model" and made == "peft"
        there = merging and door.merges and base is None
        door.fetch(job.id, step=step, into=part, merged=there)
        if merging and not there:
            merged = Path(scratch) / "merged"
            _merge(part, _base_of(job, base), merged)
            part = merged
        shutil.move(part, out)
    return format or made


def verify(directory: Path, base: str | None, *, as_json: bool) -> int:
    """Print every check of a directory; the exit code."""
    reader, reload, config = (
        _extra.load(name, verb="finetune verify", extra="jobs")
        for name in ("trilithon.cli._finetune_config", "trilithon_finetune.reload", "trilithon_parallel.config")
    )
    if not directory.is_dir():
        raise UsageError(f"DIR must be an adapter directory or a model directory. Given: {directory}.")
    try:
        with reader.told():
            checks = reload.verify_directory(directory, None if base is None else _store.resolve(base))
    except config.ModelError as error:
        return explain(error, EXIT_INVALID_DATA, as_json=as_json)
    passed = all(check.passed for check in checks)
    if as_json:
        found = [
            {"name": check.name, "max_abs": check.max_abs, "allowed": check.allowed, "passed": check.passed}
            for check in checks
        ]
        print_json({"directory": str(directory), "passed": passed, "checks": found})
    else:
        print_table(("check", "largest difference", "allowed", "holds"), [_row(check) for check in checks])
    return EXIT_OK if passed else EXIT_CHECK_FAILED


def _row(check: Any) -> tuple[str, ...]:
    numbers = ("", "") if check.allowed is None else (f"{check.max_abs:.2e}", f"{check.allowed:.0e}")
    return (check.name, *numbers, "yes" if check.passed else "NO")


def _base_of(job: Job, given: str | None) -> Path:
    """The base of an adapter, which must be the one that it was trained on."""
    path = _store.resolve(given or job.model)
    digest = _extra.load("trilithon_server.engine.identity", verb="finetune export", extra="engine").model_digest(path)
    if job.base_digest and digest != job.base_digest:
        raise FailedPrecondition(
            f"--base must be the model that {job.id} was trained on, with digest {job.base_digest[:12]}. "
            f"Given: {path}, with digest {digest[:12]}.",
            code="base_mismatch",
        )
    return path


def _merge(adapter: Path, base: Path, out: Path) -> None:
    merge, config = (
        _extra.load(f"trilithon_parallel.{name}", verb="finetune export", extra="engine")
        for name in ("lora.merge", "config")
    )
    try:
        merge.merge_adapter(base, adapter, out)
    except config.ModelError as error:
        raise DataLoss(str(error), code=error.code) from None
