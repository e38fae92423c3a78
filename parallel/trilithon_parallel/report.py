"""
What a training run says of itself, step by step: numbers, a file of them, and who shows them. Rank 0 reports.

`metrics.jsonl` in the run directory is the record: one object a step, readable while the run goes on, cut back to the
step that a resumed run continues from. The display (`progress.py`), TensorBoard's files and the plot (`curves.py`) say
the same numbers again.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from trilithon_parallel.progress import Eta, make_display

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
DRAW_EVERY = 1000  # steps; a drawing takes about a second


@dataclass(frozen=True)
class StepMetrics:
    """
    One training step. Rates are over the whole step; FLOP/s, MFU and bytes are those of one device.

    Args:
        step: number of the step, from 1: how many were done when it ended.
        loss: mean over the step's supervised tokens; NaN or infinite where it was.
        grad_norm: norm over all parameters before clipping.
        learning_rate: that the step used.
        tokens: supervised and unsupervised tokens of all ranks together; `step_s`: seconds it took.
        tokens_per_s: of all ranks together.
        model_flops_per_s: FLOPs of forward and backward without recomputation, per second.
        mfu: `model_flops_per_s` of the device's peak, from 0 to 1; None where no peak is known.
        hfu: the same with recomputation counted (arXiv 2205.05198, section 5.3).
        consumed_samples: sequences since the start of training.
        skipped: steps whose update was left out so far, since something was not finite.
        loss_scale: of fp16 training.
        token_accuracy: share of the step's supervised tokens that the model would have said, before it learned them;
            from 0 to 1, None where single tokens aren't what is learned.
        peak_bytes, predicted_bytes: memory of this device, as measured and as planned.
        bubble_planned, bubble_measured: idle share of ideal time in the pipeline.
        validation_loss: where this step was followed by an evaluation; `validation`: what else that measured, by name.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    step_s: float
    tokens_per_s: float
    model_flops_per_s: float
    mfu: float | None
    consumed_samples: int
    hfu: float | None = None
    skipped: int = 0
    loss_scale: float | None = None
    token_accuracy: float | None = None
    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    bubble_planned: float | None = None
    bubble_measured: float | None = None
    validation_loss: float | None = None
    validation: dict[str, float] | None = None

    @classmethod
    def measured(
        cls,
        *,
        tokens: int,
        step_s: float,
        model_flops: float,
        num_devices: int,
        peak_flops: float | None,
        recompute_flops: float = 0.0,
        **rest: Any,
    ) -> StepMetrics:
        """
        The metrics of a step, rates computed.

        Args:
            model_flops: of the whole step on all devices together; `recompute_flops` come on top for `hfu`.
            num_devices: ranks; `peak_flops`: FLOP/s of one, None where unknown.
            rest: the other fields by name.
        """
        of_device = 1.0 / (step_s * num_devices)
        return cls(
            tokens=tokens,
            step_s=step_s,
            tokens_per_s=tokens / step_s,
            model_flops_per_s=model_flops * of_device,
            mfu=model_flops * of_device / peak_flops if peak_flops else None,
            hfu=(model_flops + recompute_flops) * of_device / peak_flops if peak_flops else None,
            **rest,
        )

    def to_json(self) -> str:
        """One line of strict JSON: what is not finite becomes null, what is None is left out."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(_strict(given), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> StepMetrics:
        """What `to_json` wrote, null as NaN; names of other versions are ignored. Raises ValueError."""
        values = json.loads(line)
        if not isinstance(values, Mapping):
            raise ValueError(f"a line of metrics must be an object. Given: {line[:80]!r}.")
        given = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        known: dict[str, Any] = {name: math.nan if value is None else value for name, value in given.items()}
        if isinstance(found := known.get("validation"), Mapping):
            known["validation"] = {name: math.nan if value is None else value for name, value in found.items()}
        try:
            return cls(**{"mfu": None, **known})
        except TypeError as error:
            raise ValueError(f"a line of metrics lacks a field: {error}.") from None


def read_metrics(path: Path) -> list[StepMetrics]:
    """
    The steps in a `metrics.jsonl`, or in that of a run directory. A last line that is still being written is left out.

    Raises:
        ValueError: a whole line is no metrics of a step; the message says where.
    """
    path = path / METRICS_FILE if path.is_dir() else path
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(StepMetrics.from_json(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number} {error}") from None
    return metrics


def add_validation(run_dir: Path, step: int, numbers: Mapping[str, float]) -> None:
    """Put what was measured of a step afterwards beside its evaluation; the file is replaced as a whole."""
    path = run_dir / METRICS_FILE
    rows = read_metrics(path)
    _replace(path, [_measured(row, numbers) if row.step == step else row for row in rows])


def _measured(row: StepMetrics, numbers: Mapping[str, float]) -> StepMetrics:
    return replace(row, validation={**(row.validation or {}), **numbers})


def _replace(path: Path, rows: Sequence[StepMetrics]) -> None:
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(f"{row.to_json()}\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class MetricsLog:
    """
    The file of metrics, open for appending.

    Lines beyond `resume_step` (of steps that a run did after its last checkpoint, and that are done again now) are
    dropped when it opens, by replacing the file as a whole.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        if path.exists():
            _replace(path, [metrics for metrics in read_metrics(path) if metrics.step <= resume_step])
        self._file = path.open("a", encoding="utf-8")

    def append(self, metrics: StepMetrics) -> None:
        """Write a step; it is in the file when this returns."""
        self._file.write(f"{metrics.to_json()}\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Reporter:
    """
    Show and record every step, inside a `with` block, on rank 0 alone.

    Args:
        run_dir: directory of the run; made where missing.
        total_steps: at which step training ends.
        resume_step: the step that is continued from, 0 for a new run.
        draw_every: steps between two drawings of the loss (`loss.svg`, `loss.png`); one is made at the end anyway.
        console: where to show; a terminal gets a live display, anything else one plain line a step.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        resume_step: int = 0,
        draw_every: int = DRAW_EVERY,
        console: Console | None = None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir, self._draw_every = run_dir, draw_every
        self._eta = Eta(total_steps)
        self._display = make_display(console or Console(), total_steps=total_steps, resume_step=resume_step)
        self._log = MetricsLog(run_dir / METRICS_FILE, resume_step=resume_step)
        self._board = _open_board(run_dir / "tensorboard", resume_step)
        self._can_draw = importlib.util.find_spec("matplotlib") is not None

    def __enter__(self) -> Reporter:
        self._display.start()
        if not self._can_draw:
            self.say("No picture of the loss will be drawn: matplotlib is not installed.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.stop()
        self._log.close()
        if self._board is not None:
            self._board.close()
        self.draw()

    def step(self, metrics: StepMetrics) -> None:
        """Record and show a step that is done."""
        self._log.append(metrics)
        self._eta.add(metrics.step_s)
        self._display.step(metrics, self._eta.seconds(metrics.step))
        if self._board is not None:
            for name, value in asdict(metrics).items():
                if name not in ("step", "validation") and value is not None:
                    self._board.add_scalar(f"train/{name}", value, metrics.step)
            for name, value in (metrics.validation or {}).items():
                self._board.add_scalar(f"validation/{name}", value, metrics.step)
        if metrics.step % self._draw_every == 0:
            self.draw()

    def say(self, line: str) -> None:
        """A line of its own, between the steps."""
        self._display.say(line)

    def saved(self, directory: Path) -> None:
        """A checkpoint is complete."""
        self._display.say(f"Checkpoint {directory.name} is complete.")

    def draw(self) -> None:
        """Draw the loss of this run so far into `loss.svg` and `loss.png`."""
        if self._can_draw and (self._run_dir / METRICS_FILE).stat().st_size:
            from trilithon_parallel.curves import draw_curves

            for suffix in ("svg", "png"):
                draw_curves({self._run_dir.name: self._run_dir}, self._run_dir / f"loss.{suffix}")


def _strict(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same numbers, those that are not finite as None; JSON has no others."""
    return {
        name: _strict(value) if isinstance(value, Mapping) else value if math.isfinite(value) else None
        for name, value in values.items()
    }


def _open_board(directory: Path, resume_step: int) -> SummaryWriter | None:
    """TensorBoard's file writer, where tensorboard is installed; a resumed run hides the steps it does again."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else None)
