"""Files of numbers that a job wrote, as files of its owner."""

from __future__ import annotations

from trilithon.errors import TrilithonError
from trilithon_finetune.jobs.moves import NewEvent
from trilithon_finetune.jobs.records import Job
from trilithon_finetune.jobs.service import Jobs


def collect_results(jobs: Jobs, job: Job) -> tuple[tuple[str, ...], tuple[NewEvent, ...]]:
    """
    Store what lies in the job's `results/` and `tensorboard/`; the ids, and a warning for each file that could not be.
    """
    ids, warnings = [], []
    paths = jobs.paths.job(job.id)
    found = [path for place in (paths.results, paths.tensorboard) if place.is_dir() for path in sorted(place.iterdir())]
    for path in found:
        try:
            with path.open("rb") as stream:
                file = jobs.put_file(stream, tenant=job.tenant, filename=path.name, purpose="fine-tune-results")
        except TrilithonError as error:
            message = f"The result file {path.name} is not among your files: {error}"
            warnings.append(NewEvent(kind="warning", level="warn", message=message))
        else:
            ids.append(file.id)
    return tuple(ids), tuple(warnings)
