"""Preparing: rows become samples on disk, before any rank exists. No torch but where rows are to be labelled."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from trilithon_finetune.data.prepare import prepare, prepared_key
from trilithon_finetune.labelling import Label, LabelSource, Steps, by_story, label_source
from trilithon_finetune.phases.outcome import Events, write_json
from trilithon_finetune.setup import JobFile, open_base

TELL_EVERY = 0.1
"""Share of the work between two events."""
LABELLED = 0.8
"""Share of the work that is done when the rows are labelled, where they are."""


def run(job: JobFile, events: Events) -> dict[str, Any]:
    """
    Make the job's prepared data, or find them made.

    Raises:
        FinetuneError: `invalid_training_file`, `invalid_validation_file`; `invalid_config`, labels cannot be made.
    """
    base, source = open_base(job), label_source(job)
    context = base.context if source is None else replace(base.context, labelled_by=source.digest())
    key = prepared_key(job.config, base.recipe, context, job.training_path, job.validation_path)
    with _none_taken_away(job):
        begun = 0.0
        if source is not None and not job.store.prepared(key).is_dir():
            begun = LABELLED
            context = replace(context, label=_label(job, source, _teller(events, "labelled", 0.0, begun)))
        facts = prepare(
            job.config,
            base.recipe,
            context,
            job.training_path,
            job.validation_path,
            job.store.prepared(key),
            file=job.training_name,
            validation_file=job.validation_name,
            on_progress=_teller(events, "tokenised", begun, 1.0),
        )
        os.utime(job.store.prepared(key))  # used now
        write_json(job.paths.prepared, {"prepared": key})
    message = f"{facts.train.samples} samples of {facts.train.tokens} tokens are ready."
    events.tell("prepared", message, data=facts.to_json())
    return {"prepared": key, "facts": facts.to_json()}


def _label(job: JobFile, source: LabelSource, told: Callable[[float], None]) -> Label:
    """Labels of the job's rows, those of both files."""
    files = [(job.training_path, job.training_name)]
    if job.validation_path is not None:
        files.append((job.validation_path, job.validation_name))
    known: dict[str, Steps] = {}
    for number, (path, name) in enumerate(files):

        def part(share: float, before: int = number) -> None:
            told((before + share) / len(files))

        known |= source.kept(path, job.store, file=name or path.name, told=part)
    return by_story(known)


def _teller(events: Events, done: str, first: float, last: float) -> Callable[[float], None]:
    """What is told the share of a part of the work, which goes from `first` to `last` of the whole."""
    told = first

    def tell(share: float) -> None:
        nonlocal told
        fraction = first + (last - first) * share
        if fraction - told >= TELL_EVERY:
            told = fraction
            events.tell("prepare_progress", f"{share:.0%} of the data is {done}.", data={"fraction": fraction})

    return tell


@contextlib.contextmanager
def _none_taken_away(job: JobFile) -> Iterator[None]:
    """Prepared data that are found stay until the job has said that it needs them."""
    lock = job.store.prepared_lock
    lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield
