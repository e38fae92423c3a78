"""Preparing: rows become samples on disk, before any rank exists. No torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from typing import Any

from trilithon_finetune.data.prepare import prepare, prepared_key
from trilithon_finetune.phases.outcome import Events, write_json
from trilithon_finetune.setup import JobFile, open_base

TELL_EVERY = 0.1
"""Share of the data between two events."""


def run(job: JobFile, events: Events) -> dict[str, Any]:
    """
    Make the job's prepared data, or find them made.

    Raises:
        FinetuneError: `invalid_training_file`, `invalid_validation_file`.
    """
    base = open_base(job)
    told = 0.0

    def tell(share: float) -> None:
        nonlocal told
        if share - told >= TELL_EVERY:
            told = share
            events.tell("prepare_progress", f"{share:.0%} of the data is tokenised.", data={"fraction": share})

    key = prepared_key(job.config, base.recipe, base.context, job.training_path, job.validation_path)
    with _none_taken_away(job):
        facts = prepare(
            job.config,
            base.recipe,
            base.context,
            job.training_path,
            job.validation_path,
            job.store.prepared(key),
            file=job.training_name,
            validation_file=job.validation_name,
            on_progress=tell,
        )
        os.utime(job.store.prepared(key))  # used now
        write_json(job.paths.prepared, {"prepared": key})
    message = f"{facts.train.samples} samples of {facts.train.tokens} tokens are ready."
    events.tell("prepared", message, data=facts.to_json())
    return {"prepared": key, "facts": facts.to_json()}


@contextlib.contextmanager
def _none_taken_away(job: JobFile) -> Iterator[None]:
    """Prepared data that are found stay until the job has said that it needs them."""
    lock = job.store.prepared_lock
    lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield
