"""How many steps a job has and how large each is, from its configuration and the number of its units. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trilithon_finetune.config import JobConfig
from trilithon_finetune.data.batches import Order
from trilithon_parallel.data.ramp import Step


@dataclass(frozen=True)
class EpochSchedule:
    """Passes over all units in batches, the last of each as small as it comes out; at most `max_steps`."""

    order: Order
    epochs: int
    max_steps: int | None = None

    @property
    def num_steps(self) -> int:
        """Of the whole run."""
        steps = self.order.steps_per_epoch * self.epochs
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def size(self, step: int) -> int:
        """Units of a step."""
        at = step % self.order.steps_per_epoch * self.order.batch_size
        return min(self.order.batch_size, self.order.num_units - at)

    def steps(self, train_samples: int, *, consumed: int = 0, step: int = 0) -> Iterator[Step]:
        """The steps from a cursor on; `train_samples` is that of `whole_run`, and counts units."""
        while step < self.num_steps:
            yield Step(step, consumed, self.size(step))
            consumed, step = consumed + self.size(step), step + 1

    def whole_run(self, train_samples: int = 0) -> tuple[int, int]:
        """Steps of the run, and the units that it consumes."""
        epochs, rest = divmod(self.num_steps, self.order.steps_per_epoch)
        return self.num_steps, epochs * self.order.num_units + sum(self.size(step) for step in range(rest))


def schedule_of(config: JobConfig, num_units: int) -> EpochSchedule:
    """The steps of a resolved configuration over so many training units."""
    training = config.training
    assert training.batch_size is not None
    assert training.epochs is not None
    assert config.seed is not None
    return EpochSchedule(Order(num_units, training.batch_size, config.seed), training.epochs, training.max_steps)
