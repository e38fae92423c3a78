"""
Cross-entropy over a vocabulary that is cut by tp, without ever gathering the logits (arXiv 1909.08053, section 3).

Three small all-reduces: the largest logit, the sum of exponentials, the target's logit. The loss of a step is the sum
of its tokens' losses over the global number of tokens that count, so it depends on no layout: callers give each token
the weight 1 / N, and everything after that is a sum.

Shapes: T tokens, V this rank's columns of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilithon_parallel.collectives import all_reduce, all_reduce_max
from trilithon_parallel.grid import Axis

# Elements of logits that are worked on at once, on a CPU: 1 MiB of fp32 stays in a core's cache from pass to pass.
BLOCK_ELEMENTS = 2**18


def cross_entropy(
    logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor, *, tp: Axis, real_columns: int
) -> tuple[Tensor, Tensor]:
    """
    The weighted sum of the tokens' losses (fp64, a scalar), and each token's log-probability (fp32 [T], no gradient).

    Args:
        logits_TV: fp32 or fp64, this rank's columns; taken over: their memory holds something else afterwards.
        targets_T: int64 token ids. Where the weight is 0 they must still be ids of the vocabulary.
        weights_T: float; 0 where a token does not count.
        tp: the axis that the vocabulary is cut along, in rank order, equally many columns each.
        real_columns: columns of this rank that are tokens; those after them are padding.
    """
    total, logprobs_T = _CrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch's apply is untyped
        logits_TV, targets_T, weights_T, tp, real_columns
    )
    return total, logprobs_T


class _CrossEntropy(torch.autograd.Function):
    """-sum_t w_t log softmax(x_t)[target_t]; its gradient is w_t (softmax - one-hot)."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor, tp: Axis, real_columns: int
    ) -> tuple[Tensor, Tensor]:
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
        logprobs_T = (chosen_T.double() - most_T.double()) - sums_T.log()
        ctx.save_for_backward(logits_TV, sums_T, weights_T, local_T, is_mine_T)
        ctx.real_columns = real_columns
        reported_T = logprobs_T.to(logits_TV.dtype)
        ctx.mark_non_differentiable(reported_T)
        return -(logprobs_T * weights_T).sum(), reported_T

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_TV, sums_T, weights_T, local_T, is_mine_T = ctx.saved_tensors
        scale_T = weights_T.double() * d_total
        shrink_T = (scale_T / sums_T).to(grad_TV.dtype)
        for rows in _blocks(grad_TV):
            grad_TV[rows].mul_(shrink_T[rows].unsqueeze(1))
        grad_TV[:, ctx.real_columns :] = 0.0
        one_hot_T = torch.where(is_mine_T, scale_T, 0.0).to(grad_TV.dtype)
        grad_TV.scatter_add_(1, local_T.unsqueeze(1), -one_hot_T.unsqueeze(1))
        return grad_TV, None, None, None, None


def _blocks(x_TV: Tensor) -> list[slice]:
    """Rows that are worked on together: all of them where the device is not a CPU."""
    step = len(x_TV) if x_TV.device.type != "cpu" else max(1, BLOCK_ELEMENTS // max(1, x_TV.shape[1]))
    return [slice(first, first + step) for first in range(0, len(x_TV), step)]
