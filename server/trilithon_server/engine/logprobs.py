"""Log-probabilities, ranks and the most likely tokens of one row of logits. V = vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# What a token that can't be drawn reports (after processing): JSON has no infinity. The OpenAI API uses this value.
IMPOSSIBLE = -9999.0
# How far below the maximum, in nats, the head of a distribution is first looked for; widened by the factor until it
# suffices, given up for the whole vocabulary beyond the last. Small steps: counting is cheaper than sorting too many.
_FIRST_DEPTH, _WIDENING, _LAST_DEPTH = 4.0, 1.25, 64.0


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token's log-probability and 1-based rank, and (id, log-probability, rank) of others at its position."""

    id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float, int], ...] = ()


def exponentials(x_V: FloatArray) -> FloatArray:
    """exp of every element in fp32: torch's kernel, which is several times faster than numpy's without AVX-512."""
    weights_V: FloatArray = torch.from_numpy(x_V).exp().numpy()
    return weights_V


def sorted_head(
    x_V: FloatArray, *, maximum: float, count: int = 0, mass: float = 0.0, weights: FloatArray | None = None
) -> IntArray:
    """
    The ids of the most likely tokens, by logit, then by id: at least `count` of them, with weights of at least `mass`.

    Only the head of the distribution is sorted: all tokens within a depth below the maximum, widened until they are
    enough (all of them if nothing else is). `weights` are exp(logit - maximum) of every token; needed with `mass`.
    """
    depth = _FIRST_DEPTH
    while depth <= _LAST_DEPTH:
        is_near_V = x_V >= maximum - depth
        if np.count_nonzero(is_near_V) >= count:
            ids = np.flatnonzero(is_near_V)
            if mass <= 0.0 or weights is None or float(weights[ids].sum(dtype=np.float64)) >= mass:
                return by_likelihood(ids, x_V)
        depth *= _WIDENING
    return by_likelihood(np.flatnonzero(x_V > -np.inf), x_V)


def by_likelihood(ids: IntArray, x_V: FloatArray) -> IntArray:
    """Ascending ids, sorted by logit, the largest first; equals stay by id."""
    return ids[np.argsort(-x_V[ids], kind="stable")]


def log_normalizer(x_V: FloatArray) -> float:
    """log of the sum of exp(logits): exponentials in fp32, their sum in float64."""
    maximum = float(x_V.max())
    return maximum + math.log(float(exponentials(x_V - np.float32(maximum)).sum(dtype=np.float64)))


def token_info(x_V: FloatArray, token: int, *, top: int, extra: Sequence[int] = ()) -> TokenInfo:
    """
    What is reported of a token under the distribution softmax(x_V).

    Args:
        x_V: fp32 logits; -inf where a token is impossible.
        top: how many of the most likely tokens to add; -1 or 0 for none.
        extra: ids that are reported too, after the top ones, in this order.
    """
    return token_infos(x_V, [token], top=top, extra=extra)[0]


def token_infos(x_V: FloatArray, tokens: Sequence[int], *, top: int, extra: Sequence[int] = ()) -> list[TokenInfo]:
    """The same of several tokens at one position."""
    normalizer = log_normalizer(x_V)

    def logprob(index: int) -> float:
        value = float(np.float32(float(x_V[index]) - normalizer))
        return value if value > IMPOSSIBLE else IMPOSSIBLE

    entries: list[tuple[int, float, int]] = []
    if top > 0:
        head = sorted_head(x_V, maximum=float(x_V.max()), count=top)[:top]
        entries = [(index, logprob(index), place + 1) for place, index in enumerate(head.tolist())]
    entries += [(index, logprob(index), rank_of(x_V, index)) for index in extra]
    return [TokenInfo(token, logprob(token), rank_of(x_V, token), tuple(entries)) for token in tokens]


def rank_of(x_V: FloatArray, token: int) -> int:
    """1 for the most likely token; equals are ranked by id."""
    value = x_V[token]
    return 1 + int(np.count_nonzero(x_V > value)) + int(np.count_nonzero(x_V[:token] == value))
