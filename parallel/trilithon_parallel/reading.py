"""
What encoder-decoders that read retrieved passages learn from (arXiv 2101.00408): answers, and where they stand.

individual  each passage is read alone; the answer's probability is the sum over the passages of p(z|q) p(a|q, z).
joint       the decoder reads the passages of a question together (fusion in the decoder, arXiv 2007.01282). What it
            attends to is biased by the passages' probabilities, so that the retriever learns from the answer, too.

Both take the log-probabilities of passages from fresh vectors of the retriever: an index only proposes them. For models
of one pipeline stage without sequence parallelism; tp may be any.

Shapes: B questions, K passages of each, E tokens of the encoder, T of the decoder, H hidden; N sequences that are being
written, D tokens of each so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
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
    stage: Seq2SeqStage,
    batch: ReaderBatch,
    passage_logprobs_BK: Tensor,
    *,
    marginal: Marginal = "sequence",
    memory_EH: Tensor | None = None,
) -> Tensor:
    """
    -log p(a|q) of each question, fp64 [B]; each passage is read alone.

    Args:
        passage_logprobs_BK: fp64.
        marginal: `sequence`: the sum over passages of whole answers' probabilities. `token`: token by token, as if
            each token might have another passage (REALM, arXiv 2002.08909; EMDR2, arXiv 2106.05346).
        memory_EH: what the encoder makes of the batch, where that is known.
    """
    memory_EH = _memory(stage, batch) if memory_EH is None else memory_EH
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
    stage: Seq2SeqStage,
    batch: ReaderBatch,
    passage_logprobs_BK: Tensor,
    *,
    strength: Tensor | None,
    memory_EH: Tensor | None = None,
) -> Tensor:
    """
    -log p(a|q, all passages) of each question, fp64 [B]; the decoder reads the passages together.

    The order of a question's passages doesn't matter: cross-attention knows no positions.

    Args:
        passage_logprobs_BK: fp64.
        strength: the learnable scalar that p(z|q) is multiplied by before it is added to the cross-attention's scores
            of every token of the passage; None: no bias at all, fusion in the decoder.
        memory_EH: as for `individual_losses`.
    """
    memory_EH = _memory(stage, batch) if memory_EH is None else memory_EH
    hidden_TH = stage.decode(
        batch.tokens_T,
        memory_EH,
        cu_seqlens=batch.cu_seqlens,
        encoder_cu_seqlens=batch.encoder_cu_seqlens[:: batch.num_passages],
        cross_bias_E=_bias(batch, passage_logprobs_BK, strength, memory_EH.dtype),
    )
    logprobs_T = _logprobs(stage, hidden_TH, batch.targets_T)
    return torch.stack([-logprobs_T[start:stop].sum() for start, stop in pairwise(batch.cu_seqlens)])


def individual_answers(
    stage: Seq2SeqStage,
    batch: ReaderBatch,
    passage_logprobs_BK: Tensor,
    *,
    end_id: int,
    max_tokens: int,
    memory_EH: Tensor | None = None,
) -> list[list[int]]:
    """
    An answer to each question, without its end: of the likeliest answers to each passage alone, written greedily, the
    one with the largest p(a|q); of equal ones that of the earlier passage.

    Args:
        end_id: ends an answer. max_tokens: after which one ends anyway, the end counted.
        memory_EH: as for `individual_losses`.
    """
    memory_EH = _memory(stage, batch) if memory_EH is None else memory_EH
    written = _written(
        stage,
        memory_EH,
        batch.encoder_cu_seqlens,
        None,
        start_id=int(batch.tokens_T[0]),
        end_id=end_id,
        most=max_tokens,
    )
    count = batch.num_passages
    proposed = [
        list(dict.fromkeys(map(tuple, written[i * count : (i + 1) * count]))) for i in range(batch.num_questions)
    ]
    rounds = []
    for number in range(max(map(len, proposed))):
        answers = [some[min(number, len(some) - 1)] for some in proposed]
        asked = _with_answers(batch, answers, end_id)
        rounds.append(individual_losses(stage, asked, passage_logprobs_BK, memory_EH=memory_EH))
    best_B = torch.stack(rounds).argmin(0).tolist()
    return [list(some[best]) for some, best in zip(proposed, best_B, strict=True)]


def joint_answers(
    stage: Seq2SeqStage,
    batch: ReaderBatch,
    passage_logprobs_BK: Tensor,
    *,
    strength: Tensor | None,
    end_id: int,
    max_tokens: int,
    memory_EH: Tensor | None = None,
) -> list[list[int]]:
    """An answer to each question, without its end, written greedily; arguments as above."""
    memory_EH = _memory(stage, batch) if memory_EH is None else memory_EH
    bias_E = _bias(batch, passage_logprobs_BK, strength, memory_EH.dtype)
    bounds = batch.encoder_cu_seqlens[:: batch.num_passages]
    return _written(stage, memory_EH, bounds, bias_E, start_id=int(batch.tokens_T[0]), end_id=end_id, most=max_tokens)


def _memory(stage: Seq2SeqStage, batch: ReaderBatch) -> Tensor:
    return stage.encode(batch.encoder_tokens_E, cu_seqlens=batch.encoder_cu_seqlens)


def _bias(
    batch: ReaderBatch, passage_logprobs_BK: Tensor, strength: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the cross-attention's scores of each encoder token, [E]."""
    if strength is None:
        return None
    lengths = torch.tensor([stop - start for start, stop in pairwise(batch.encoder_cu_seqlens)])
    by_passage = strength * passage_logprobs_BK.exp().flatten()
    return by_passage.repeat_interleave(lengths.to(by_passage.device)).to(dtype)


def _written(
    stage: Seq2SeqStage,
    memory_EH: Tensor,
    encoder_cu_seqlens: Sequence[int],
    bias_E: Tensor | None,
    *,
    start_id: int,
    end_id: int,
    most: int,
) -> list[list[int]]:
    """
    The likeliest tokens one after another, for each sequence of the memory. All prefixes are as long, and are run again
    for each token: answers have a few.
    """
    num = len(encoder_cu_seqlens) - 1
    prefix_ND = torch.full((num, 1), start_id, device=memory_EH.device)
    is_done_N = torch.zeros(num, dtype=torch.bool, device=memory_EH.device)
    while prefix_ND.shape[1] <= most and not bool(is_done_N.all()):
        length = prefix_ND.shape[1]
        hidden_TH = stage.decode(
            prefix_ND.flatten(),
            memory_EH,
            cu_seqlens=range(0, num * length + 1, length),
            encoder_cu_seqlens=encoder_cu_seqlens,
            cross_bias_E=bias_E,
        )
        best_N = stage.gather_logits(hidden_TH[length - 1 :: length]).argmax(-1)
        is_done_N |= best_N == end_id
        prefix_ND = torch.cat((prefix_ND, best_N.unsqueeze(1)), 1)
    rows: list[list[int]] = prefix_ND[:, 1:].tolist()
    return [row[: row.index(end_id)] if end_id in row else row for row in rows]


def _with_answers(batch: ReaderBatch, answers: Sequence[Sequence[int]], end_id: int) -> ReaderBatch:
    """The same questions and passages with other answers."""
    start_id, device = int(batch.tokens_T[0]), batch.tokens_T.device
    tokens = [token for answer in answers for token in (start_id, *answer)]
    targets = [token for answer in answers for token in (*answer, end_id)]
    return replace(
        batch,
        tokens_T=torch.tensor(tokens, device=device),
        targets_T=torch.tensor(targets, device=device),
        cu_seqlens=[0, *accumulate(len(answer) + 1 for answer in answers)],
    )


def _logprobs(stage: Seq2SeqStage, hidden_TH: Tensor, targets_T: Tensor) -> Tensor:
    """Of each target, fp64 [T]."""
    logits_TV = stage.local_logits(hidden_TH)
    logprobs_T, _ = target_logprobs(logits_TV, targets_T, tp=stage.grid.tp, real_columns=stage.real_columns)
    return logprobs_T
