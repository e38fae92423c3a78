"""
Where everything of the job store lies. Names are made here and nowhere else, and none of them comes from a request.

    STORE/                       by default $TRILITHON_HOME/finetune
      jobs.db                    SQLite, unless a PostgreSQL URL is given
      files/SHA256               uploaded files, by content
      prepared/DIGEST/           tokenised data, shared by jobs with the same data, tokenizer, template and options
      models/                    what is served from here: the catalogue of `trilithon_server.catalog`
      jobs/JOB/
        job.json                 the resolved configuration and the paths that a phase reads
        run/                     the trainer's directory: step_XXXXXXXX/, latest, metrics.jsonl
        attempts/N/              what attempt N wrote: PHASE.json, events.jsonl, rank-R.log
        export/                  the adapter directory or model directory
        results/                 step_metrics.csv, report.json, predictions
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_JOB_ID = re.compile(r"ftjob-[a-z0-9]{20}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class JobPaths:
    """The directory of one job."""

    root: Path

    @property
    def spec(self) -> Path:
        """The resolved configuration."""
        return self.root / "job.json"

    @property
    def run(self) -> Path:
        """The trainer's directory."""
        return self.root / "run"

    @property
    def export(self) -> Path:
        """What the job made."""
        return self.root / "export"

    @property
    def results(self) -> Path:
        """Files of numbers for people."""
        return self.root / "results"

    def attempt(self, number: int) -> Path:
        """What attempt `number`, from 1, wrote."""
        return self.root / "attempts" / str(number)


@dataclass(frozen=True, slots=True)
class StorePaths:
    """The store's directory."""

    root: Path

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.root / "jobs.db"

    @property
    def models(self) -> Path:
        """The catalogue of finetuned models."""
        return self.root / "models"

    def file(self, sha256: str) -> Path:
        """The bytes of an uploaded file."""
        assert _DIGEST.fullmatch(sha256), sha256
        return self.root / "files" / sha256

    def prepared(self, digest: str) -> Path:
        """Tokenised data."""
        assert _DIGEST.fullmatch(digest), digest
        return self.root / "prepared" / digest

    def job(self, job_id: str) -> JobPaths:
        """The directory of a job."""
        assert _JOB_ID.fullmatch(job_id), job_id
        return JobPaths(self.root / "jobs" / job_id)
