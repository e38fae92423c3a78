"""Files of numbers that a job wrote, as files of its owner."""

from __future__ import annotations

from trilithon.errors import TrilithonError
from trilithon_finetune.jobs.moves import NewEvent
from trilithon_finetune.jobs.records import Job
from trilithon_finetune.jobs.service import Jobs


def collect_results(jobs: Jobs, job: Job) -> tuple[tuple[str, ...], tuple[NewEvent, ...]]:
    """Store what lies in the job's `results/`; the ids, and a warning for each file that could not be stored."""
    ids, warnings = [], []
    directory = jobs.paths.job(job.id).results
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        try:
            with path.open("rb") as stream:
                file = jobs.put_file(stream, tenant=job.tenant, filename=path.name, purpose="fine-tune-results")
        except TrilithonError as error:
            message = f"The result file {path.name} is not among your files: {error}"
            warnings.append(NewEvent(kind="warning", level="warn", message=message))
        else:
            ids.append(file.id)
    return tuple(ids), tuple(warnings)
