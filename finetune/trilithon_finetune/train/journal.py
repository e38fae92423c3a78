"""What rank 0 tells of a run: the record of every step, events for whoever reads along, outputs to verify with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from trilithon_finetune.phases.outcome import Events
from trilithon_finetune.series import series_row, with_full
from trilithon_finetune.train.evaluation import Probed, probe_file
from trilithon_finetune.train.remaining import Remaining
from trilithon_finetune.train.schedule import EpochSchedule
from trilithon_finetune.train.stream import JobStream
from trilithon_finetune.train.tracking import Tracker
from trilithon_parallel.report import METRICS_FILE, MetricsLog, StepMetrics


class Journal:
    """
    Records a run, inside a `with` block, on rank 0 alone.

    Args:
        run_dir: where `metrics.jsonl` is.
        evaluate_every: steps from one evaluation to the next.
        digest_of: the identity of a checkpoint's weights, as a server computes it.
        resume_step: the step that is continued from; 0 for a new run.
        resume_tokens: tokens seen until then.
        trackers: programs that are given every row too.
        say_line: takes lines for people.
    """

    def __init__(
        self,
        run_dir: Path,
        events: Events,
        *,
        stream: JobStream,
        schedule: EpochSchedule,
        evaluator: Probed,
        evaluate_every: int,
        digest_of: Callable[[Path], str],
        resume_step: int,
        resume_tokens: int,
        trackers: Sequence[Tracker] = (),
        say_line: Callable[[str], None] = print,
    ) -> None:
        self._run_dir, self._events, self._stream = run_dir, events, stream
        self._schedule, self._evaluator, self._say = schedule, evaluator, say_line
        self._digest_of, self._trackers = digest_of, trackers
        self._log = MetricsLog(run_dir / METRICS_FILE, resume_step=resume_step)
        self._tokens = resume_tokens
        self._supervised = sum(stream.supervised(step) for step in range(resume_step))
        self._latest: dict[str, float] = {}
        self._remaining = Remaining(schedule.num_steps, evaluate_every)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()
        for tracker in self._trackers:
            tracker.close()

    def step(self, metrics: StepMetrics) -> None:
        """Record a step that is done; after an evaluation, its numbers and the probes' outputs too."""
        self._log.append(metrics)
        for tracker in self._trackers:
            tracker.step(metrics.step, series_row(asdict(metrics)))
        self._latest["train_loss"] = metrics.loss
        if metrics.token_accuracy is not None:
            self._latest["train_mean_token_accuracy"] = metrics.token_accuracy
        self._tokens += metrics.tokens
        self._supervised += self._stream.supervised(metrics.step - 1)
        told: dict[str, Any] = {
            "step": metrics.step,
            "total_steps": self._schedule.num_steps,
            "epoch": metrics.step / self._schedule.order.steps_per_epoch,
            "train_loss": metrics.loss,
            "train_mean_token_accuracy": metrics.token_accuracy,
            "lr": metrics.learning_rate,
            "grad_norm": metrics.grad_norm,
            "tokens": metrics.tokens,
            "step_seconds": metrics.step_s,
            "seconds_remaining": self._remaining.after(metrics.step, step_s=metrics.step_s),
            "tokens_per_second": metrics.tokens_per_s,
            "mfu": metrics.mfu,
            "memory_bytes": metrics.peak_bytes,
            "trained_tokens": self._tokens,
            "supervised_tokens": self._supervised,
        }
        self._events.tell("step", f"Step {metrics.step}: train_loss {metrics.loss:.4f}", data=_given(told))
        if self._evaluator.probe:
            self._keep_probe(metrics.step)
        if metrics.validation_loss is not None:
            numbers = {"valid_loss": metrics.validation_loss, **(metrics.validation or {})}
            self._latest |= with_full(numbers)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
            self._events.tell("eval", f"Step {metrics.step}: {shown}", data=_given({"step": metrics.step, **numbers}))
            self._say(f"step {metrics.step}: {shown}")

    def say(self, line: str) -> None:
        """A line for people."""
        self._say(line)
        self._events.tell("warning", line, level="warn")

    def saved(self, directory: Path) -> None:
        """A checkpoint is complete."""
        manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
        num_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        step = int(manifest["step"])
        told = {"step": step, "digest": self._digest_of(directory), "bytes": num_bytes, "directory": directory.name}
        data = {**told, "metrics": _given(self._latest)}
        self._events.tell("checkpoint_saved", f"Checkpoint of step {step} is complete.", data=data)

    def _keep_probe(self, step: int) -> None:
        """Outputs of the probes, by sample: what an export is held against."""
        tensors = {str(index): np.ascontiguousarray(values) for index, (_, values) in self._evaluator.probe.items()}
        path = probe_file(self._run_dir, step)
        part = path.with_suffix(".part")
        save_file(tensors, part)
        part.replace(path)
        self._evaluator.probe = {}


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what was not measured; a number that is not finite becomes null, since JSON has none."""
    return {
        name: None if isinstance(value, float) and not np.isfinite(value) else value
        for name, value in values.items()
        if value is not None
    }
