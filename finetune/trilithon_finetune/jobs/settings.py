"""How a worker works."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """
    Attributes:
        slots: jobs at a time; validations go beside them, one at a time.
        lease_s: for which a job is held. renew_s: after which that is renewed. look_s: between two looks at what a
            job's owner wants, and for new jobs. tick_s: between two looks at a job's processes.
        backoff_s: before a lost attempt is tried again; it doubles with each.
        max_attempts: that may be lost before the job fails.
        grace_s: between asking processes to end and ending them.
        sweep_s: between two looks for what the store need not keep.
        models: directories of base models by their served name; other names are looked for in the model store.
        concepts: facts that rows may be labelled by, by the name that requests call them.
        phase_command: PHASE JOB_DIR --attempt N follow. train_command: JOB_DIR --attempt N follow. With -P, so that
            no file of the working directory stands in for a module.
    """

    slots: int = 1
    lease_s: float = 30.0
    renew_s: float = 10.0
    look_s: float = 0.5
    tick_s: float = 0.1
    backoff_s: float = 10.0
    max_attempts: int = 3
    grace_s: float = 30.0
    sweep_s: float = 3600.0
    models: Mapping[str, Path] = field(default_factory=dict)
    concepts: Mapping[str, Path] = field(default_factory=dict)
    phase_command: tuple[str, ...] = (sys.executable, "-P", "-m", "trilithon_finetune.phases")
    train_command: tuple[str, ...] = (sys.executable, "-P", "-m", "trilithon_finetune.train")
