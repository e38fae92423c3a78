"""Training data as the trainer takes it: a step's micro-batches on this rank's dp row, as tensors on its device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilithon_parallel.data.batches import MicroBatch, Seq2SeqMicroBatch, TrainingData
from trilithon_parallel.data.cursor import step_samples
from trilithon_parallel.data.ramp import Step
from trilithon_parallel.grid import Grid
from trilithon_parallel.objective import Batch, Seq2SeqBatch


class DataStream:
    """
    Micro-batches by sample ids.

    Args:
        train: the samples to learn from.
        held_out: samples to evaluate on, or None; of these `evaluation_samples` at most are used, always the same.
        micro_batch: samples of a micro-batch.
    """

    def __init__(
        self,
        train: TrainingData,
        held_out: TrainingData | None,
        grid: Grid,
        *,
        micro_batch: int,
        evaluation_samples: int,
    ) -> None:
        self._train, self._held_out, self._grid, self._micro_batch = train, held_out, grid, micro_batch
        # A last micro-batch that is not whole would change nothing but shapes: it is left out.
        share = micro_batch * grid.dp.size
        num = 0 if held_out is None else min(evaluation_samples, held_out.num_samples)
        self._evaluation_samples = num // share * share

    def tokens(self, step: Step) -> int:
        """Tokens of a step over all ranks."""
        return step.batch_size * self._train.seq_len

    def micro_batches(self, step: Step) -> Sequence[Batch]:
        """This dp row's micro-batches of a step."""
        return self._batches(self._train, step.consumed, step.batch_size)

    def evaluation(self) -> Iterator[Sequence[Batch]]:
        """The held-out samples as one batch."""
        if self._held_out is not None and self._evaluation_samples:
            yield self._batches(self._held_out, 0, self._evaluation_samples)

    def _batches(self, data: TrainingData, consumed: int, batch_size: int) -> list[Batch]:
        spans = step_samples(
            consumed,
            batch_size=batch_size,
            micro_batch=self._micro_batch,
            dp_rank=self._grid.dp.rank,
            dp=self._grid.dp.size,
        )
        return [to_batch(data.micro_batch(span), self._grid.device) for span in spans]


def to_batch(made: MicroBatch, device: torch.device) -> Batch:
    """A micro-batch's arrays as tensors."""

    def tensor(array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    # All samples of a stream have one length.
    length = len(made.tokens) // len(made.sample_ids)
    weights_T = torch.from_numpy(made.loss_mask.astype(np.float32)).to(device)
    parts = {
        "tokens_T": tensor(made.tokens),
        "targets_T": tensor(made.targets),
        "weights_T": weights_T,
        "positions_T": tensor(made.positions),
        "types_T": None if made.types is None else tensor(made.types),
    }
    rest = {
        "cu_seqlens": made.cu_seqlens,
        "sample_ids": made.sample_ids,
        "lengths": [length] * len(made.sample_ids),
    }
    if isinstance(made, Seq2SeqMicroBatch):
        return Seq2SeqBatch(
            **parts,  # type: ignore[arg-type]  # by name
            **rest,  # type: ignore[arg-type]  # by name
            encoder_tokens_E=tensor(made.encoder_tokens),
            encoder_cu_seqlens=made.encoder_cu_seqlens,
        )
    return Batch(**parts, **rest)  # type: ignore[arg-type]  # by name
