"""One phase of a job, and a file on how it ended."""

from __future__ import annotations

import importlib
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from trilithon_finetune.errors import FinetuneError, JobError, bug
from trilithon_finetune.paths import JobPaths
from trilithon_finetune.phases.outcome import Events, write_outcome
from trilithon_finetune.setup import read_job

PHASES = ("validate", "prepare", "export", "verify")


def run_phase(phase: str, directory: Path, number: int) -> int:
    """Run a phase of the job in `directory`, in its attempt `number`; 0 where it ended well. The outcome is a file."""
    attempt = JobPaths(directory).attempt(number)
    outcome = attempt / f"{phase}.json"
    try:
        module = importlib.import_module(f"trilithon_finetune.phases.{phase}")  # one of PHASES
        write_outcome(outcome, data=module.run(read_job(directory), Events(attempt)))
        return 0
    except Exception as error:
        job_error = _as_job_error(error, phase)
        print(f"{phase}: {job_error.message}", file=sys.stderr)
        if job_error.code == "bug":
            traceback.print_exc()
        found = error.data if isinstance(error, FinetuneError) else None
        write_outcome(outcome, data=found, error=replace(job_error, attempt=number))
        return 1


def _as_job_error(error: Exception, phase: str) -> JobError:
    if isinstance(error, FinetuneError):
        return error.error
    if isinstance(error, OSError) and error.errno in (28, 122):  # ENOSPC, EDQUOT
        return JobError(code="disk_full", message=f"{phase}: no space is left on the disk.", hint="Make room.")
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return JobError(code="out_of_memory", message=f"{phase}: not enough memory.", hint="Use shorter rows.")
    return bug(phase)
