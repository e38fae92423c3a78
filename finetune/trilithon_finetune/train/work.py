"""What one job's ranks, its export and its verification have in common, read after the data were prepared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from trilithon_finetune.config import JobConfig
from trilithon_finetune.data.prepared import Prepared, open_prepared
from trilithon_finetune.recipes.base import Context, Recipe
from trilithon_finetune.resolve import lora_spec, task_model
from trilithon_finetune.setup import JobFile, open_base
from trilithon_finetune.train.schedule import EpochSchedule, schedule_of
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.contrast_terms import Contrast
from trilithon_parallel.lora.peft import read_adapter
from trilithon_server.engine.identity import model_digest


@dataclass(frozen=True)
class Work:
    """What one job's ranks have in common."""

    job: JobFile
    recipe: Recipe
    context: Context
    base: ModelConfig
    model: ModelConfig
    prepared: Prepared
    schedule: EpochSchedule

    @property
    def config(self) -> JobConfig:
        """The resolved configuration."""
        return self.job.config

    @property
    def beta(self) -> float:
        """Of preferences."""
        return float(getattr(self.context.options, "beta", 0.1))

    @property
    def trains_passages(self) -> bool:
        """Of two encoders, whether that of passages learns."""
        return self.recipe.trains_passages(self.context)

    @property
    def contrast(self) -> Contrast:
        """How vectors are told apart."""
        return self.recipe.contrast(self.context)


def open_work(job: JobFile) -> Work:
    """Read what a job trains, after it was prepared."""
    base = open_base(job)
    prepared = open_prepared(job.prepared_dir)
    labels = prepared.facts.labels
    model = task_model(job.config, base.recipe, base.model, labels)
    context = replace(base.context, labels=labels, validating=True)
    schedule = schedule_of(job.config, prepared.train.num_units)
    return Work(job, base.recipe, context, base.model, model, prepared, schedule)


def export_digest(work: Work, directory: Path) -> str:
    """The identity of an export, or of a checkpoint as it stands, as the server computes it."""
    if lora_spec(work.config) is None:
        return model_digest(directory)
    return read_adapter(directory, config=work.base).digest
