"""
Vectors that are told apart from all others of a global batch: what twin encoders learn from (arXiv 2101.00408, 2.2).

A query shall be nearer to the passages that answer it than to every other passage of the batch, whichever rank holds
it, or, where told so, than to those alone that were given with it. The vectors of the whole batch come first, without a
graph; then every rank knows the loss and its own share of the gradient, and each micro-batch is run again to take it.
So the negatives are those of the global batch in every layout, and memory doesn't grow with them (arXiv 2101.06983).

Shapes: N vectors of a global batch, Q queries, C passages, H their size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trilithon_parallel.contrast_terms import ANSWER, QUERY, Contrast


@dataclass(frozen=True, eq=False)
class Pool:
    """
    The vectors of a global batch, on every rank, in the order of their samples.

    `vectors_NH`: fp64. `roles_N`, `pairs_N`, `keys_N`: int64; a query, its answer and the others that were given with
    it have one pair number, passages with one key are one text. What is nothing is not among them.
    """

    vectors_NH: Tensor
    roles_N: Tensor
    pairs_N: Tensor
    keys_N: Tensor


_NEVER = -1e300
"""A score that nothing has: finite, so that gradients are numbers where a query has no others."""


def contrast(pool: Pool, how: Contrast) -> tuple[Tensor, Tensor, Tensor]:
    """
    What each query loses, by scaled inner products s: the cross-entropy of its answer among the others that count, or,
    with a margin M, the sum of max(0, M - s(answer) + s(other)) over them (arXiv 2010.00840, contextual ranker). Of
    several answers it is the mean over them, each told from the others alone.

    Passages with the text of a query's answer are no negatives of it.

    Returns:
        `losses_N`: fp64, 0 where a vector is no query. `gradient_NH`: of their sum. `ranks_N`: int64, the place of each
        query's best answer among the others that count, from 1; 0 where a vector is no query.
    """
    is_query_N, is_passage_N = pool.roles_N == QUERY, pool.roles_N != QUERY
    queries, passages = is_query_N.nonzero().squeeze(1), is_passage_N.nonzero().squeeze(1)
    vectors_NH = pool.vectors_NH.detach().requires_grad_()
    answers_C = torch.where(pool.roles_N[passages] == ANSWER, pool.pairs_N[passages], -1)
    is_answer_QC = pool.pairs_N[queries].unsqueeze(1) == answers_C
    num_answers_Q = is_answer_QC.sum(1)
    # Places of each query's answers, and which of them are there, up to the most that one has.
    order_QC = is_answer_QC.long().argsort(stable=True, dim=1, descending=True)
    places_QA = order_QC[:, : int(num_answers_Q.max())]
    is_there_QA = is_answer_QC.gather(1, places_QA)
    keys_C = pool.keys_N[passages]
    answered_QAC = keys_C[places_QA].unsqueeze(2) == keys_C
    is_other_QC = ~(answered_QAC & is_there_QA.unsqueeze(2)).any(1)
    if how.within:
        is_other_QC &= pool.pairs_N[queries].unsqueeze(1) == pool.pairs_N[passages]
    with torch.enable_grad():
        scores_QC = how.scale * vectors_NH[queries] @ vectors_NH[passages].T
        reached_QA = scores_QC.gather(1, places_QA)
        if how.margin is None:
            others_Q1 = scores_QC.masked_fill(~is_other_QC, _NEVER).logsumexp(1, keepdim=True)
            lost_QA = torch.logaddexp(reached_QA, others_Q1) - reached_QA
        else:
            short_QAC = how.margin - reached_QA.unsqueeze(2) + scores_QC.unsqueeze(1)
            lost_QA = short_QAC.masked_fill(~is_other_QC.unsqueeze(1), 0.0).relu().sum(2)
        losses_Q = lost_QA.masked_fill(~is_there_QA, 0.0).sum(1) / num_answers_Q
        (gradient_NH,) = torch.autograd.grad(losses_Q.sum(), vectors_NH)
    best_Q1 = reached_QA.detach().masked_fill(~is_there_QA, _NEVER).amax(1, keepdim=True)
    losses_N = torch.zeros(len(vectors_NH), dtype=torch.float64).index_put((queries,), losses_Q.detach())
    ranks_Q = ((scores_QC.detach() > best_Q1) & is_other_QC).sum(1) + 1
    ranks_N = torch.zeros(len(vectors_NH), dtype=torch.int64).index_put((queries,), ranks_Q)
    return losses_N, gradient_NH, ranks_N
