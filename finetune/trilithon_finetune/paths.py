"""
Where everything of the job store lies. Names are made here and nowhere else, and none of them comes from a request.

    STORE/                       by default $TRILITHON_HOME/finetune
      jobs.db                    SQLite, unless a PostgreSQL URL is given
      files/SHA256               uploaded files, by content
      policy.yaml                how long things are kept, where that is not as usual (`jobs/policy.py`)
      peaks.json                 what a rank of a machine computes at most (`peaks.py`)
      serving/                   what servers on a host keep for themselves (`jobs/reservations.py`)
      prepared/DIGEST/           tokenised data, shared by jobs with the same data, tokenizer, template and options
      prepared/.lock             shared while data are prepared, exclusive while some are taken away
      models/                    what is served from here: the catalogue of `trilithon_server.catalog`
      jobs/JOB/
        job.json                 the resolved configuration and the paths that a phase reads
        prepared.json            which prepared data are the job's: {"prepared": DIGEST}
        run/                     the trainer's directory: step_XXXXXXXX/, latest, metrics.jsonl
        attempts/N/              what attempt N wrote: PHASE.json, events.jsonl, rank-R.log
        export/                  the adapter directory or model directory
        results/                 step_metrics.csv, report.json, predictions
        tensorboard/             event files, of a job that asks for them
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
    def prepared(self) -> Path:
        """Which prepared data are the job's; not there before they are."""
        return self.root / "prepared.json"

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

    @property
    def tensorboard(self) -> Path:
        """Event files of TensorBoard."""
        return self.root / "tensorboard"

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

    @property
    def policy(self) -> Path:
        """How long things are kept."""
        return self.root / "policy.yaml"

    @property
    def serving(self) -> Path:
        """What servers keep for themselves."""
        return self.root / "serving"

    @property
    def prepared_lock(self) -> Path:
        """Held by those who prepare data, or take prepared data away."""
        return self.root / "prepared" / ".lock"

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
