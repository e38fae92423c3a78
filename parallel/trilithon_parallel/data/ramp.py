"""Batch sizes and learning rates over a run: pure functions of the samples consumed so far."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trilithon_parallel.data.errors import DataError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_ENTRY = re.compile(r"(\d+(?:\.\d+)?)([KMBT]?):(\d+)")


@dataclass(frozen=True)
class Stage:
    """From `first_sample` on, until the next stage, a step takes `batch_size` samples."""

    first_sample: int
    batch_size: int


@dataclass(frozen=True)
class Step:
    """One optimizer step: it takes samples [consumed, consumed + batch_size)."""

    step: int
    consumed: int
    batch_size: int


@dataclass(frozen=True)
class BatchSchedule:
    """How many samples a step takes; the stages begin at sample 0 and rise."""

    stages: tuple[Stage, ...]

    @classmethod
    def constant(cls, batch_size: int) -> BatchSchedule:
        """The same batch throughout."""
        return cls(_checked((Stage(0, batch_size),)))

    @classmethod
    def ramp(cls, *, start: int, increment: int, samples: int, batch_size: int) -> BatchSchedule:
        """
        Grow from `start` to `batch_size` in equal steps over the first `samples` samples.

        >>> BatchSchedule.ramp(start=16, increment=16, samples=90, batch_size=64).batch_at(60)
        48

        Raises:
            DataError: `batch_ramp`, the increments do not lead from `start` to `batch_size` in whole steps.
        Source: arXiv 2005.14165 (GPT-3), Megatron-LM's `--rampup-batch-size`.
        """
        if min(start, increment, samples) < 1 or batch_size <= start or (batch_size - start) % increment:
            raise DataError(
                f"batch ramp must rise from {start} to {batch_size} in whole steps of {increment} over at least one "
                f"sample. Given: {(batch_size - start) / max(1, increment):g} steps over {samples} samples.",
                code="batch_ramp",
                hint="Choose an increment that divides the difference.",
            )
        steps = (batch_size - start) // increment
        # Stage k begins at the first sample c with floor(c * steps / samples) = k.
        stages = (Stage(-(-k * samples // steps), start + k * increment) for k in range(steps + 1))
        return cls(_checked(tuple(stages)))

    @classmethod
    def parse(cls, text: str, *, seq_len: int) -> BatchSchedule:
        """
        Read a list of `TOKENS:BATCH`, tokens with K, M, B or T for powers of a thousand.

        >>> BatchSchedule.parse("0:768 250B:1536", seq_len=2048).stages[1]
        Stage(first_sample=122070313, batch_size=1536)

        Args:
            text: stages by the tokens after which they begin; the first begins at 0.
            seq_len: tokens per sample; a border within a sample takes effect after it.
        Raises:
            DataError: `batch_ramp`.
        """
        stages = []
        for entry in text.split():
            match = _ENTRY.fullmatch(entry)
            if match is None:
                raise DataError(
                    f"batch schedule must list TOKENS:BATCH. Given: {entry!r}.",
                    code="batch_ramp",
                    hint='Write it as "0:768 250B:1536".',
                )
            tokens = round(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1]) * _UNITS[match[2]]
            stages.append(Stage(-(-tokens // seq_len), int(match[3])))
        return cls(_checked(tuple(stages)))

    def batch_at(self, consumed: int) -> int:
        """Samples of the step that begins when so many were consumed."""
        return max((stage for stage in self.stages if stage.first_sample <= consumed), key=_first).batch_size

    def check_layout(self, *, dp: int, micro_batch: int) -> None:
        """
        Refuse a layout that a batch of the schedule cannot be divided over.

        Raises:
            DataError: `batch_layout`; names the first batch size that `micro_batch * dp` does not divide.
        """
        for number, stage in enumerate(self.stages):
            if stage.batch_size % (dp * micro_batch):
                raise DataError(
                    f"batch size {stage.batch_size} (stage {number} of the schedule, from sample {stage.first_sample} "
                    f"on) must be a multiple of dp x micro-batch. Given: {dp} x {micro_batch} = {dp * micro_batch}.",
                    code="batch_layout",
                    hint="Choose a dp and a micro-batch whose product divides every batch size.",
                )

    def steps(self, train_samples: int, *, consumed: int = 0, step: int = 0) -> Iterator[Step]:
        """
        The steps of a run from a cursor on; the last is whole, so it may go past `train_samples`.

        Args:
            train_samples: the run ends when at least so many are consumed.
            consumed, step: where to begin, as a checkpoint has them.
        """
        while consumed < train_samples:
            batch_size = self.batch_at(consumed)
            yield Step(step, consumed, batch_size)
            consumed, step = consumed + batch_size, step + 1

    def whole_run(self, train_samples: int) -> tuple[int, int]:
        """Steps of a run, and the samples it consumes: `train_samples`, or more by less than its last batch."""
        step = consumed = 0
        ends = [stage.first_sample for stage in self.stages[1:]] + [train_samples]
        for stage, end in zip(self.stages, ends, strict=True):
            steps = max(0, -(-(min(end, train_samples) - consumed) // stage.batch_size))
            step, consumed = step + steps, consumed + steps * stage.batch_size
        return step, consumed


@dataclass(frozen=True)
class LearningRate:
    """
    The learning rate over a run, by consumed samples.

    It rises linearly from 0 over `warmup_samples` to `peak`, then falls until `decay_samples` to `floor`, which it
    keeps. With x the share of the way from the end of the warm-up to `decay_samples`:

    - `cosine`: `floor + (1 + cos(pi x)) / 2 * (peak - floor)`
    - `linear`: `floor + (1 - x) * (peak - floor)`
    - `constant`: `peak` throughout; `decay_samples` and `floor` do not count
    - `wsd` (warm-up, stable, decay): `peak`, then linear to `floor` over the last `cooldown_samples` before
      `decay_samples` (arXiv 2404.06395)

    The first step of a warm-up has a rate of 0, as in Megatron-LM and GPT-3's recipe, unless the warm-up is
    `ahead_samples` ahead of what was consumed: with those of one batch, step s of w has the rate `peak * s / w`.

    Raises:
        DataError: `learning_rate`; the rates or the borders are out of order.
    """

    peak: float
    floor: float
    warmup_samples: int
    decay_samples: int
    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    cooldown_samples: int = 0
    ahead_samples: int = 0

    def __post_init__(self) -> None:
        findings = []
        if not (math.isfinite(self.peak) and 0 <= self.floor <= self.peak and self.peak > 0):
            findings.append(f"0 <= floor <= peak, peak above 0. Given: floor {self.floor}, peak {self.peak}")
        if self.kind not in ("cosine", "linear", "constant", "wsd"):
            findings.append(f"kind cosine, linear, constant or wsd. Given: {self.kind!r}")
        for name in ("warmup_samples", "ahead_samples"):
            if (given := getattr(self, name)) < 0:
                findings.append(f"{name} of at least 0. Given: {given}")
        if self.kind != "constant" and self.decay_samples <= self.warmup_samples:
            findings.append(
                f"decay_samples above warmup_samples. Given: {self.decay_samples} and {self.warmup_samples}"
            )
        if self.kind == "wsd" and not 0 < self.cooldown_samples <= self.decay_samples - self.warmup_samples:
            findings.append(
                "cooldown_samples from 1 to decay_samples - warmup_samples with wsd. "
                f"Given: {self.cooldown_samples} with {self.decay_samples} - {self.warmup_samples}"
            )
        if self.kind != "wsd" and self.cooldown_samples:
            findings.append(f"no cooldown_samples with {self.kind}. Given: {self.cooldown_samples}")
        if findings:
            raise DataError(f"learning rate must have {'; '.join(findings)}.", code="learning_rate")

    def at(self, consumed: int) -> float:
        """The rate of the step that begins when so many samples were consumed."""
        if consumed + self.ahead_samples < self.warmup_samples:
            return self.peak * (consumed + self.ahead_samples) / self.warmup_samples
        if self.kind == "constant":
            return self.peak
        if consumed >= self.decay_samples:
            return self.floor
        begin = self.decay_samples - self.cooldown_samples if self.kind == "wsd" else self.warmup_samples
        x = max(0, consumed - begin) / (self.decay_samples - begin)
        share = (1 + math.cos(math.pi * x)) / 2 if self.kind == "cosine" else 1 - x
        return self.floor + share * (self.peak - self.floor)


def _first(stage: Stage) -> int:
    return stage.first_sample


def _checked(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    firsts = [stage.first_sample for stage in stages]
    if not stages or firsts[0] != 0 or sorted(set(firsts)) != firsts or min(s.batch_size for s in stages) < 1:
        raise DataError(
            "batch schedule must begin at sample 0, go on to later samples, and have batches of at least 1. "
            f"Given: {', '.join(f'{stage.first_sample}:{stage.batch_size}' for stage in stages) or 'nothing'}.",
            code="batch_ramp",
        )
    return stages
