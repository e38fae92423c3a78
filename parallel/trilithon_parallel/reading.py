"""
What encoder-decoders that read retrieved passages learn from (arXiv 2101.00408): answers, and where they stand.

individual  each passage is read alone; the answer's probability is the sum over the passages of p(z|q) p(a|q, z).
joint       the decoder reads the passages of a question together (fusion in the decoder, arXiv 2007.01282). What it
            attends to is biased by the passages' probabilities, so that the retriever learns from the answer, too.

Both take the log-probabilities of passages from fresh vectors of the retriever: an index only proposes them. For models
of one pipeline stage without sequence parallelism; tp may be any.

Shapes: B questions, K passages of each, E tokens of the encoder, T of the decoder, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from trilithon_parallel.loss import target_logprobs
from trilithon_parallel.models import Seq2SeqStage

Marginal = Literal["sequence", "token"]


@dataclass(frozen=True, eq=False, kw_only=True)
class ReaderBatch:
    """
    Questions with as many passages each, and their answers.

    Attributes:
        encoder_tokens_E: int64; a question and a passage make a sequence, those of a question are neighbours.
        encoder_cu_seqlens: B * K + 1 boundaries in E.
        tokens_T: int64, the decoder's; each answer's begin with `config.decoder_start_id`.
        targets_T: int64; each answer's end with the end token.
        cu_seqlens: B + 1 boundaries in T.
    """

    encoder_tokens_E: Tensor
    encoder_cu_seqlens: Sequence[int]
    tokens_T: Tensor
    targets_T: Tensor
    cu_seqlens: Sequence[int]

    @property
    def num_questions(self) -> int:
        """B."""
        return len(self.cu_seqlens) - 1

    @property
    def num_passages(self) -> int:
        """K."""
        return (len(self.encoder_cu_seqlens) - 1) // self.num_questions


def passage_logprobs(queries_BH: Tensor, passages_BKH: Tensor, *, scale: float) -> Tensor:
    """
    log p(z|q) over the K passages of each question, fp64 [B, K], differentiable.

    Args:
        scale: of the inner products: 1 / sqrt(H), or 20 where vectors have length 1.
    """
    scores_BK = torch.einsum("bh,bkh->bk", queries_BH.double(), passages_BKH.double())
    return (scale * scores_BK).log_softmax(1)


def individual_losses(
    stage: Seq2SeqStage, batch: ReaderBatch, passage_logprobs_BK: Tensor, *, marginal: Marginal = "sequence"
) -> Tensor:
    """
    -log p(a|q) of each question, fp64 [B]; each passage is read alone.

    Args:
        passage_logprobs_BK: fp64.
        marginal: `sequence`: the sum over passages of whole answers' probabilities. `token`: token by token, as if
            each token might have another passage (REALM, arXiv 2002.08909; EMDR2, arXiv 2106.05346).
    """
    memory_EH = stage.encode(batch.encoder_tokens_E, cu_seqlens=batch.encoder_cu_seqlens)
    count, spans = batch.num_passages, list(pairwise(batch.cu_seqlens))
    repeated = [torch.arange(start, stop) for start, stop in spans for _ in range(count)]
    at = torch.cat(repeated).to(batch.tokens_T.device)
    bounds = [0, *torch.tensor([len(part) for part in repeated]).cumsum(0).tolist()]
    hidden = stage.decode(batch.tokens_T[at], memory_EH, cu_seqlens=bounds, encoder_cu_seqlens=batch.encoder_cu_seqlens)
    logprobs = _logprobs(stage, hidden, batch.targets_T[at])
    losses = []
    for i, (start, stop) in enumerate(spans):
        first = bounds[i * count]
        by_passage_KT = logprobs[first : first + count * (stop - start)].view(count, stop - start)
        prior_K = passage_logprobs_BK[i]
        if marginal == "sequence":
            losses.append(-(prior_K + by_passage_KT.sum(1)).logsumexp(0))
        else:
            losses.append(-(prior_K.unsqueeze(1) + by_passage_KT).logsumexp(0).sum())
    return torch.stack(losses)


def joint_losses(
    stage: Seq2SeqStage, batch: ReaderBatch, passage_logprobs_BK: Tensor, *, strength: Tensor | None
) -> Tensor:
    """
    -log p(a|q, all passages) of each question, fp64 [B]; the decoder reads the passages together.

    The order of a question's passages doesn't matter: cross-attention knows no positions.

    Args:
        passage_logprobs_BK: fp64.
        strength: the learnable scalar that p(z|q) is multiplied by before it is added to the cross-attention's scores
            of every token of the passage; None: no bias at all, fusion in the decoder.
    """
    memory_EH = stage.encode(batch.encoder_tokens_E, cu_seqlens=batch.encoder_cu_seqlens)
    bias_E = None
    if strength is not None:
        lengths = torch.tensor([stop - start for start, stop in pairwise(batch.encoder_cu_seqlens)])
        by_passage = strength * passage_logprobs_BK.exp().flatten()
        bias_E = by_passage.repeat_interleave(lengths.to(by_passage.device)).to(memory_EH.dtype)
    hidden_TH = stage.decode(
        batch.tokens_T,
        memory_EH,
        cu_seqlens=batch.cu_seqlens,
        encoder_cu_seqlens=batch.encoder_cu_seqlens[:: batch.num_passages],
        cross_bias_E=bias_E,
    )
    logprobs_T = _logprobs(stage, hidden_TH, batch.targets_T)
    return torch.stack([-logprobs_T[start:stop].sum() for start, stop in pairwise(batch.cu_seqlens)])


def _logprobs(stage: Seq2SeqStage, hidden_TH: Tensor, targets_T: Tensor) -> Tensor:
    """Of each target, fp64 [T]."""
    logits_TV = stage.local_logits(hidden_TH)
    logprobs_T, _ = target_logprobs(logits_TV, targets_T, tp=stage.grid.tp, real_columns=stage.real_columns)
    return logprobs_T
