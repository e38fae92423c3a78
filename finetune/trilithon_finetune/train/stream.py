"""The steps of a job and their micro-batches: pure functions of the prepared data, the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from trilithon_finetune.config import JobConfig
from trilithon_finetune.data.batches import Heaviest, MicroBatch, heaviest, in_order, share
from trilithon_finetune.data.prepared import Part
from trilithon_finetune.recipes.base import Recipe, Sample
from trilithon_finetune.train.collate import collate
from trilithon_finetune.train.work import Work
from trilithon_parallel.data.ramp import LearningRate, Step
from trilithon_parallel.grid import Grid
from trilithon_parallel.objective import PackedBatch


def learning_rate_of(config: JobConfig, total_units: int) -> LearningRate:
    """
    The learning rate of a resolved configuration, by consumed units.

    Step s of a warm-up of w steps has the rate lr * s / w, counted from 1: a job has few steps and wastes none.
    """
    optimizer, batch_size = config.optimizer, config.training.batch_size
    assert batch_size is not None
    assert optimizer.lr is not None
    assert optimizer.schedule is not None
    assert optimizer.warmup_ratio is not None
    warmup = int(optimizer.warmup_ratio * total_units)
    end = max(total_units, warmup + 1)
    return LearningRate(optimizer.lr, 0.0, warmup, end, optimizer.schedule, ahead_samples=batch_size)


class JobStream:
    """
    Batches of prepared data for one rank.

    Attributes:
        references: of preferences, each sample's log-probability before the first step; set before training.
    """

    def __init__(self, work: Work, grid: Grid) -> None:
        capacity = work.config.training.micro_batch_tokens
        assert capacity is not None
        self._train, self._recipe, self._schedule, self._grid = work.prepared.train, work.recipe, work.schedule, grid
        self._capacity, self._beta, self._seed = capacity, work.beta, work.schedule.order.seed
        self._contrast, self._trains_passages = work.contrast, work.trains_passages
        self._lengths = self._train.unit_lengths
        self.references: Sequence[float] | None = None

    def micro_batches(self, step: Step) -> Sequence[PackedBatch]:
        """This dp row's micro-batches of a step."""
        return self.micro_batches_at(step.step)

    def micro_batches_at(self, step: int) -> list[PackedBatch]:
        """The same, by the step's number."""
        units = self._schedule.order.units(step)
        lengths = [self._lengths[unit] for unit in units]
        rows = share(units, lengths, dp=self._grid.dp.size, micro_batch_tokens=self._capacity)
        epoch = self._schedule.order.epoch(step)
        return [self._batch(micro, epoch) for micro in rows[self._grid.dp.rank]]

    def _batch(self, micro: MicroBatch, epoch: int) -> PackedBatch:
        ids = [index for unit in micro.units for index in self._train.samples_of(unit)]
        samples = [self._recipe.dress(self._train.sample(index), seed=self._seed, epoch=epoch) for index in ids]
        references = None if self.references is None else [self.references[index] for index in ids]
        return collate(
            samples,
            ids,
            head=self._recipe.head,
            device=self._grid.device,
            counts=micro.counts,
            references=references,
            beta=self._beta,
            contrast=self._contrast,
            trains_passages=self._trains_passages,
        )

    def tokens(self, step: Step) -> int:
        """Tokens of a step over all ranks."""
        return self.tokens_at(step.step)

    def tokens_at(self, step: int) -> int:
        """The same, by the step's number."""
        return sum(int(self._lengths[unit]) for unit in self._schedule.order.units(step))

    def supervised(self, step: int) -> int:
        """What a step's loss is divided by, over all ranks."""
        units = self._schedule.order.units(step)
        return int(sum(int(self._train.supervised[i]) for unit in units for i in self._train.samples_of(unit)))

    def rows(self, step: int) -> list[int]:
        """Lines of the training file that a step sees."""
        units = self._schedule.order.units(step)
        return sorted({self._train.sample(index).row for unit in units for index in self._train.samples_of(unit)})

    def heaviest(self) -> Heaviest:
        """The step whose largest micro-batch is the largest of the run."""
        schedule, dp = self._schedule, self._grid.dp.size
        return heaviest(
            schedule.order, self._lengths, num_steps=schedule.num_steps, dp=dp, micro_batch_tokens=self._capacity
        )

    @property
    def silent_tokens(self) -> int:
        """Tokens that a rank may work on without a sign of life: those of the largest micro-batch."""
        return self.heaviest().tokens

    def typical(self, number: int) -> list[int]:
        """So many steps of the first epoch, those with the most usual number of tokens."""
        steps = range(min(self._schedule.order.steps_per_epoch, self._schedule.num_steps))
        by_size = sorted(steps, key=self.tokens_at)
        first = max(0, (len(by_size) - number) // 2)
        return by_size[first : first + number]

    def evaluation(self) -> Iterator[Sequence[PackedBatch]]:
        """Nothing: a job has an evaluator of its own."""
        return iter(())


@dataclass(frozen=True)
class Held:
    """One micro-batch of samples whose outputs are asked for: their places in `Part`, and the batch."""

    indices: tuple[int, ...]
    samples: tuple[Sample, ...]
    batch: PackedBatch


def plan_outputs(
    part: Part, *, dp: int, micro_batch_tokens: int, units: Sequence[int] | None = None
) -> list[list[tuple[int, ...]]]:
    """
    The samples of a part in micro-batches, as every rank can tell without asking: [dp][micro-batch] of sample indices.

    Args:
        units: which; None for all.
    """
    chosen = range(part.num_units) if units is None else units
    if not chosen:
        return [[] for _ in range(dp)]
    lengths = part.unit_lengths
    rows = in_order([lengths[unit] for unit in chosen], micro_batch_tokens, dp=dp)
    return [
        [tuple(index for at in micro.units for index in part.samples_of(chosen[at])) for micro in row if micro.counts]
        for row in rows
    ]


def held_batches(
    part: Part, recipe: Recipe, groups: Sequence[tuple[int, ...]], *, device: torch.device, seed: int
) -> list[Held]:
    """One dp row's share of `plan_outputs` as batches."""
    held = []
    for indices in groups:
        samples = tuple(recipe.dress(part.sample(index), seed=seed, epoch=0) for index in indices)
        held.append(Held(indices, samples, collate(samples, indices, head=recipe.head, device=device)))
    return held
