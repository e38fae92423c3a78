"""Jobs, estimates, reports and numbers as text for people and as JSON for programs."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from trilithon._job_types import Checkpoint, Finding, Job, JobEvent, MetricsRow
from trilithon.cli._finetune_doors import Checked
from trilithon.cli._finetune_follow import duration, event_line
from trilithon.cli._output import human_bytes, plain, print_json, print_table, printable

OPENAI_COLUMNS = (
    "step",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)
"""First in every table and in this order (`trilithon_finetune.series` has the same; a test compares)."""

_SHOWN_ROWS = 20
_NOT_SHOWN = ("consumed_samples", "hfu", "mfu", "memory_bytes", "model_flops_per_s", "skipped", "tokens",
              "predicted_bytes", "bubble_planned", "bubble_measured", "loss_scale",
              "full_valid_loss", "full_valid_mean_token_accuracy")  # fmt: skip


def job_document(job: Job) -> dict[str, Any]:
    """A job as JSON: its configuration and estimate as trees."""
    import json

    document = {name: value for name, value in plain(job).items() if not name.endswith("_json")}
    estimate = json.loads(job.estimate_json) if job.estimate_json else None
    return {**document, "config": job.config, "estimate": estimate}


def print_job(job: Job) -> None:
    """One job."""
    progress, config = job.progress, job.config
    tuning = (config.get("tuning") or {}).get("kind") or "chosen by the task"
    facts = [
        ("model", job.model),
        ("task", f"{job.task}, {tuning}"),
        ("result", job.fine_tuned_model),
        ("step", f"{progress.step} of {progress.total_steps}" if progress.total_steps else ""),
        ("left", duration(progress.seconds_remaining) if progress.seconds_remaining else ""),
        ("queue", f"place {progress.queue_position}" if progress.queue_position else ""),
        ("tokens", f"{progress.trained_tokens:,}" if progress.trained_tokens else ""),
        ("attempt", str(job.attempt) if job.attempt > 1 else ""),
        ("seed", str(job.seed)),
        ("created", when(job.created_at)),
        ("took", duration(job.finished_at - job.started_at) if job.finished_at and job.started_at else ""),
        ("files", ", ".join(job.result_files)),
        ("error", f"{job.error.code}: {job.error.message}" if job.error and job.error.code else ""),
        ("hint", job.error.hint if job.error else ""),
    ]
    print(f"{job.id}  {job.state}")
    for name, value in facts:
        if value:
            print(f"  {name:<8} {printable(value)}")


def print_jobs(jobs: Sequence[Job]) -> None:
    """A table of jobs."""
    rows = [
        (
            job.id,
            job.state,
            job.model,
            job.task,
            f"{job.progress.step}/{job.progress.total_steps}" if job.progress.total_steps else "",
            when(job.created_at),
            job.fine_tuned_model or (job.error.code if job.error else ""),
        )
        for job in jobs
    ]
    print_table(("id", "state", "model", "task", "step", "created", "result"), rows)


def print_checkpoints(checkpoints: Sequence[Checkpoint]) -> None:
    """A table of checkpoints, with the numbers that any of them has."""
    names = columns({"step": 0, **item.metrics} for item in checkpoints)[1:]
    used = [name for name in names if name not in _NOT_SHOWN and any(name in item.metrics for item in checkpoints)]
    rows = [
        (
            item.step,
            when(item.created_at),
            human_bytes(item.bytes),
            "yes" if item.verified else "",
            "" if item.servable else "gone",
            *(f"{item.metrics[name]:.4f}" if name in item.metrics else "" for name in used),
        )
        for item in checkpoints
    ]
    print_table(("step", "created", "size", "verified", "files", *used), rows)


def print_event(event: JobEvent, *, as_json: bool) -> None:
    """One event a line."""
    if as_json:
        import json

        document = {name: value for name, value in plain(event).items() if name != "data_json"}
        print(json.dumps({**document, "data": event.data}, ensure_ascii=False), flush=True)
    else:
        clock = time.strftime("%H:%M:%S", time.localtime(event.created_at_ms / 1000))
        print(f"{event.seq:>5}  {clock}  {event_line(event)}", flush=True)


def columns(rows: Any) -> list[str]:
    """
    The columns of a table of numbers: OpenAI's first, then the others by name.

    >>> columns([{"step": 1, "lr": 0.1}, {"f1": 0.5}])[-2:]
    ['f1', 'lr']
    """
    names = {name for row in rows for name in row}
    return [*OPENAI_COLUMNS, *sorted(names - set(OPENAI_COLUMNS))]


def series(rows: Sequence[MetricsRow]) -> list[dict[str, Any]]:
    """Rows as objects; `step` is a whole number, all else as it is."""
    return [{"step": row.step, **row.values} for row in rows]


def print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """Every row; what was not measured stays empty."""
    writer = csv.DictWriter(sys.stdout, fieldnames=columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def print_series(rows: Sequence[Mapping[str, Any]]) -> None:
    """The newest rows, with the columns that have numbers."""
    if not rows:
        print("no steps yet")
        return
    shown = rows[-_SHOWN_ROWS:]
    names = [name for name in columns(rows) if name not in _NOT_SHOWN and any(name in row for row in shown)]
    cells = [["" if name not in row else _number(row[name]) for name in names] for row in shown]
    print_table(names, cells)
    if len(rows) > len(shown):
        print(f"({len(rows) - len(shown)} earlier rows and further columns: --csv or -o json)")


def print_checked(checked: Checked, config: Mapping[str, Any]) -> None:
    """The table of an estimate."""
    estimate, report = checked.estimate, checked.report
    training = (checked.resolved or config).get("training") or {}
    rows = f"{report['rows']:,} rows, " if report else ""
    supervised = estimate.get("supervised_tokens", 0)
    share = f" ({supervised / estimate['train_tokens']:.1%})" if estimate.get("train_tokens") else ""
    batch = f" of {training['batch_size']} rows" if training.get("batch_size") else ""
    epochs = f", {training['epochs']} epochs" if training.get("epochs") else ""
    available = estimate.get("available_bytes_per_rank")
    parts = sorted((estimate.get("memory_parts") or {}).items(), key=lambda item: -item[1])
    lines = [
        (
            "data",
            f"{rows}{estimate.get('train_tokens', 0):,} tokens to train on, {supervised:,} of them learned{share}",
        ),
        ("steps", f"{estimate.get('steps', 0):,}{batch}{epochs}"),
        (
            "memory",
            f"{human_bytes(estimate.get('peak_bytes_per_rank', 0))} a rank"
            + (f", {human_bytes(available)} free" if available else ""),
        ),
        *(("", f"{human_bytes(size):>12}  {name}") for name, size in parts if size),
        (
            "disk",
            f"{human_bytes(estimate.get('disk_bytes', 0))}, {human_bytes(estimate.get('disk_free_bytes', 0))} free",
        ),
        (
            "time",
            f"{duration(estimate.get('seconds', 0))}, from {duration(estimate.get('seconds_low', 0))} "
            f"to {duration(estimate.get('seconds_high', 0))}; "
            + ("measured by steps of the job" if estimate.get("measured") else "not measured"),
        ),
        ("fits", "yes" if estimate.get("allowed") else "no"),
    ]
    for name, value in lines:
        print(f"{name:<8} {value}".rstrip())
    for finding in estimate.get("findings") or ():
        print(f"  {printable(finding['message'])}")


def print_report(report: Any) -> None:
    """What a server found in a data file."""
    for item in report.findings:
        print(printable(finding_line(item)))
    print(
        f"{report.errors:,} errors and {report.warnings:,} warnings in {report.rows:,} rows"
        + (f" of {report.format}." if report.format else ".")
    )


def finding_line(item: Finding) -> str:
    """
    Code, place, path, message and hint of a finding, on one line.

    >>> finding_line(Finding(code="E-DATA-015", file="a.jsonl", line=3, path="text", message="is empty."))
    'E-DATA-015  a.jsonl:3  text: is empty.'
    """
    place = f"{item.file}:{item.line}" if item.line else item.file
    path = f"{item.path}: " if item.path else ""
    hint = f" {item.hint}" if item.hint else ""
    return f"{item.code}  {place}  {path}{item.message}{hint}"


def checked_document(checked: Checked) -> dict[str, Any]:
    """A check as JSON."""
    return {"estimate": checked.estimate, "report": checked.report, "resolved": checked.resolved}


def print_documents(value: Any) -> None:
    """Jobs, or one, as one JSON document."""
    print_json(job_document(value) if isinstance(value, Job) else [job_document(job) for job in value])


def when(seconds: int) -> str:
    """A moment in local time; empty for none."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
