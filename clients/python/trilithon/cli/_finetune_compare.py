"""Jobs side by side: the settings that differ, what came of them, and their curves in one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from trilithon._job_types import Job
from trilithon.cli import _extra
from trilithon.cli._finetune_doors import Door
from trilithon.cli._finetune_follow import duration
from trilithon.cli._finetune_text import series
from trilithon.cli._output import print_table

_COLOURS = ("#2f6fde", "#d9622b", "#2c8c5a", "#8f3fb4", "#7a6a1c", "#b4233f", "#1d7f8c", "#5c6470")
_CURVES = (("loss", "train_loss"), ("validation loss", "valid_loss"), ("learning rate", "lr"))
_NOT_MEASURES = ("step", "lr", "grad_norm", "tokens", "mfu", "hfu", "memory_bytes", "step_seconds", "predicted_bytes",
                 "tokens_per_second", "model_flops_per_s", "consumed_samples", "skipped", "loss_scale",
                 "bubble_planned", "bubble_measured", "full_valid_loss", "full_valid_mean_token_accuracy")  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One of the jobs: the whole, and its numbers by step."""

    job: Job
    rows: Sequence[Mapping[str, Any]]

    @property
    def short(self) -> str:
        """The end of its id, which differs from those of its neighbours."""
        return self.job.id[-6:]

    @property
    def measures(self) -> dict[str, float]:
        """Of losses and metrics: the last training loss, and the best of each evaluation as far as its name tells."""
        found: dict[str, float] = {}
        for row in self.rows:
            for name, value in row.items():
                if name in _NOT_MEASURES:
                    continue
                if name == "train_loss":
                    found[name] = value
                else:
                    better = min if "loss" in name else max
                    found[name] = better(found.get(name, value), value)
        return found

    @property
    def seconds(self) -> int | None:
        """From the first attempt to the end."""
        return self.job.finished_at - self.job.started_at if self.job.finished_at and self.job.started_at else None

    @property
    def tokens_per_second(self) -> float | None:
        """Over all steps."""
        steps = [row for row in self.rows if row.get("tokens") and row.get("step_seconds")]
        return sum(row["tokens"] for row in steps) / sum(row["step_seconds"] for row in steps) if steps else None


def compared(door: Door, job_ids: Sequence[str]) -> list[Compared]:
    """The jobs, read."""
    return [Compared(door.get(job_id), series(door.metrics(job_id))) for job_id in job_ids]


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """
    Settings that are not the same in all, by their dotted names; None where one has none.

    >>> differences([{"training": {"epochs": 1}, "task": "sft"}, {"training": {"epochs": 2}, "task": "sft"}])
    {'training.epochs': [1, 2]}
    """
    flat = [dict(_flat(config)) for config in configs]
    names = dict.fromkeys(name for config in flat for name in config)
    found = {name: [config.get(name) for config in flat] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def document(jobs: Sequence[Compared]) -> dict[str, Any]:
    """The comparison as JSON."""
    return {
        "jobs": [
            {
                "id": item.job.id,
                "state": item.job.state,
                "steps": item.job.progress.step,
                "seconds": item.seconds,
                "tokens_per_second": item.tokens_per_second,
                "measures": item.measures,
            }
            for item in jobs
        ],
        "differences": differences([item.job.config for item in jobs]),
    }


def print_comparison(jobs: Sequence[Compared]) -> None:
    """Settings that differ, then what came of them."""
    rows: list[list[object]] = [
        [name, *(_shown(value) for value in values)]
        for name, values in differences([item.job.config for item in jobs]).items()
    ]
    rows.append(["state", *(item.job.state for item in jobs)])
    rows.append(["steps", *(str(item.job.progress.step) for item in jobs)])
    names = dict.fromkeys(name for item in jobs for name in item.measures)
    rows += [
        [
            name if name == "train_loss" else f"{name}, best",
            *(f"{item.measures[name]:.4f}" if name in item.measures else "" for item in jobs),
        ]
        for name in names
    ]
    rows.append(["time", *("" if item.seconds is None else duration(item.seconds) for item in jobs)])
    speeds = [item.tokens_per_second for item in jobs]
    rows.append(["tokens/s", *("" if speed is None else f"{speed:,.0f}" for speed in speeds)])
    print_table(("", *(item.short for item in jobs)), rows)


def picture(jobs: Sequence[Compared]) -> str:
    """The curves of all jobs as SVG."""
    plot = load_plot()
    renamed = [
        {"step": row.get("step"), **{f"{name}/{number}": row[name] for _, name in _CURVES if name in row}}
        for number, item in enumerate(jobs)
        for row in item.rows
    ]
    panels = [
        plot.Panel(
            title,
            250 if title == "loss" else 140,
            tuple(
                plot.Curve(f"{name}/{number}", item.short, _COLOURS[number % len(_COLOURS)], name == "valid_loss")
                for number, item in enumerate(jobs)
            ),
        )
        for title, name in _CURVES
    ]
    drawn: str = plot.plot(renamed, title=" | ".join(item.job.id for item in jobs), panels=panels)
    return drawn


def load_plot() -> ModuleType:
    """The module that draws; it needs nothing beyond the base install."""
    return _extra.load("trilithon_finetune.plot", verb="finetune plot", extra="client")


def write_picture(path: Path, svg: str) -> None:
    """Write a picture. Raises OSError."""
    path.write_text(svg, encoding="utf-8")


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        inner = isinstance(value, dict) and bool(value)
        found += _flat(value, f"{prefix}{name}.") if inner else [(f"{prefix}{name}", value)]
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
