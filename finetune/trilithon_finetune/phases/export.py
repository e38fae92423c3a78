"""
Export: the best checkpoint of a job, or its last, as what a server loads.

An adapter's checkpoint is an adapter directory as it stands, and a model's is a model directory; the export is that
without the optimizer, with what the task's text format needs beside it. It is there whole or not at all.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from trilithon_finetune.errors import refuse
from trilithon_finetune.phases.outcome import Events, write_json
from trilithon_finetune.resolve import lora_spec
from trilithon_finetune.series import columns_of, series_row
from trilithon_finetune.setup import JobFile
from trilithon_finetune.train.work import Work, export_digest, open_work
from trilithon_parallel.checkpoint import CheckpointError, Manifest, export, find_latest
from trilithon_parallel.checkpoint.run_dir import step_name, sync_directory
from trilithon_parallel.checkpoint.table import STRENGTH_FILE
from trilithon_parallel.config import QUERY_DIR, RETRIEVER_DIR
from trilithon_parallel.grid import Grid
from trilithon_parallel.lora.files import CONFIG_FILE, FACTS_FILE, TENSORS_FILE
from trilithon_parallel.report import StepMetrics, read_metrics
from trilithon_parallel.shapes import STRENGTH
from trilithon_server.engine.identity import model_digest
from trilithon_server.tasks import TASK_FILE, read_task
from trilithon_server.tasks.retrieval import RetrievalFormat
from trilithon_server.tasks.story_format import RankerFormat
from trilithon_server.text.template import TEMPLATE_FILE


def run(job: JobFile, events: Events) -> dict[str, Any]:
    """
    Write the export and the files of numbers.

    Raises:
        FinetuneError: `export_failed`, `checkpoint_corrupt`.
    """
    step, directory = chosen_checkpoint(job)
    events.tell("export_started", f"Exporting the checkpoint of step {step}.", data={"step": step})
    work = open_work(job)
    out = write_export(work, directory, job.paths.export, step=step)
    digest = export_digest(work, out)
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    steps = read_metrics(job.paths.run)
    write_results(job, steps)
    kind = "model" if lora_spec(job.config) is None else "adapter"
    told = {"digest": digest, "bytes": num_bytes, "kind": kind, "step": step}
    events.tell("exported", f"The {kind} of step {step} is written.", data=told)
    return {**told, "peak_bytes": max((metrics.peak_bytes or 0 for metrics in steps), default=0)}


def chosen_checkpoint(job: JobFile) -> tuple[int, Path]:
    """
    The best checkpoint by the job's own number, where there was a validation; else the last.

    Raises:
        FinetuneError: `checkpoint_corrupt`: there is none, or none is whole.
    """
    try:
        found = find_latest(job.paths.run, axis=Grid.single().world)
    except CheckpointError as error:
        raise refuse("checkpoint_corrupt", str(error)) from None
    if found is None:
        raise refuse("checkpoint_corrupt", f"job {job.job_id} has no checkpoint to export.")
    best = best_step(found.manifest)
    step = found.manifest.step if best is None else best
    return step, job.paths.run / step_name(step)


def best_step(manifest: Manifest) -> int | None:
    """The step of the best evaluation until a checkpoint; None where nothing was evaluated."""
    best = manifest.state.get("best")
    return int(best["step"]) if isinstance(best, dict) and isinstance(best["step"], int) else None


def write_export(work: Work, checkpoint: Path, out: Path, *, step: int) -> Path:
    """
    Write the directory that a server loads, in the place of one that an earlier attempt wrote.

    Returns:
        `out`.
    Raises:
        FinetuneError: `export_failed`.
    """
    part = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        if lora_spec(work.config) is None:
            export(checkpoint, part)
        else:
            part.mkdir(parents=True)
            for name in (CONFIG_FILE, TENSORS_FILE, FACTS_FILE):
                if (checkpoint / name).is_file():
                    shutil.copy2(checkpoint / name, part / name)
    except CheckpointError as error:
        raise refuse("export_failed", f"checkpoint {checkpoint.name} cannot be exported: {error}") from None
    numbers = {**validation_of(work.job, step), **_learned_numbers(checkpoint)}
    if task := work.recipe.task_file(work.context, numbers):
        write_json(part / TASK_FILE, task)
    if work.context.retriever is not None:
        write_json(part / RETRIEVER_DIR / TASK_FILE, work.context.retriever.format.task_file())
    for directory in (part, part / RETRIEVER_DIR):
        if (directory / QUERY_DIR).is_dir():
            _tell_apart(directory)
    if work.context.template is not None:
        (part / TEMPLATE_FILE).write_text(work.context.template.source, encoding="utf-8")
    sync_directory(part)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    sync_directory(out.parent)
    return out


def _tell_apart(directory: Path) -> None:
    """Of two encoders, the task file of that of questions: it names the passages that it asks for."""
    passages = read_task(directory)
    assert isinstance(passages, RetrievalFormat | RankerFormat)
    questions = replace(passages, reads="questions", passages_by=model_digest(directory))
    write_json(directory / QUERY_DIR / TASK_FILE, questions.task_file())


def _learned_numbers(checkpoint: Path) -> dict[str, float]:
    """Scalars that were learned and that no model's files hold, by their canonical names."""
    if not (checkpoint / STRENGTH_FILE).is_file():
        return {}
    return {STRENGTH: float(load_file(checkpoint / STRENGTH_FILE)[STRENGTH])}


def validation_of(job: JobFile, step: int) -> Mapping[str, float]:
    """What the evaluation behind a step measured, by name; empty where none followed it."""
    found = {metrics.step: metrics.validation for metrics in read_metrics(job.paths.run)}
    return found.get(step) or {}


def write_results(job: JobFile, steps: Sequence[StepMetrics]) -> None:
    """`step_metrics.csv`, for people and spreadsheets."""
    results = job.paths.results
    results.mkdir(parents=True, exist_ok=True)
    rows = [series_row(asdict(step)) for step in steps]
    with (results / "step_metrics.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns_of(rows), restval="")
        writer.writeheader()
        writer.writerows(rows)
