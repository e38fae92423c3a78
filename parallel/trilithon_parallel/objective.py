"""
What a model learns from a micro-batch: how a batch goes through a stage of each family, and what its last stage loses.

Every kind of batch says itself what is lost and what its model's outputs are. A loss is a sum over what counts (tokens,
sequences, pairs), to be divided by how many of them the whole global batch has: so it depends on no layout.

Shapes: T packed tokens, H hidden, B sequences, P pairs of them, L labels of a task head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilithon_parallel.attention import PackedView
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.dropout import Dropout, DropoutRates
from trilithon_parallel.grid import Grid
from trilithon_parallel.loss import (
    Lost,
    cross_entropy,
    joint_span_losses,
    label_is_best,
    label_losses,
    preference_losses,
    preference_margins,
    span_losses,
    target_logprobs,
)
from trilithon_parallel.models import CausalStage, EncoderStage, Seq2SeqStage
from trilithon_parallel.models.seq2seq import boundary_rows

Stage = CausalStage | EncoderStage | Seq2SeqStage


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedBatch(ABC):
    """
    One micro-batch on the device: what goes into the model, whatever comes out.

    `tokens_T`, `positions_T`: int64. `types_T`: int64 token types or None. `cu_seqlens`: where attention begins anew.
    `lengths`: tokens of each sample of `sample_ids`, in order.
    """

    tokens_T: Tensor
    positions_T: Tensor
    cu_seqlens: Sequence[int]
    sample_ids: Sequence[int]
    lengths: Sequence[int]
    types_T: Tensor | None = None

    @property
    @abstractmethod
    def num_targets(self) -> int:
        """How many tokens, sequences or pairs count: the loss of a global batch is the sum by the number of these."""

    def run(self, stage: nn.Module, received: Tensor | None, *, dropout: Dropout | None) -> Tensor:
        """
        This micro-batch through one stage, to its hidden states.

        Args:
            received: hidden states of the stage before; None on the first.
        """
        assert isinstance(stage, CausalStage | EncoderStage)
        view = PackedView(
            self.cu_seqlens,
            causal=isinstance(stage, CausalStage),
            dropout=dropout,
            selective=stage.model.recompute.kind == "selective",
        )
        x = self.tokens_T if received is None else received
        hidden_TH: Tensor = stage(x, positions_T=self.positions_T, view=view, types_T=self.types_T)
        return hidden_TH

    @abstractmethod
    def loss(
        self, stage: Stage, hidden_TH: Tensor, *, grid: Grid, scale: float, dropout: Dropout | None = None
    ) -> Lost:
        """On the last stage: what is lost, each part by its weight and by `scale`."""

    @abstractmethod
    def outputs(self, stage: Stage, hidden_TH: Tensor, *, grid: Grid, per_token: bool) -> Tensor:
        """On the last stage: what the model says, of shape `output_shape`; see `TrainingModel.predict`."""

    @abstractmethod
    def output_shape(self, config: ModelConfig, *, per_token: bool) -> tuple[int, ...]:
        """The shape of `outputs`, known on every stage."""

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.cu_seqlens) - 1

    def boundary_rows(self, config: ModelConfig, grid: Grid) -> int:
        """Rows of what the stage at `grid` receives from the one before."""
        return len(self.tokens_T) // _token_shares(grid)


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch(PackedBatch):
    """
    Tokens of a vocabulary, or none, to be said at each place.

    `targets_T`: int64. `weights_T`: how much each target counts, 0 where it does not. Outputs are of each sequence's
    targets that count the summed log-probability, and how many of them are the likeliest token [B, 2]; or of each
    target the log-probability, 0 where it does not count [T].
    """

    targets_T: Tensor
    weights_T: Tensor

    @property
    def num_targets(self) -> int:
        """Tokens that count."""
        return int((self.weights_T > 0).sum())

    def loss(
        self, stage: Stage, hidden_TH: Tensor, *, grid: Grid, scale: float, dropout: Dropout | None = None
    ) -> Lost:
        """Cross-entropy of the tokens that count."""
        targets_T, weights_T = self.targets_T, self.weights_T
        counts_T = weights_T > 0
        if not grid.sequence_parallel and not bool(counts_T.all()):
            # Few tokens are masked, and no prompt is learned: the head, a large product, sees what counts alone. (Under
            # sequence parallelism ranks hold other tokens.)
            hidden_TH, targets_T, weights_T = hidden_TH[counts_T], targets_T[counts_T], weights_T[counts_T]
        # In fp64: 1 / N in fp32 would be off in all of the step's loss and gradients alike.
        scaled_T = weights_T.double() * scale
        total, _, is_best_T = cross_entropy(
            stage.local_logits(hidden_TH), targets_T, scaled_T, tp=grid.tp, real_columns=stage.real_columns
        )
        return Lost.of_tokens(total, is_best_T & (weights_T > 0), weights_T > 0)

    def outputs(self, stage: Stage, hidden_TH: Tensor, *, grid: Grid, per_token: bool) -> Tensor:
        """Log-probabilities, see above."""
        places, logprobs, is_best = self._counted(stage, hidden_TH, grid=grid)
        if per_token:
            return torch.zeros_like(self.weights_T, dtype=torch.float64).index_put((places,), logprobs)
        return torch.stack((self._sums(places, logprobs), self._sums(places, is_best.double())), 1)

    def output_shape(self, config: ModelConfig, *, per_token: bool) -> tuple[int, ...]:
        """[B, 2] or [T]."""
        return (len(self.tokens_T),) if per_token else (self.num_sequences, 2)

    def _counted(self, stage: Stage, hidden_TH: Tensor, *, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Places of targets that count, their log-probabilities (fp64, differentiable), and which are the likeliest."""
        places = (self.weights_T > 0).nonzero().squeeze(1)
        if not grid.sequence_parallel:
            logits = stage.local_logits(hidden_TH[places])
        else:
            logits = stage.local_logits(hidden_TH)[places]
        return places, *target_logprobs(logits, self.targets_T[places], tp=grid.tp, real_columns=stage.real_columns)

    def _sums(self, places: Tensor, values: Tensor) -> Tensor:
        """Of fp64 values at these places, by sequence: fp64 [B]."""
        bounds = torch.tensor(self.cu_seqlens[1:], device=places.device)
        sums_B = torch.zeros(self.num_sequences, dtype=torch.float64, device=places.device)
        return sums_B.index_add(0, torch.searchsorted(bounds, places, right=True), values)


@dataclass(frozen=True, eq=False, kw_only=True)
class Seq2SeqBatch(Batch):
    """`Batch` is the decoder's side; `encoder_tokens_E` int64 and their borders are the encoder's, sample by sample."""

    encoder_tokens_E: Tensor
    encoder_cu_seqlens: Sequence[int]

    def run(self, stage: nn.Module, received: Tensor | None, *, dropout: Dropout | None) -> Tensor:
        """Both streams; nothing of them is dropped."""
        assert isinstance(stage, Seq2SeqStage)
        hidden_TH: Tensor = stage(
            received,
            encoder_tokens_E=self.encoder_tokens_E,
            encoder_cu_seqlens=self.encoder_cu_seqlens,
            decoder_tokens_T=self.tokens_T,
            decoder_cu_seqlens=self.cu_seqlens,
        )
        return hidden_TH

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


@dataclass(frozen=True, eq=False, kw_only=True)
class PreferenceBatch(Batch):
    """
    Pairs of answers: sequences 2p and 2p + 1 are one that was chosen and one that was rejected.

    `reference_P2`: summed log-probabilities of their targets by the model that training began from, as `predict` gives
    them before the first step. `beta`: above 0; how dear it is to move away from that model. Weights of targets are 0
    or 1: an answer's log-probability is the sum over its tokens.
    """

    reference_P2: Tensor
    beta: float

    @property
    def num_targets(self) -> int:
        """Pairs."""
        return len(self.reference_P2)

    def loss(
        self, stage: Stage, hidden_TH: Tensor, *, grid: Grid, scale: float, dropout: Dropout | None = None
    ) -> Lost:
        """-log sigmoid(beta * margin) of every pair (arXiv 2305.18290, equation 7)."""
        places, logprobs, _ = self._counted(stage, hidden_TH, grid=grid)
        margins_P = self.margins(self._sums(places, logprobs))
        return Lost.as_a_whole(preference_losses(margins_P, self.beta).sum() * scale)

    def margins(self, sums_B: Tensor) -> Tensor:
        """
        fp64 [P]: how much more than the reference the model prefers the chosen answers; above 0 it has learned them.

        Args:
            sums_B: summed log-probabilities of the answers, the first column of the batch's outputs.
        """
        return preference_margins(sums_B.view(-1, 2), self.reference_P2)


class _TaskBatch(PackedBatch):
    """Outputs of a task head: its logits."""

    def outputs(self, stage: Stage, hidden_TH: Tensor, *, grid: Grid, per_token: bool) -> Tensor:
        """Logits of the labels."""
        assert isinstance(stage, EncoderStage)
        return stage.task_logits(hidden_TH, self.cu_seqlens)

    def output_shape(self, config: ModelConfig, *, per_token: bool) -> tuple[int, ...]:
        """[T, L], or [B, L] of a sequence head."""
        head = config.task_head
        assert head is not None
        rows = self.num_sequences if head.kind == "sequence" else len(self.tokens_T)
        return rows, len(head.labels)


@dataclass(frozen=True, eq=False, kw_only=True)
class TagBatch(_TaskBatch):
    """Labels of tokens. `targets_T`: int64 label ids. `weights_T`: 0 where a token has none. Outputs: logits [T, L]."""

    targets_T: Tensor
    weights_T: Tensor

    @property
    def num_targets(self) -> int:
        """Tokens that count."""
        return int((self.weights_T > 0).sum())

    def loss(
        self, stage: Stage, hidden_TH: Tensor, *, grid: Grid, scale: float, dropout: Dropout | None = None
    ) -> Lost:
        """Cross-entropy of the labels."""
        assert isinstance(stage, EncoderStage)
        counts_T = self.weights_T > 0
        logits_RL = stage.task_logits(hidden_TH, self.cu_seqlens, dropout)[counts_T]
        targets_R = self.targets_T[counts_T]
        total = (label_losses(logits_RL, targets_R) * self.weights_T[counts_T]).sum() * scale
        return Lost.of_tokens(total, label_is_best(logits_RL.detach(), targets_R), torch.ones_like(targets_R))


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassBatch(_TaskBatch):
    """Labels of sequences. `labels_B`: int64. `weights_B`: 0 where one does not count. Outputs: logits [B, L]."""

    labels_B: Tensor
    weights_B: Tensor

    @property
    def num_targets(self) -> int:
        """Sequences that count."""
        return int((self.weights_B > 0).sum())

    def loss(
        self, stage: Stage, hidden_TH: Tensor, *, grid: Grid, scale: float, dropout: Dropout | None = None
    ) -> Lost:
        """Cross-entropy of the labels."""
        assert isinstance(stage, EncoderStage)
        losses_B = label_losses(stage.task_logits(hidden_TH, self.cu_seqlens, dropout), self.labels_B)
        return Lost.as_a_whole((losses_B * self.weights_B).sum() * scale)


@dataclass(frozen=True, eq=False, kw_only=True)
class SpanBatch(_TaskBatch):
    """
    Answers as spans of their contexts.

    `starts_B`, `ends_B`: int64 places in T of each answer's first and last token; a sequence without an answer has its
    first token's place twice. `context_T`: bool, the tokens that may be part of an answer; a sequence's first token may
    always be chosen, for no answer. Outputs: logits [T, 2] of all tokens, starts and ends.
    """

    starts_B: Tensor
    ends_B: Tensor
    context_T: Tensor

    @property
    def num_targets(self) -> int:
        """Sequences."""
        return len(self.starts_B)

    def loss(
        self, stage: Stage, hidden_TH: Tensor, *, grid: Grid, scale: float, dropout: Dropout | None = None
    ) -> Lost:
        """The mean of the start's and the end's cross-entropy over what may be chosen."""
        assert isinstance(stage, EncoderStage)
        allowed_T = self.context_T.index_fill(0, torch.tensor(self.cu_seqlens[:-1], device=hidden_TH.device), True)
        logits_T2 = stage.task_logits(hidden_TH, self.cu_seqlens, dropout)
        losses_B = span_losses(logits_T2, self.starts_B, self.ends_B, allowed_T, self.cu_seqlens)
        return Lost.as_a_whole(losses_B.sum() * scale)


@dataclass(frozen=True, eq=False, kw_only=True)
class JointSpanBatch(_TaskBatch):
    """
    Spans of contexts, each told from all others of its context.

    `starts_B`, `ends_B`: int64 places in T of each span's first and last token. `context_T`: bool, one run of tokens in
    each sequence. Outputs: logits [T, L] of the spans of 1, 2 ... L tokens that begin with each token.
    """

    starts_B: Tensor
    ends_B: Tensor
    context_T: Tensor

    @property
    def num_targets(self) -> int:
        """Sequences."""
        return len(self.starts_B)

    def loss(
        self, stage: Stage, hidden_TH: Tensor, *, grid: Grid, scale: float, dropout: Dropout | None = None
    ) -> Lost:
        """Cross-entropy over the spans of each context."""
        assert isinstance(stage, EncoderStage)
        logits_TL = stage.task_logits(hidden_TH, self.cu_seqlens, dropout)
        losses_B = joint_span_losses(logits_TL, self.starts_B, self.ends_B, self.context_T, self.cu_seqlens)
        return Lost.as_a_whole(losses_B.sum() * scale)


def _token_shares(grid: Grid) -> int:
    return grid.tp.size if grid.sequence_parallel else 1


def learn(
    stage: nn.Module, batch: PackedBatch, received: Tensor | None, *, grid: Grid, scale: float, dropout: Dropout | None
) -> Tensor | Lost:
    """
    One micro-batch through one stage.

    Args:
        received: hidden states of the stage before; None on the first.
        scale: of everything that is lost.
    Returns:
        Hidden states for the next stage; on the last, what the batch loses.
    """
    hidden_TH = batch.run(stage, received, dropout=dropout)
    if not grid.is_last_stage:
        return hidden_TH
    assert isinstance(stage, Stage)
    return batch.loss(stage, hidden_TH, grid=grid, scale=scale, dropout=dropout)


def predict(
    stage: nn.Module,
    batch: PackedBatch,
    received: Tensor | None,
    *,
    grid: Grid,
    per_token: bool,
    dropout: Dropout | None,
) -> Tensor:
    """As `learn`; on the last stage the batch's outputs."""
    hidden_TH = batch.run(stage, received, dropout=dropout)
    if not grid.is_last_stage:
        return hidden_TH
    assert isinstance(stage, Stage)
    return batch.outputs(stage, hidden_TH, grid=grid, per_token=per_token)


def log_probabilities(stage: CausalStage, batch: Batch) -> Tensor:
    """fp32 [T]: the log-probability of each target by the training forward, for a model of one stage."""
    hidden_TH = batch.run(stage, None, dropout=None)
    ones_T = torch.ones(len(batch.tokens_T))
    _, logprobs_T, _ = cross_entropy(
        stage.local_logits(hidden_TH), batch.targets_T, ones_T, tp=stage.grid.tp, real_columns=stage.real_columns
    )
    return logprobs_T


def dropout_of(
    batch: PackedBatch, grid: Grid, config: ModelConfig, rates: DropoutRates, *, seed: int, step: int
) -> Dropout:
    """The dropout masks of one micro-batch on one stage."""
    return Dropout(
        rates.hidden,
        rates.attention,
        seed,
        step,
        batch.sample_ids,
        batch.lengths,
        grid,
        grid.layers(config.num_layers).start,
        rates.adapter,
    )
