"""
What a model learns from a micro-batch: how a batch goes through a stage of each family, and what its last stage loses.

Shapes: T packed tokens, H hidden, V this rank's columns of the vocabulary, R tokens that count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trilithon_parallel.attention import PackedView
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.dropout import Dropout
from trilithon_parallel.grid import Grid
from trilithon_parallel.loss import cross_entropy
from trilithon_parallel.models import CausalStage, EncoderStage, Seq2SeqStage
from trilithon_parallel.models.seq2seq import boundary_rows


@dataclass(frozen=True, eq=False)
class Batch:
    """
    One micro-batch on the device.

    `tokens_T`, `targets_T`, `positions_T`: int64. `weights_T`: how much each target counts, 0 where it does not.
    `types_T`: int64 token types or None. `cu_seqlens`: where attention begins anew. `lengths`: tokens of each sample of
    `sample_ids`, in order.
    """

    tokens_T: Tensor
    targets_T: Tensor
    weights_T: Tensor
    positions_T: Tensor
    cu_seqlens: Sequence[int]
    sample_ids: Sequence[int]
    lengths: Sequence[int]
    types_T: Tensor | None = None

    @property
    def num_targets(self) -> int:
        """Tokens that count."""
        return int((self.weights_T > 0).sum())

    def boundary_rows(self, config: ModelConfig, grid: Grid) -> int:
        """Rows of what the stage at `grid` receives from the one before."""
        return len(self.tokens_T) // _token_shares(grid)


@dataclass(frozen=True, eq=False)
class Seq2SeqBatch(Batch):
    """`Batch` is the decoder's side; `encoder_tokens_E` int64 and their borders are the encoder's, sample by sample."""

    encoder_tokens_E: Tensor = field(kw_only=True)
    encoder_cu_seqlens: Sequence[int] = field(kw_only=True)

    def boundary_rows(self, config: ModelConfig, grid: Grid) -> int:
        """As for `Batch`: one stream, or both where the stage before decodes."""
        shares = _token_shares(grid)
        return boundary_rows(
            config,
            pp=grid.pp.size,
            stage=grid.pp.rank - 1,
            num_encoder_tokens=len(self.encoder_tokens_E) // shares,
            num_decoder_tokens=len(self.tokens_T) // shares,
            counts=grid.layer_counts,
        )


def _token_shares(grid: Grid) -> int:
    return grid.tp.size if grid.sequence_parallel else 1


def learn(
    stage: nn.Module, batch: Batch, received: Tensor | None, *, grid: Grid, scale: float, dropout: Dropout | None
) -> Tensor:
    """
    One micro-batch through one stage.

    Args:
        received: hidden states of the stage before; None on the first.
        scale: of every token's loss.
    Returns:
        Hidden states for the next stage; on the last, sum of weights * losses * scale (fp64, a scalar).
    """
    hidden_TH: Tensor
    if isinstance(stage, Seq2SeqStage):
        assert isinstance(batch, Seq2SeqBatch)
        hidden_TH = stage(
            received,
            encoder_tokens_E=batch.encoder_tokens_E,
            encoder_cu_seqlens=batch.encoder_cu_seqlens,
            decoder_tokens_T=batch.tokens_T,
            decoder_cu_seqlens=batch.cu_seqlens,
        )
    else:
        assert isinstance(stage, CausalStage | EncoderStage)
        view = PackedView(
            batch.cu_seqlens,
            causal=isinstance(stage, CausalStage),
            dropout=dropout,
            selective=stage.model.recompute.kind == "selective",
        )
        x = batch.tokens_T if received is None else received
        hidden_TH = stage(x, positions_T=batch.positions_T, view=view, types_T=batch.types_T)
    if not grid.is_last_stage:
        return hidden_TH
    targets_T, weights_T = batch.targets_T, batch.weights_T
    if isinstance(stage, EncoderStage) and not grid.sequence_parallel:
        # Few tokens are masked: the head sees those alone. (Under sequence parallelism ranks hold different tokens.)
        counts_T = weights_T > 0
        hidden_TH, targets_T, weights_T = hidden_TH[counts_T], targets_T[counts_T], weights_T[counts_T]
    # In fp64: 1 / N in fp32 would be off in all of the step's loss and gradients alike.
    scaled_T = weights_T.double() * scale
    total, _ = cross_entropy(
        stage.local_logits(hidden_TH), targets_T, scaled_T, tp=grid.tp, real_columns=stage.real_columns
    )
    return total


def log_probabilities(stage: CausalStage, batch: Batch) -> Tensor:
    """fp32 [T]: the log-probability of each target by the training forward, for a model of one stage."""
    view = PackedView(batch.cu_seqlens, causal=True)
    hidden_TH = stage(batch.tokens_T, positions_T=batch.positions_T, view=view, types_T=batch.types_T)
    ones_T = torch.ones(len(batch.tokens_T))
    _, logprobs_T = cross_entropy(
        stage.local_logits(hidden_TH), batch.targets_T, ones_T, tp=stage.grid.tp, real_columns=stage.real_columns
    )
    return logprobs_T


def dropout_of(
    batch: Batch, grid: Grid, config: ModelConfig, hidden: float, attention: float, *, seed: int, step: int
) -> Dropout:
    """The dropout masks of one micro-batch on one stage."""
    return Dropout(
        hidden, attention, seed, step, batch.sample_ids, batch.lengths, grid, grid.layers(config.num_layers).start
    )
