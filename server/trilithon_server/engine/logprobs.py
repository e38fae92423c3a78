"""Log-probabilities, ranks and the most likely tokens of one row of logits. V = vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# What a token that can't be drawn reports (after processing): JSON has no infinity. The OpenAI API uses this value.
IMPOSSIBLE = -9999.0
# First threshold below the maximum when the head of a distribution is looked for, in nats; doubled until it suffices.
_FIRST_DEPTH = 8.0
_LAST_DEPTH = 128.0


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token's log-probability and 1-based rank, and (id, log-probability, rank) of others at its position."""

    id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float, int], ...] = ()


def sorted_head(
    x_V: FloatArray, *, maximum: float, count: int = 0, mass: float = 0.0, weights: FloatArray | None = None
) -> IntArray:
    """
    The ids of the most likely tokens, by logit, then by id: at least `count` of them, with weights of at least `mass`.

    Only the head of the distribution is sorted: all tokens within a depth below the maximum, doubled until they are
    enough (all of them if nothing else is). `weights` are exp(logit - maximum) of every token; needed with `mass`.
    """
    depth = _FIRST_DEPTH
    while True:
        whole = depth > _LAST_DEPTH
        ids = np.flatnonzero(x_V > -np.inf) if whole else np.flatnonzero(x_V >= maximum - depth)
        enough = ids.size >= count
        if enough and mass > 0.0 and weights is not None:
            enough = float(weights[ids].sum(dtype=np.float64)) >= mass
        if enough or whole:
            return ids[np.argsort(-x_V[ids], kind="stable")]
        depth *= 2.0


def log_normalizer(x_V: FloatArray) -> float:
    """log of the sum of exp(logits): exponentials in fp32, their sum in float64."""
    maximum = float(x_V.max())
    return maximum + math.log(float(np.exp(x_V - np.float32(maximum)).sum(dtype=np.float64)))


def token_info(x_V: FloatArray, token: int, *, top: int, extra: Sequence[int] = ()) -> TokenInfo:
    """
    What is reported of a token under the distribution softmax(x_V).

    Args:
        x_V: fp32 logits; -inf where a token is impossible.
        top: how many of the most likely tokens to add; -1 or 0 for none.
        extra: ids that are reported too, after the top ones, in this order.
    """
    normalizer = log_normalizer(x_V)

    def logprob(index: int) -> float:
        value = float(np.float32(float(x_V[index]) - normalizer))
        return value if value > IMPOSSIBLE else IMPOSSIBLE

    entries: list[tuple[int, float, int]] = []
    if top > 0:
        head = sorted_head(x_V, maximum=float(x_V.max()), count=top)[:top]
        entries = [(index, logprob(index), place + 1) for place, index in enumerate(head.tolist())]
    entries += [(index, logprob(index), rank_of(x_V, index)) for index in extra]
    return TokenInfo(token, logprob(token), rank_of(x_V, token), tuple(entries))


def rank_of(x_V: FloatArray, token: int) -> int:
    """1 for the most likely token; equals are ranked by id."""
    value = x_V[token]
    return 1 + int(np.count_nonzero(x_V > value)) + int(np.count_nonzero(x_V[:token] == value))
