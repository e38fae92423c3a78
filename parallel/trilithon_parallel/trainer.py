"""
The loop around training steps, shared by pretraining and every finetuning recipe: data in, steps, what is kept, told.

A run is a function of its configuration and of how many samples it has consumed. So it can be stopped after any step
and goes on from its newest checkpoint as if it had not been: weights, moments, loss scale and cursor are all there is.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import JsonValue

from trilithon_parallel.checkpoint import Found, Progress, Saver, load
from trilithon_parallel.collectives import observing
from trilithon_parallel.config import ModelError
from trilithon_parallel.data.ramp import LearningRate, Step
from trilithon_parallel.grid import Axis
from trilithon_parallel.health import Signals
from trilithon_parallel.objective import PackedBatch
from trilithon_parallel.precision import MIN_SCALE
from trilithon_parallel.report import StepMetrics
from trilithon_parallel.step import StepResult, TrainingModel
from trilithon_parallel.watchdog import Watchdog

_STATUS = Path("/proc/self/status")


class Stream(Protocol):
    """Where batches come from; every rank has its own and is given its dp row's micro-batches."""

    def micro_batches(self, step: Step) -> Sequence[PackedBatch]:
        """The micro-batches of one step, in order."""
        ...

    def tokens(self, step: Step) -> int:
        """Tokens of one step over all ranks, supervised or not."""
        ...

    def evaluation(self) -> Iterator[Sequence[PackedBatch]]:
        """The micro-batches of each batch that is held out; none where nothing is."""
        ...


class Schedule(Protocol):
    """How the samples of a run are divided into steps; `BatchSchedule` is one."""

    def steps(self, train_samples: int, *, consumed: int = 0, step: int = 0) -> Iterator[Step]:
        """The steps of a run from a cursor on."""
        ...

    def whole_run(self, train_samples: int) -> tuple[int, int]:
        """Steps of a run, and the samples it consumes."""
        ...


class Listener(Protocol):
    """Who is told how a run goes; rank 0 has one. `report.Reporter` writes and shows it."""

    def step(self, metrics: StepMetrics) -> None:
        """A step is done."""
        ...

    def say(self, line: str) -> None:
        """Something that a person should know."""
        ...

    def saved(self, directory: Path) -> None:
        """A checkpoint is complete."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What the held-out data say: the mean loss over what counts, and whatever else was measured, by name."""

    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class Evaluator(Protocol):
    """Measures the model on held-out data; every rank calls it and finds the same."""

    def __call__(self, model: TrainingModel) -> Evaluation | None:
        """The evaluation; None where nothing is held out."""
        ...


@dataclass(frozen=True)
class Goal:
    """
    What makes one evaluation better than another: `valid_loss` or the name of one of its metrics.

    `patience`: the run ends when so many evaluations in a row were no better than the best; None for never.
    """

    metric: str = "valid_loss"
    direction: Literal["min", "max"] = "min"
    patience: int | None = None

    def value(self, evaluation: Evaluation) -> float:
        """
        The number of an evaluation that counts.

        Raises:
            ModelError: `metric_unknown`.
        """
        values = {"valid_loss": evaluation.loss, **evaluation.metrics}
        if self.metric not in values:
            raise ModelError(
                f"metric {self.metric!r} is none of this task's.",
                code="metric_unknown",
                hint=f"Allowed: {', '.join(values)}.",
            )
        return values[self.metric]

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than the best so far; NaN never is."""
        if best is None:
            return not math.isnan(value)
        return value < best if self.direction == "min" else value > best


@dataclass(frozen=True)
class Plan:
    """How long a run is and how it goes: `train_samples` at least, batches and learning rates by consumed samples."""

    train_samples: int
    batches: Schedule
    learning_rate: LearningRate
    checkpoint_every: int
    """Steps between checkpoints; one is written at the end anyway."""
    evaluate_every: int
    """Steps between evaluations; 0 for none but the last."""
    max_skipped: int
    """Steps in a row whose gradients are not finite, after which the run gives up."""
    goal: Goal | None = None
    """Each evaluation that is the best so far is kept as a checkpoint; None where evaluations are only told."""


@dataclass
class Costs:
    """What utilisation is measured against: FLOPs of one token, and the peak of one device (None: unknown)."""

    flops_per_token: float
    recompute_flops_per_token: float
    peak_flops: float | None
    predicted_bytes: int | None = None
    """Of the fullest rank, by the planner; what the process held before the model was built does not count."""
    base_bytes: int = 0
    bubble: float | None = None


@dataclass
class Cursor:
    """How far a run has come, and its best evaluation: at which step, and how many in a row have not been better."""

    step: int = 0
    consumed_samples: int = 0
    skipped: int = 0
    consumed_tokens: int = 0
    best: float | None = None
    best_step: int = 0
    not_better: int = 0


class PipelineWaits:
    """Seconds that this rank has waited for neighbours in the pipeline, its idle time: observes the collectives."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began: float | None = None

    def begin(self, op: str, label: str, axis: Axis) -> None:
        """A wait begins; those along the pipeline count."""
        self._began = time.monotonic() if axis.name.startswith("pp") else None

    def end(self) -> None:
        """The wait is over."""
        if self._began is not None:
            self.seconds += time.monotonic() - self._began
            self._began = None

    def moved(self) -> None:
        """No wait."""

    def take(self) -> float:
        """The seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@dataclass(frozen=True)
class Ended:
    """
    Why and where a run ended: `is_complete` when all of its samples were consumed or it stopped by its goal.

    `last_loss` is NaN where no step was left to do; `validation` that of the last step.
    """

    cursor: Cursor
    is_complete: bool
    last_loss: float
    validation: Evaluation | None


class Trainer:
    """
    One rank's side of a run. All ranks make one alike and call the same methods.

    Args:
        saver: None for a run that keeps nothing.
        evaluator: measures the model where the plan says so; None for the mean loss over the stream's held-out batches.
    Attributes:
        reporter: set it on rank 0 before `run`.
        cursor: how far the run has come; `resume` sets it.
    """

    def __init__(
        self,
        model: TrainingModel,
        stream: Stream,
        plan: Plan,
        costs: Costs,
        *,
        saver: Saver | None,
        signals: Signals,
        watchdog: Watchdog | None,
        evaluator: Evaluator | None = None,
    ) -> None:
        self.model, self.stream, self.plan, self.costs = model, stream, plan, costs
        self._saver, self._signals, self._watchdog = saver, signals, watchdog
        self._evaluator = evaluator if evaluator is not None else self._mean_loss
        self.reporter: Listener | None = None
        self.cursor = Cursor()
        self._skipped_in_a_row = 0
        self._waits = PipelineWaits()

    def run(self) -> Ended:
        """
        Train until the plan is done, or until a signal asks for an orderly stop: then a checkpoint is written first.

        Raises:
            ModelError: `training_diverged`, too many steps in a row had gradients that are not finite.
            CheckpointError: a checkpoint could not be written; what was written before stays.
        """
        with observing(self._waits):
            return self._run()

    def _run(self) -> Ended:
        loss, validation = math.nan, None
        steps = self.plan.batches.steps(
            self.plan.train_samples, consumed=self.cursor.consumed_samples, step=self.cursor.step
        )
        total = self.plan.batches.whole_run(self.plan.train_samples)[0]
        for step in steps:
            if self._has_given_up():
                break
            self._tell(step.step, "step")
            self._waits.take()
            began = time.monotonic()
            rate = self.plan.learning_rate.at(step.consumed)
            result = self.model.train_step(self.stream.micro_batches(step), learning_rate=rate, step=step.step)
            step_s, idle_s = time.monotonic() - began, self._waits.take()
            loss, tokens = result.loss, self.stream.tokens(step)
            self._count(result.is_skipped, loss)
            self.cursor.step, self.cursor.consumed_samples = step.step + 1, step.consumed + step.batch_size
            self.cursor.consumed_tokens += tokens
            is_last, done = self.cursor.step == total, self.cursor.step
            validation, is_best = None, False
            if is_last or (self.plan.evaluate_every and done % self.plan.evaluate_every == 0):
                validation = self.evaluate()
                is_best = self._judge(validation)
            self._report(rate, step_s, idle_s, tokens, result, validation)
            should_stop, is_last = self._signals.agreed(self.model.grid), is_last or self._has_given_up()
            is_due = is_last or should_stop or is_best or done % self.plan.checkpoint_every == 0
            self._keep(is_due=is_due)
            if should_stop and not is_last:
                self._finish()
                return Ended(self.cursor, is_complete=False, last_loss=loss, validation=validation)
        self._finish()
        return Ended(self.cursor, is_complete=True, last_loss=loss, validation=validation)

    def evaluate(self) -> Evaluation | None:
        """What the held-out data say; None where there are none."""
        self._tell(None, "evaluation")
        return self._evaluator(self.model)

    def _mean_loss(self, model: TrainingModel) -> Evaluation | None:
        total, count, num_correct, num_judged = 0.0, 0, 0, 0
        for batches in self.stream.evaluation():
            self._tell(None, "evaluation")
            found = model.evaluate(batches)
            total, count = total + found.loss * found.num_tokens, count + found.num_tokens
            num_correct, num_judged = num_correct + found.num_correct, num_judged + found.num_judged
        accuracy = {"token_accuracy": num_correct / num_judged} if num_judged else {}
        return Evaluation(total / count, accuracy) if count else None

    def _judge(self, validation: Evaluation | None) -> bool:
        """Whether this evaluation is the best so far, by the plan's goal."""
        goal = self.plan.goal
        if goal is None or validation is None:
            return False
        value = goal.value(validation)
        is_best = goal.is_better(value, self.cursor.best)
        if is_best:
            self.cursor.best, self.cursor.best_step, self.cursor.not_better = value, self.cursor.step, 0
            if self._saver is not None:
                self._saver.protected = {self.cursor.step}
        else:
            self.cursor.not_better += 1
        return is_best

    def _has_given_up(self) -> bool:
        goal = self.plan.goal
        return goal is not None and goal.patience is not None and self.cursor.not_better >= goal.patience

    def resume(self, found: Found, *, base_digest: str | None = None) -> None:
        """
        Go on from a checkpoint, of whatever layout: weights, moments, loss scale, cursor.

        `base_digest`: of the model beneath an adapter, whose weights are there already; None without an adapter.
        """
        optimizer, manifest = self.model.optimizer, found.manifest
        load(
            found.directory, list(optimizer.targets()), config=self.model.config, axis=self.model.grid.world,
            verified=manifest, base_digest=base_digest,
        )  # fmt: skip
        state = manifest.state
        optimizer.num_steps = int(_number(state["optimizer_steps"]))
        if optimizer.loss_scale is not None and isinstance(state["loss_scale"], dict):
            optimizer.loss_scale.load({name: _number(value) for name, value in state["loss_scale"].items()})
        optimizer.publish()
        self.model.weights_changed()
        self.cursor = Cursor(
            manifest.step,
            manifest.consumed_samples,
            int(_number(state["skipped"])),
            manifest.consumed_tokens,
            *_best_of(state),
        )
        if self._saver is not None and self.cursor.best is not None:
            self._saver.protected = {self.cursor.best_step}

    def _count(self, is_skipped: bool, loss: float) -> None:
        scale = self.model.optimizer.loss_scale
        # While a loss scale still falls, overflows are how it finds its place.
        counts = is_skipped and (scale is None or scale.value <= MIN_SCALE)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if counts else 0
        self.cursor.skipped += is_skipped
        if self._skipped_in_a_row > self.plan.max_skipped:
            raise ModelError(
                f"training step {self.cursor.step + 1} and {self._skipped_in_a_row - 1} before it had gradients that "
                f"are not finite. Given: loss {loss!r}; allowed in a row: {self.plan.max_skipped}.",
                code="training_diverged",
                hint="Resume from an earlier checkpoint with a lower learning rate, or look at these steps' data.",
            )

    def _keep(self, *, is_due: bool) -> None:
        if self._saver is None:
            return
        if is_due:
            self._tell(None, "checkpoint", timeout_s=600.0)
            self._told(self._saver.wait())
            self._saver.start(list(self.model.optimizer.pieces()), self._progress())
        else:
            self._told(self._saver.poll())

    def _finish(self) -> None:
        if self._saver is not None:
            self._tell(None, "checkpoint", timeout_s=3600.0)
            self._told(self._saver.wait())

    def _told(self, directory: Path | None) -> None:
        if directory is not None and self.reporter is not None:
            self.reporter.saved(directory)

    def _progress(self) -> Progress:
        scale = self.model.optimizer.loss_scale
        state: dict[str, JsonValue] = {
            "optimizer_steps": self.model.optimizer.num_steps,
            "skipped": self.cursor.skipped,
            "loss_scale": None if scale is None else dict(scale.state()),
        }
        cursor = self.cursor
        if cursor.best is not None:
            state["best"] = {"value": cursor.best, "step": cursor.best_step, "not_better": cursor.not_better}
        return Progress(cursor.step, cursor.consumed_samples, cursor.consumed_tokens, state)

    def _report(
        self,
        rate: float,
        step_s: float,
        idle_s: float,
        tokens: int,
        result: StepResult,
        validation: Evaluation | None,
    ) -> None:
        if self.reporter is None:
            return
        scale = self.model.optimizer.loss_scale
        metrics = StepMetrics.measured(
            step=self.cursor.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            tokens=tokens,
            step_s=step_s,
            model_flops=self.costs.flops_per_token * tokens,
            recompute_flops=self.costs.recompute_flops_per_token * tokens,
            num_devices=self.model.grid.world_size,
            peak_flops=self.costs.peak_flops,
            consumed_samples=self.cursor.consumed_samples,
            skipped=self.cursor.skipped,
            loss_scale=None if scale is None else scale.value,
            peak_bytes=peak_bytes(self.model.grid.device) - self.costs.base_bytes,
            predicted_bytes=self.costs.predicted_bytes,
            token_accuracy=result.accuracy,
            bubble_planned=self.costs.bubble,
            bubble_measured=None if self.costs.bubble is None else idle_s / (step_s - idle_s),
            validation_loss=None if validation is None else validation.loss,
            validation=None if validation is None or not validation.metrics else dict(validation.metrics),
        )
        self.reporter.step(metrics)

    def _tell(self, step: int | None, phase: str, timeout_s: float | None = None) -> None:
        if self._watchdog is not None:
            if step is not None:
                self._watchdog.step(step)
            self._watchdog.enter(phase, timeout_s=timeout_s)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had on its device: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():  # getrusage's figure is that of a larger parent, where this process was forked from one
        return next(
            int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _best_of(state: Mapping[str, JsonValue]) -> tuple[float | None, int, int]:
    """The best evaluation that a checkpoint knows of; runs without a goal have none."""
    best = state.get("best")
    if not isinstance(best, dict):
        return None, 0, 0
    return _number(best["value"]), int(_number(best["step"])), int(_number(best["not_better"]))


def _number(value: JsonValue) -> float:
    assert isinstance(value, int | float)
    return float(value)
