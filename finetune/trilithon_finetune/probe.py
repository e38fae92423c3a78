"""
An estimate that was measured: the job's ranks start on the real layout, take a step or two, and are ended. No torch.

    prepare the data (the job finds them prepared) -> start the ranks -> the largest micro-batch, usual steps -> numbers

What one step took is multiplied by the steps; memory is what the fullest rank held at its largest micro-batch, with the
copies that a checkpoint makes besides.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from trilithon_finetune.errors import FinetuneError, JobError, refuse
from trilithon_finetune.estimate import Estimate, by_measurement
from trilithon_finetune.phases.phase import run_phase
from trilithon_finetune.setup import JobFile
from trilithon_parallel.launch.local import local


def probe(job: JobFile, estimate: Estimate) -> Estimate:
    """
    Measure what the job would take. The calling process must be at its main thread.

    Args:
        job: resolved and valid; its directory is made here, and is the caller's to remove.
        estimate: what was counted.
    Raises:
        FinetuneError: what ended the ranks: `out_of_memory`, `rank_lost`, ...
    """
    root = job.paths.root
    root.mkdir(parents=True, exist_ok=True)
    (root / "job.json").write_text(json.dumps(_spec(job)), encoding="utf-8")
    attempt = job.paths.attempt(1)
    attempt.mkdir(parents=True, exist_ok=True)
    if run_phase("prepare", root, 1):
        raise _error_of(attempt / "prepare.json")
    sizes = job.config.parallel
    ranks = sizes.tp * sizes.pp * sizes.dp
    command = [sys.executable, "-P", "-m", "trilithon_finetune.train", str(root), "--attempt", "1", "--probe"]
    code = local(command, nproc=ranks, run_dir=attempt, stop_s=10.0, log=lambda rank: attempt / f"rank-{rank}.log")
    if code:
        failed = [path for rank in range(ranks) if (path := attempt / f"train-{rank}.json").is_file()]
        if failed:
            raise _error_of(failed[0])
        raise refuse("rank_lost", f"the probe of the job ended with code {code}.", hint="Its ranks did not say why.")
    found = [json.loads((attempt / f"probe-{rank}.json").read_text("utf-8"))["data"] for rank in range(ranks)]
    tokens, seconds = found[0]["tokens"], max(rank["seconds"] for rank in found)
    peak = max(rank["peak_bytes"] for rank in found)
    return by_measurement(estimate, peak_bytes=peak, tokens_per_s=tokens / seconds)


def _spec(job: JobFile) -> dict[str, Any]:
    """`job.json` as `read_job` reads it."""
    plain = {field.name: getattr(job, field.name) for field in fields(job)}
    paths = {name: str(value) for name, value in plain.items() if isinstance(value, Path)}
    return {**plain, **paths, "config": job.config.model_dump(mode="json"), "store": str(job.store.root), "paths": None}


def _error_of(path: Path) -> FinetuneError:
    """What a phase or a rank said of its end."""
    said = json.loads(path.read_text("utf-8"))["error"]
    return FinetuneError(JobError.from_json(said))
