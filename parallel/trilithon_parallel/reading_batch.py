"""
A micro-batch of questions with the passages that were found for each, as a reader and its retriever learn from it.

What was found may be stale: the probabilities of the passages come from vectors that are made here, of the retriever as
it is now, and carry the answer's gradient to it (arXiv 2101.00408, section 2.3). Without a retriever they are given.

Shapes: B questions, K passages of each, E tokens of the encoder, T of the decoder, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trilithon_parallel.config import ModelConfig
from trilithon_parallel.dropout import Dropout
from trilithon_parallel.grid import Grid
from trilithon_parallel.loss import Lost
from trilithon_parallel.models import ReaderStage
from trilithon_parallel.objective import PackedBatch, Stage
from trilithon_parallel.reading import (
    Marginal,
    ReaderBatch,
    individual_answers,
    individual_losses,
    joint_answers,
    joint_losses,
    passage_logprobs,
)
from trilithon_parallel.vector_batch import VectorBatch


@dataclass(frozen=True, eq=False, kw_only=True)
class ReadingBatch(PackedBatch):
    """
    The decoder's tokens are those of `PackedBatch`, answer by answer.

    Attributes:
        targets_T: int64; each answer's end with `end_id`.
        encoder_tokens_E, encoder_cu_seqlens: as in `ReaderBatch`.
        kind, marginal: which objective of `reading.py`.
        vectors: the texts of the retriever, the B questions before the B * K passages; None where `logprobs_BK` is
            given: log p(z|q), fp64.
        is_strength_learned: False: the strength of the bias stays as it is.
        max_answer_tokens: of the answers that are among the outputs, ends counted; 0: none are.
        counts: False: the batch is there for company.
    Outputs are fp32 [B, 1 + K + max_answer_tokens]: log p(a|q), log p(z|q) of the passages, and the tokens of the
    answer that is written greedily, -1 behind its end.
    """

    targets_T: Tensor
    encoder_tokens_E: Tensor
    encoder_cu_seqlens: Sequence[int]
    kind: Literal["individual", "joint"]
    end_id: int
    marginal: Marginal = "sequence"
    vectors: VectorBatch | None = None
    logprobs_BK: Tensor | None = None
    is_strength_learned: bool = True
    max_answer_tokens: int = 0
    counts: bool = True

    @property
    def num_targets(self) -> int:
        """Questions."""
        return self.num_sequences if self.counts else 0

    @property
    def num_read(self) -> int:
        """Tokens that go through the stacks: the encoder's, the decoder's as often as it reads, the retriever's."""
        passages = (len(self.encoder_cu_seqlens) - 1) // self.num_sequences
        decoded = len(self.tokens_T) * (passages if self.kind == "individual" else 1)
        sought = 0 if self.vectors is None else len(self.vectors.tokens_T)
        return len(self.encoder_tokens_E) + decoded + sought

    def run(self, stage: nn.Module, received: Tensor | None, *, dropout: Dropout | None) -> Tensor:
        """What the encoder makes of the passages, [E, H]; nothing is dropped."""
        assert isinstance(stage, ReaderStage)
        return stage.encode(self.encoder_tokens_E, cu_seqlens=self.encoder_cu_seqlens)

    def loss(
        self, stage: Stage, hidden_TH: Tensor, *, grid: Grid, scale: float, dropout: Dropout | None = None
    ) -> Lost:
        """-log p(a|q) of the questions."""
        assert isinstance(stage, ReaderStage)
        losses_B = self._losses(stage, hidden_TH, self._passage_logprobs(stage))
        return Lost.as_a_whole(losses_B.sum() * (scale if self.counts else 0.0))

    def outputs(self, stage: Stage, hidden_TH: Tensor, *, grid: Grid, per_token: bool) -> Tensor:
        """See above."""
        assert isinstance(stage, ReaderStage)
        logprobs_BK = self._passage_logprobs(stage)
        losses_B = self._losses(stage, hidden_TH, logprobs_BK)
        answers = self._answers(stage, hidden_TH, logprobs_BK) if self.max_answer_tokens else [[]] * self.num_sequences
        padded = [answer + [-1] * (self.max_answer_tokens - len(answer)) for answer in answers]
        tokens = torch.tensor(padded, dtype=torch.float64, device=losses_B.device).view(self.num_sequences, -1)
        return torch.cat((-losses_B.unsqueeze(1), logprobs_BK, tokens), 1)

    def output_shape(self, config: ModelConfig, *, per_token: bool) -> tuple[int, ...]:
        """As above."""
        passages = (len(self.encoder_cu_seqlens) - 1) // self.num_sequences
        return self.num_sequences, 1 + passages + self.max_answer_tokens

    def _passage_logprobs(self, stage: ReaderStage) -> Tensor:
        if self.vectors is None:
            assert self.logprobs_BK is not None
            return self.logprobs_BK
        assert stage.retriever is not None
        hidden_TH = self.vectors.run(stage, None, dropout=None)
        vectors_NH = stage.retriever.pool(hidden_TH, self.vectors.cu_seqlens)
        num = self.num_sequences
        passages_BKH = vectors_NH[num:].view(num, -1, vectors_NH.shape[1])
        return passage_logprobs(vectors_NH[:num], passages_BKH, scale=self.vectors.contrast.scale)

    def _losses(self, stage: ReaderStage, memory_EH: Tensor, logprobs_BK: Tensor) -> Tensor:
        if self.kind == "individual":
            return individual_losses(stage, self._read, logprobs_BK, marginal=self.marginal, memory_EH=memory_EH)
        return joint_losses(stage, self._read, logprobs_BK, strength=self._strength(stage), memory_EH=memory_EH)

    def _answers(self, stage: ReaderStage, memory_EH: Tensor, logprobs_BK: Tensor) -> list[list[int]]:
        most = self.max_answer_tokens
        if self.kind == "individual":
            return individual_answers(
                stage, self._read, logprobs_BK, end_id=self.end_id, max_tokens=most, memory_EH=memory_EH
            )
        return joint_answers(
            stage,
            self._read,
            logprobs_BK,
            strength=self._strength(stage),
            end_id=self.end_id,
            max_tokens=most,
            memory_EH=memory_EH,
        )

    def _strength(self, stage: ReaderStage) -> Tensor | None:
        strength = stage.passage_strength
        return strength if strength is None or self.is_strength_learned else strength.detach()

    @property
    def _read(self) -> ReaderBatch:
        return ReaderBatch(
            encoder_tokens_E=self.encoder_tokens_E,
            encoder_cu_seqlens=self.encoder_cu_seqlens,
            tokens_T=self.tokens_T,
            targets_T=self.targets_T,
            cu_seqlens=self.cu_seqlens,
        )
