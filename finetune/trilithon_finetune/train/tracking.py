"""
Programs that show runs, behind one seam: each is given every row of a job's series, under the names that users see.

TensorBoard is the one there is. Others read its files (`wandb sync` does), the route `metrics` or `step_metrics.csv`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from trilithon_finetune.config import JobConfig
from trilithon_finetune.errors import refuse


class Tracker(Protocol):
    """Takes the numbers of a run, in the order of its steps, on rank 0 alone."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """One row of the series (`series.series_row`); all values are finite."""
        ...

    def close(self) -> None:
        """Everything is on the disk when this returns."""
        ...


class TensorBoard:
    """
    TensorBoard's event files.

    Args:
        directory: made where missing; every attempt of a job writes there.
        resume_step: the step that is continued from: those behind it, of an attempt before, are hidden.
    """

    def __init__(self, directory: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and few jobs ask for it

        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else None)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        for name, value in values.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def check_trackers(config: JobConfig) -> None:
    """Raises FinetuneError: `invalid_config`, a program that the job asks for is not installed here."""
    if config.integrations and importlib.util.find_spec("tensorboard") is None:
        raise refuse(
            "invalid_config",
            "integrations: tensorboard is not installed where the job would run.",
            param="integrations",
            hint="Install it there: pip install tensorboard.",
        )


def open_trackers(config: JobConfig, directory: Path, *, resume_step: int) -> tuple[Tracker, ...]:
    """What a job asks for, with their files in `directory`."""
    return tuple(TensorBoard(directory, resume_step=resume_step) for _ in config.integrations)
