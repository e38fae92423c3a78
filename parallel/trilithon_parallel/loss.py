"""
Losses. Those of a vocabulary are made without ever gathering logits that tp cuts (arXiv 1909.08053, section 3).

Three small all-reduces: the largest logit, the sum of exponentials, the target's logit. Two of them say by the way
whether a target is the likeliest token of all. The loss of a step is the sum of its tokens' losses over the global
number of tokens that count, so it depends on no layout: callers give each token the weight 1 / N, and everything after
that is a sum.

Shapes: T tokens, V this rank's columns of the vocabulary, N cases with L labels, B sequences, P pairs of answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trilithon_parallel.collectives import all_reduce, all_reduce_max
from trilithon_parallel.grid import Axis

# Elements of logits that are worked on at once, on a CPU: 1 MiB of fp32 stays in a core's cache from pass to pass.
BLOCK_ELEMENTS = 2**18


@dataclass(frozen=True, eq=False)
class Lost:
    """
    What the last stage says of a micro-batch, the same on every tp rank.

    `total`: the sum of what is lost, each part by its weight and the step's scale (fp64, a scalar); its gradient to the
    hidden states is whole on each rank. `num_correct` of `num_judged` (int64, scalars): how many of the tokens that
    count the model would have said by itself; both 0 where single tokens aren't what is learned.
    """

    total: Tensor
    num_correct: Tensor
    num_judged: Tensor

    @classmethod
    def of_tokens(cls, total: Tensor, is_correct_T: Tensor, is_judged_T: Tensor) -> Lost:
        """With both counts, of bools [T]."""
        return cls(total, is_correct_T.sum(), is_judged_T.sum())

    @classmethod
    def as_a_whole(cls, total: Tensor) -> Lost:
        """Of sequences, spans or pairs."""
        nothing = torch.zeros((), dtype=torch.int64, device=total.device)
        return cls(total, nothing, nothing)


def cross_entropy(
    logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor, *, tp: Axis, real_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """
    The weighted sum of the tokens' losses (fp64, a scalar), and of each token without a gradient its log-probability
    (fp32 [T]) and whether no token is likelier (bool [T]).

    Args:
        logits_TV, targets_T, tp, real_columns: as for `target_logprobs`.
        weights_T: float; 0 where a token does not count.
    """
    logprobs_T, is_best_T = target_logprobs(logits_TV, targets_T, tp=tp, real_columns=real_columns)
    return -(logprobs_T * weights_T).sum(), logprobs_T.detach().to(logits_TV.dtype), is_best_T


def target_logprobs(logits_TV: Tensor, targets_T: Tensor, *, tp: Axis, real_columns: int) -> tuple[Tensor, Tensor]:
    """
    Each target's log-probability, fp64 [T], differentiable, and whether its logit is the largest of the vocabulary,
    bool [T]: a token that shares the first place is. Both are the same on every rank of the axis.

    Args:
        logits_TV: fp32 or fp64, this rank's columns; taken over: their memory holds something else afterwards.
        targets_T: int64 token ids. Where nothing is made of the result they must still be ids of the vocabulary.
        tp: the axis that the vocabulary is cut along, in rank order, equally many columns each.
        real_columns: columns of this rank that are tokens; those after them are padding.
    """
    logprobs_T, is_best_T = _LogProbabilities.apply(logits_TV, targets_T, tp, real_columns)  # type: ignore[no-untyped-call]  # torch's apply is untyped
    return logprobs_T, is_best_T


class _LogProbabilities(torch.autograd.Function):
    """log softmax(x_t)[target_t]; its gradient is one-hot - softmax."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, tp: Axis, real_columns: int) -> tuple[Tensor, Tensor]:
        local_T = targets_T - tp.rank * logits_TV.shape[1]
        is_mine_T = (local_T >= 0) & (local_T < real_columns)
        local_T = torch.where(is_mine_T, local_T, 0)
        x_TV = logits_TV[:, :real_columns]
        chosen_T = torch.where(is_mine_T, logits_TV.gather(1, local_T.unsqueeze(1)).squeeze(1), 0.0)
        most_T = x_TV.amax(1) if real_columns else torch.full_like(chosen_T, -torch.inf)
        most_T = all_reduce_max(most_T, tp, label="loss.max")
        sums_T = torch.zeros(len(targets_T), dtype=torch.float64, device=x_TV.device)
        for rows in _blocks(x_TV):
            part_RV = x_TV[rows].sub_(most_T[rows].unsqueeze(1)).exp_()
            sums_T[rows] = part_RV.sum(1, dtype=torch.float64)
        sums_T = all_reduce(sums_T, tp, label="loss.sum")
        chosen_T = all_reduce(chosen_T, tp, label="loss.target")
        ctx.save_for_backward(logits_TV, sums_T, local_T, is_mine_T)
        ctx.real_columns = real_columns
        # Exact: the sum over ranks adds zeros to one rank's logit, and the maximum is one of them.
        is_best_T = chosen_T == most_T
        ctx.mark_non_differentiable(is_best_T)
        return (chosen_T.double() - most_T.double()) - sums_T.log(), is_best_T

    @staticmethod
    def backward(ctx: Any, d_logprobs_T: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_TV, sums_T, local_T, is_mine_T = ctx.saved_tensors
        shrink_T = (-d_logprobs_T / sums_T).to(grad_TV.dtype)
        for rows in _blocks(grad_TV):
            grad_TV[rows].mul_(shrink_T[rows].unsqueeze(1))
        grad_TV[:, ctx.real_columns :] = 0.0
        one_hot_T = torch.where(is_mine_T, d_logprobs_T, 0.0).to(grad_TV.dtype)
        grad_TV.scatter_add_(1, local_T.unsqueeze(1), one_hot_T.unsqueeze(1))
        return grad_TV, None, None, None


def label_losses(logits_NL: Tensor, labels_N: Tensor) -> Tensor:
    """-log softmax(x_n)[label_n], fp64 [N], of a head that every rank has whole."""
    return F.cross_entropy(logits_NL.double(), labels_N, reduction="none")


def label_is_best(logits_NL: Tensor, labels_N: Tensor) -> Tensor:
    """Whether no label's logit is larger than that of label_n, bool [N]."""
    return logits_NL.gather(1, labels_N.unsqueeze(1)).squeeze(1) == logits_NL.amax(1)


def span_losses(
    logits_T2: Tensor, starts_B: Tensor, ends_B: Tensor, allowed_T: Tensor, cu_seqlens: Sequence[int]
) -> Tensor:
    """
    Of each sequence the mean of two losses, its start's and its end's (Devlin et al. 2019, section 4.2): fp64 [B].

    Args:
        logits_T2: of being a start, an end.
        starts_B, ends_B: int64 places in T, each within its own sequence and allowed.
        allowed_T: bool; the softmax of a sequence runs over these of its tokens.
    """
    masked_T2 = logits_T2.double().masked_fill(~allowed_T.unsqueeze(1), -torch.inf)
    sums_B2 = torch.stack([masked_T2[start:stop].logsumexp(0) for start, stop in pairwise(cu_seqlens)])
    chosen_B2 = torch.stack((masked_T2[starts_B, 0], masked_T2[ends_B, 1]), 1)
    return (sums_B2 - chosen_B2).mean(1)


def joint_span_losses(
    logits_TL: Tensor, starts_B: Tensor, ends_B: Tensor, context_T: Tensor, cu_seqlens: Sequence[int]
) -> Tensor:
    """
    -log of a span's share among all spans of its sequence's context (arXiv 2002.09599, section 2.1): fp64 [B].

    Args:
        logits_TL: of the spans of 1, 2 ... L tokens that begin with each token.
        starts_B, ends_B: int64 places in T of each span's first and last token, in the context, at most L tokens.
        context_T: bool; a sequence's context is one run of tokens, and spans lie within it.
    """
    masked_TL = logits_TL.double().masked_fill(~spans_allowed(context_T, logits_TL.shape[1], cu_seqlens), -torch.inf)
    sums_B = torch.stack([masked_TL[start:stop].flatten().logsumexp(0) for start, stop in pairwise(cu_seqlens)])
    return sums_B - masked_TL[starts_B, ends_B - starts_B]


def spans_allowed(context_T: Tensor, num_lengths: int, cu_seqlens: Sequence[int]) -> Tensor:
    """Which spans of 1, 2 ... L tokens begin and end within the context of one sequence, bool [T, L]."""
    rows = []
    for start, stop in pairwise(cu_seqlens):
        padded = F.pad(context_T[start:stop], (0, num_lengths - 1))
        rows.append(context_T[start:stop].unsqueeze(1) & padded.unfold(0, num_lengths, 1))
    return torch.cat(rows)


def preference_margins(sums_P2: Tensor, reference_P2: Tensor) -> Tensor:
    """
    How much more than its reference a model prefers the chosen to the rejected answer, fp64 [P].

    Args:
        sums_P2, reference_P2: summed log-probabilities of chosen and rejected answers, by the model and by the one that
            it began as.
    """
    gained_P2 = sums_P2.double() - reference_P2.double()
    return gained_P2[:, 0] - gained_P2[:, 1]


def preference_losses(margins_P: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta * margin), [P]: direct preference optimisation (arXiv 2305.18290, equation 7)."""
    return -F.logsigmoid(beta * margins_P)


def _blocks(x_TV: Tensor) -> list[slice]:
    """Rows that are worked on together: all of them where the device is not a CPU."""
    step = len(x_TV) if x_TV.device.type != "cpu" else max(1, BLOCK_ELEMENTS // max(1, x_TV.shape[1]))
    return [slice(first, first + step) for first in range(0, len(x_TV), step)]
