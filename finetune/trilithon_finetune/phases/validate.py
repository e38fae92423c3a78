"""
Validation: configuration, model and data of a job are checked whole, every choice is made, and what it needs is told.

Everything that is wrong with the data is in the report; whether a job may run at all is the outcome. Loads no torch,
once the store knows what the machine computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from trilithon_finetune.config import JobConfig
from trilithon_finetune.data.batches import Heaviest, heaviest
from trilithon_finetune.data.check import check_file
from trilithon_finetune.data.evidence import NO_EVIDENCE, EvidenceSize, check_evidence, read_evidence
from trilithon_finetune.data.findings import reason
from trilithon_finetune.data.report import Report
from trilithon_finetune.errors import FinetuneError, JobError, UserCode
from trilithon_finetune.estimate import Estimate, Workload, estimate
from trilithon_finetune.labelling import label_source
from trilithon_finetune.machine import this_machine
from trilithon_finetune.phases.outcome import Events
from trilithon_finetune.resolve import resolve_choices, resolve_intervals, task_model
from trilithon_finetune.setup import Base, JobFile, base_digest, open_base
from trilithon_finetune.train.schedule import EpochSchedule, schedule_of
from trilithon_finetune.train.tracking import check_trackers

MAX_FINDINGS = 100
"""Findings that an outcome carries; all are counted."""


def run(
    job: JobFile, events: Events, *, measure: Callable[[JobFile, Estimate], Estimate] | None = None
) -> dict[str, Any]:
    """
    Check the job.

    Args:
        measure: makes the estimate better by trying the job out (`trilithon_finetune.probe`).
    Raises:
        FinetuneError: `invalid_config`, `model_not_found`; with the report `invalid_training_file`,
            `invalid_validation_file`; with report and estimate `estimate_exceeded`.
    """
    base = open_base(job)
    check_trackers(job.config)
    config = resolve_choices(job.config, base.recipe, base.model, job_id=job.job_id)
    job = replace(job, config=config)
    base = open_base(job)
    context = base.context
    if (source := label_source(job)) is not None:
        context = replace(context, label=source.counted(), labelled_by=source.digest())
    most = job.max_findings or MAX_FINDINGS
    report = check_file(
        job.training_path,
        recipe=base.recipe,
        context=context,
        file=job.training_name,
        validation=job.validation_path,
        validation_file=job.validation_name,
        bad_rows_allowed=config.data.bad_rows_allowed,
        max_findings=most,
    )
    told: dict[str, Any] = {"report": report.to_json()}
    _require(report, "training_file", "invalid_training_file", told)
    valid_tokens = round(report.tokens * config.data.validation_share)
    if job.validation_path is not None:
        valid = check_file(
            job.validation_path,
            recipe=base.recipe,
            context=replace(context, labels=report.labels, validating=True),
            file=job.validation_name,
            max_findings=most,
        )
        told["validation_report"] = valid.to_json()
        _require(valid, "validation_file", "invalid_validation_file", told)
        valid_tokens = valid.tokens
    unit = base.recipe.unit(base.context.options)
    schedule = _schedule(config, unit, report)
    config = resolve_intervals(config, steps_per_epoch=schedule.order.steps_per_epoch)
    lengths = np.add.reduceat(report.sample_lengths, np.arange(0, report.samples, unit))
    longest = report.lengths.longest
    if (tokens := base.recipe.unit_tokens(base.context)) is not None:
        lengths, longest = np.full_like(lengths, tokens), base.context.max_tokens
    grown = int(lengths.sum()) / report.tokens
    evidence = _evidence(job, base)
    work = Workload(
        tokens=int(lengths.sum()),
        supervised=report.supervised_tokens,
        longest=longest,
        units=schedule.order.num_units,
        valid_tokens=round(valid_tokens * grown) + _index_tokens(evidence, base),
        steps=schedule.num_steps,
        heaviest=_heaviest(config, lengths, schedule),
        evidence=evidence,
    )
    machine = this_machine(config, job.store.root)
    needs = estimate(config, task_model(config, base.recipe, base.model, report.labels), work, machine)
    checked = replace(
        job,
        config=config,
        base_digest=base_digest(job.model_dir),
        data_digest=report.data_digest,
        template_digest=report.template_digest,
    )
    if measure is not None:
        needs = measure(checked, needs)
    told |= {
        "resolved": config.model_dump(mode="json"),
        "estimate": needs.to_json(),
        "base_digest": checked.base_digest,
        "data_digest": checked.data_digest,
        "template_digest": checked.template_digest,
        "seed": config.seed,
    }
    if not needs.allowed:
        message = "the job does not fit: " + "; ".join(needs.problems)
        raise FinetuneError(JobError(code="estimate_exceeded", message=message), data=told)
    events.tell("validated", report.summary, data={"estimate": needs.to_json()})
    return told


def _require(report: Report, field: str, code: UserCode, told: dict[str, Any]) -> None:
    if report.ok:
        return
    lines = report.lines()
    message = f"{field} cannot be trained on: {reason(report.findings) or report.summary}"[:2000]
    raise FinetuneError(
        JobError(code=code, message=message, param=field, hint=report.summary), findings=tuple(lines), data=told
    )


def _evidence(job: JobFile, base: Base) -> EvidenceSize:
    """
    What a retriever finds; nothing without one.

    Raises:
        FinetuneError: `invalid_config`, of the passages.
    """
    if base.context.retriever is None:
        return NO_EVIDENCE
    passages = read_evidence(job)
    check_evidence(passages, base.context.options)
    return EvidenceSize.of(passages)


def _index_tokens(evidence: EvidenceSize, base: Base) -> int:
    """What a retriever reads to make an index, at most; 0 without one."""
    retriever = base.context.retriever
    return 0 if retriever is None else evidence.passages * retriever.format.max_passage_tokens


def _schedule(config: JobConfig, unit: int, report: Report) -> EpochSchedule:
    """The steps that the usable rows make; those that are held out don't count."""
    units = max(1, round(report.samples / unit * (1.0 - config.data.validation_share)))
    return schedule_of(config, units)


def _heaviest(config: JobConfig, lengths: npt.NDArray[np.int64], schedule: EpochSchedule) -> Heaviest:
    """The largest micro-batch; which rows are held out is not known yet, so the first ones stand for all."""
    assert config.training.micro_batch_tokens is not None
    return heaviest(
        schedule.order,
        lengths[: schedule.order.num_units].tolist(),
        num_steps=schedule.num_steps,
        dp=config.parallel.dp,
        micro_batch_tokens=config.training.micro_batch_tokens,
    )
