"""
One training step, from micro-batches to moved weights: the model's side of training, without data, files or display.

Every rank is given the same micro-batches of its dp row, since each stage needs a part of them: tokens enter at the
first, targets at the last, and positions and boundaries everywhere; only the hidden states travel.

Shapes: T packed tokens of a micro-batch, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trilithon_parallel import pipeline
from trilithon_parallel.backend import Backend, Forgetful
from trilithon_parallel.buckets import BUCKET_ELEMENTS, Buckets
from trilithon_parallel.collectives import all_reduce, broadcast_
from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.contrast import contrast
from trilithon_parallel.dropout import DropoutRates as DropoutRates  # part of what this module offers
from trilithon_parallel.grid import Grid
from trilithon_parallel.layout import Layout
from trilithon_parallel.lora.spec import LoraSpec
from trilithon_parallel.loss import Lost
from trilithon_parallel.models import build_seq2seq, build_stage
from trilithon_parallel.models.seq2seq import Stack
from trilithon_parallel.models.stage import Trunk
from trilithon_parallel.objective import PackedBatch, dropout_of, learn, predict
from trilithon_parallel.optimizer import AdamWSettings, Optimizer
from trilithon_parallel.precision import LossScale
from trilithon_parallel.recompute import Recompute
from trilithon_parallel.schedule import schedule, with_messages
from trilithon_parallel.vector_batch import VectorBatch, pooled


@dataclass(frozen=True)
class Measured:
    """
    What a global batch loses, the same on every rank.

    `loss`: the mean over its `num_tokens` that count. `num_correct` of `num_judged` tokens are what the model would
    have said; both 0 where single tokens aren't what is learned.
    """

    loss: float
    num_tokens: int
    num_correct: int
    num_judged: int

    @property
    def accuracy(self) -> float | None:
        """Share of the tokens that count whose logit is the largest; None where none was judged."""
        return self.num_correct / self.num_judged if self.num_judged else None


@dataclass(frozen=True)
class StepResult:
    """`loss` and `accuracy` as in `Measured`, before the step; the same on every rank, as is all of this."""

    loss: float
    grad_norm: float
    num_tokens: int
    is_skipped: bool
    accuracy: float | None


class ModelChunk:
    """One chunk of the model on this rank, as the pipeline executor sees it."""

    def __init__(self, stage: nn.Module, grid: Grid, config: ModelConfig, backend: Backend) -> None:
        self.stage, self.grid, self.config, self.backend = stage, grid, config, backend
        self.batches: Sequence[PackedBatch] = ()
        self.scale = 1.0
        self.dropout: tuple[DropoutRates, int, int] | None = None
        self.per_token: bool | None = None
        """None while it learns; else it predicts."""
        self.lost: list[Lost] = []
        """On the last stage: of the micro-batches so far, their totals detached."""

    def forward(self, microbatch: int, received: Tensor | None) -> Tensor:
        """The boundary tensor for the next stage, or on the last one the scaled sum of losses, or the outputs."""
        batch = self.batches[microbatch]
        dropout = None
        if self.dropout is not None:
            rates, seed, step = self.dropout
            dropout = dropout_of(batch, self.grid, self.config, rates, seed=seed, step=step)
        with self.backend.autocast():
            if self.per_token is not None:
                return predict(self.stage, batch, received, grid=self.grid, per_token=self.per_token, dropout=dropout)
            made = learn(self.stage, batch, received, grid=self.grid, scale=self.scale, dropout=dropout)
            if isinstance(made, Tensor):
                return made
            self.lost.append(replace(made, total=made.total.detach()))
            return made.total

    def boundary_shape(self, microbatch: int) -> tuple[int, ...]:
        """[T, H], or [T / tp, H] under sequence parallelism."""
        return (self.batches[microbatch].boundary_rows(self.config, self.grid), self.config.hidden_size)


class TrainingModel:
    """
    This rank's chunks of a model with their optimizer. Parameters are uninitialised until `init.initialise`, a model
    directory or a checkpoint fills them and `weights_changed` is called.

    Args:
        bucket_elements: gradients that are summed over dp together, and parameters that are gathered together.
        rate_of: canonical name -> factor of the learning rate, at least 0 (a new head may learn faster than the rest).
        lora: train an adapter beside the weights, which are frozen then; `config` of the model says so too.
    Raises:
        ModelError: `layout_invalid`, the layout does not fit the model; `lora_invalid`, the adapter doesn't.
    """

    def __init__(
        self,
        config: ModelConfig,
        grid: Grid,
        layout: Layout,
        backend: Backend,
        *,
        dtype: torch.dtype,
        optimizer: AdamWSettings,
        recompute: Recompute | None = None,
        dropout: DropoutRates | None = None,
        seed: int = 0,
        bucket_elements: int = BUCKET_ELEMENTS,
        rate_of: Callable[[str], float] = lambda name: 1.0,
        lora: LoraSpec | None = None,
    ) -> None:
        rates = DropoutRates() if dropout is None else dropout
        if lora is not None:
            lora.check(config)
            config, rates = replace(config, lora=lora), replace(rates, adapter=lora.dropout)
        self.config, self.grid, self.layout, self.dtype, self.seed = config, grid, layout, dtype, seed
        self.dropout = None if rates == DropoutRates() else rates
        self.chunks: list[ModelChunk] = []
        self._derived: list[Forgetful] = []
        for index in range(layout.virtual):
            place = grid.chunk(index, layout.virtual)
            build = build_seq2seq if config.is_seq2seq else build_stage
            stage = build(config, grid=place, backend=backend, dtype=dtype)
            for module in stage.modules():
                if recompute is not None and isinstance(module, Trunk | Stack):
                    module.recompute = recompute
            self._derived += backend.train(stage)
            self.chunks.append(ModelChunk(stage, place, config, backend))
        self.buckets = Buckets(
            [(chunk.stage, chunk.grid) for chunk in self.chunks],
            config,
            grid,
            virtual=layout.virtual,
            distributed=layout.distributed_optimizer,
            bucket_elements=bucket_elements,
            rate_of=rate_of,
        )
        scale = LossScale() if dtype == torch.float16 else None
        self.optimizer = Optimizer(self.buckets, config, optimizer, loss_scale=scale)

    def weights_changed(self) -> None:
        """Forget what was derived from the weights; after every load. A step does so itself."""
        for part in self._derived:
            part.forget()

    def train_step(self, batches: Sequence[PackedBatch], *, learning_rate: float, step: int) -> StepResult:
        """
        Learn from one global batch, of which `batches` are this dp row's micro-batches.

        Raises:
            ModelError: `batch_empty`, no token of the whole batch counts.
        """
        num_tokens = self._count(batches)
        self.buckets.zero()
        scale = 1.0 if self.optimizer.loss_scale is None else self.optimizer.loss_scale.value
        dropout = None if self.dropout is None else (self.dropout, self.seed, step)
        batches = self._among_all(batches, dropout)
        self._run(batches, self.layout.schedule, scale=scale / num_tokens, dropout=dropout)
        outcome = self.optimizer.step(learning_rate)
        for part in self._derived:
            if part.is_trained:
                part.forget()
        found = self._measured(num_tokens)
        return StepResult(found.loss / scale, outcome.grad_norm, num_tokens, outcome.is_skipped, found.accuracy)

    def evaluate(self, batches: Sequence[PackedBatch]) -> Measured:
        """What this global batch loses; nothing moves and nothing is dropped."""
        num_tokens = self._count(batches)
        batches = self._among_all(batches, None)
        self._run(batches, "forward_only", scale=1.0 / num_tokens, dropout=None)
        return self._measured(num_tokens)

    def predict(self, batches: Sequence[PackedBatch], *, per_token: bool = False) -> list[Tensor]:
        """
        What the model says of each of this dp row's micro-batches, on every rank of the row; nothing is learned or
        dropped. Rows don't wait for each other, so each may have as many micro-batches as it likes.

        Args:
            per_token: of a vocabulary head, each target's log-probability [T] (0 where it does not count) in place of
                their sums by sequence [B, 2]. A task head's outputs are what they are.
        Returns:
            fp32 on the CPU, in the order of `batches`: the outputs of each batch (see the kinds of `objective.py`).
        """
        return self._outputs(batches, per_token=per_token, dropout=None, dtype=torch.float32)

    def _outputs(
        self,
        batches: Sequence[PackedBatch],
        *,
        per_token: bool,
        dropout: tuple[DropoutRates, int, int] | None,
        dtype: torch.dtype,
    ) -> list[Tensor]:
        if not batches:
            return []
        for chunk in self.chunks:
            chunk.per_token = per_token
        try:
            made = self._run(batches, "forward_only", scale=1.0, dropout=dropout)
        finally:
            for chunk in self.chunks:
                chunk.per_token = None
        shapes = [batch.output_shape(self.config, per_token=per_token) for batch in batches]
        flat = torch.zeros(sum(map(math.prod, shapes)), dtype=dtype, device=self.grid.device)
        if made:
            torch.cat([outputs.flatten() for outputs in made], out=flat)
        broadcast_(flat, self.grid.pp, src=self.grid.pp.ranks[-1], label="predict")
        parts = torch.split(flat.cpu(), [math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _among_all(
        self, batches: Sequence[PackedBatch], dropout: tuple[DropoutRates, int, int] | None
    ) -> Sequence[PackedBatch]:
        """Batches whose loss needs the vectors of the whole global batch, with what it makes of them; others as is."""
        held = [batch for batch in batches if isinstance(batch, VectorBatch)]
        if not held:
            return batches
        made = torch.cat(self._outputs(held, per_token=False, dropout=dropout, dtype=torch.float64))
        pool, places = pooled(held, made, self.grid)
        losses_N, gradient_NH, _ = contrast(pool, held[0].contrast)
        sizes, is_part = [batch.num_sequences for batch in held], (places >= 0).double()
        losses = torch.split((losses_N[places] * is_part).to(self.grid.device), sizes)
        pulls = torch.split((gradient_NH[places] * is_part.unsqueeze(1)).to(self.grid.device), sizes)
        return [
            replace(batch, losses_B=lost_B, pulls_BH=pulls_BH)
            for batch, lost_B, pulls_BH in zip(held, losses, pulls, strict=True)
        ]

    def _run(
        self, batches: Sequence[PackedBatch], name: str, *, scale: float, dropout: tuple[DropoutRates, int, int] | None
    ) -> list[Tensor]:
        for chunk in self.chunks:
            chunk.batches, chunk.scale, chunk.dropout, chunk.lost = batches, scale, dropout, []
        table = schedule(name, self.layout.pp, self.layout.virtual, len(batches))
        try:
            return pipeline.run(
                with_messages(table)[self.grid.pp.rank],
                self.chunks,
                self.grid,
                dtype=self.dtype,
                scatter_gather=self.grid.tp.size > 1 and not self.grid.sequence_parallel,
                before_last_backward=self.buckets.expect_last,
            )
        finally:
            for chunk in self.chunks:
                chunk.batches = ()

    def _count(self, batches: Sequence[PackedBatch]) -> int:
        counted = torch.tensor(sum(batch.num_targets for batch in batches), device=self.grid.device)
        num_tokens = int(all_reduce(counted, self.grid.dp, label="loss.tokens"))
        if num_tokens == 0:
            raise ModelError(
                "batch must have at least one token that counts. Given: 0 in the whole global batch.",
                code="batch_empty",
                hint="Look at the data's loss mask.",
            )
        return num_tokens

    def _measured(self, num_tokens: int) -> Measured:
        """What the last stage's ranks said of the micro-batches, over dp, told to everyone."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.grid.device)
        if self.grid.tp.rank == 0:
            for lost in (lost for chunk in self.chunks for lost in chunk.lost):
                sums += torch.stack((lost.total, lost.num_correct.double(), lost.num_judged.double()))
        loss, num_correct, num_judged = all_reduce(sums, self.grid.world, label="loss").tolist()
        return Measured(loss, num_tokens, int(num_correct), int(num_judged))
