"""
Logits in, tokens out. Runs on tensor-parallel rank 0 of the last stage. R = rows of logits, V = vocabulary.

The order of operations is the serving contract's section 2. Each row is handled alone and its one random number is
keyed by (seed, choice, position), so a token depends on no neighbour (E2, E5). Fast paths: a batch's argmax serves
plain greedy rows; a drawn row sorts the head of its distribution only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trilithon_server.engine.logprobs import (
    TokenInfo,
    by_likelihood,
    exponentials,
    log_normalizer,
    sorted_head,
    token_info,
    token_infos,
)
from trilithon_server.engine.philox import uniform
from trilithon_server.engine.rules import Answer, FloatArray, IntArray, Rules
from trilithon_server.engine.wire_pb2 import Submit

NUMERICAL_FAILURE = -1
DEAD_END = -2
_LAST_RADIUS = 64.0  # nats; beyond it every token is looked at


@dataclass(frozen=True, slots=True)
class Draw:
    """Draw a token for an answer from a row of logits; `mask` is a constraint's bitmask (bit i = token i allowed)."""

    row: int
    sequence_id: int
    mask: bytes | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """
    The token, or NUMERICAL_FAILURE or DEAD_END; and its log-probability if it was asked for.

    A beam draws no token but `candidates`: what each adds to the beam's score, and the token; best first.
    """

    token: int
    info: TokenInfo | None = None
    candidates: tuple[tuple[float, TokenInfo], ...] = ()


@dataclass(frozen=True, slots=True)
class Fork:
    """The answer `sequence_id` goes on as `parent_id` was, with one token more."""

    sequence_id: int
    parent_id: int
    token: int


class Sampler:
    """The answers under way and how to draw for them."""

    def __init__(self) -> None:
        self._answers: dict[int, Answer] = {}

    def register(self, first_id: int, submit: Submit) -> None:
        """A request has started: its answers are `first_id`, `first_id + 1`, ..., by choice."""
        rules, prompt = Rules(submit.sampling), list(submit.prompt)
        for choice in range(submit.sampling.num_sequences):
            self._answers[first_id + choice] = Answer(rules, prompt, choice=choice)

    def fork(self, forks: Sequence[Fork]) -> None:
        """Beams have moved, all at once."""
        self._answers |= {fork.sequence_id: self._answers[fork.parent_id].fork(fork.token) for fork in forks}

    def forget(self, sequence_ids: Iterable[int]) -> None:
        """These answers are finished."""
        for sequence_id in sequence_ids:
            self._answers.pop(sequence_id, None)

    def draw(self, logits_RV: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
        """One token for each draw; every answer takes its own in."""
        logits_on_host: FloatArray | None = None
        if logits_RV.device.type == "cpu":
            logits_on_host = logits_RV.numpy()
            argmaxima_R = logits_on_host.argmax(axis=1)  # several times faster than torch's on a CPU
            maxima = logits_on_host[np.arange(len(argmaxima_R)), argmaxima_R].tolist()
            argmaxima = argmaxima_R.tolist()
        else:
            found = logits_RV.max(dim=-1)
            maxima, argmaxima = found.values.tolist(), found.indices.tolist()
        # Either way NaN wins a maximum and ties go to the lowest id.
        results = []
        for draw in draws:
            answer = self._answers[draw.sequence_id]
            rules = answer.rules
            if not math.isfinite(maxima[draw.row]):
                results.append(Drawn(NUMERICAL_FAILURE))
                continue
            if rules.num_candidates:
                if logits_on_host is None:
                    logits_on_host = logits_RV.cpu().numpy()
                results.append(beam_candidates(logits_on_host[draw.row], answer, mask=draw.mask))
                continue
            if rules.is_greedy and rules.logprobs < 0 and draw.mask is None and not answer.must_change():
                drawn = Drawn(argmaxima[draw.row])
            else:
                if logits_on_host is None:
                    logits_on_host = logits_RV.cpu().numpy()
                drawn = draw_one(logits_on_host[draw.row], answer, mask=draw.mask)
            if drawn.token >= 0:
                answer.append(drawn.token)
            results.append(drawn)
        return results

    def score(self, logits_RV: Tensor, sequence_id: int, *, first: int) -> list[TokenInfo] | None:
        """
        Log-probabilities of the prompt tokens that follow positions `first .. first + R`; None for broken logits.

        Row r of the logits belongs to position `first + r` and scores the prompt's token at `first + r + 1`.
        """
        answer = self._answers[sequence_id]
        if not bool(torch.isfinite(logits_RV.max(dim=-1).values).all()):
            return None
        rules = answer.rules
        return [
            token_info(x_V, answer.tokens[first + row + 1], top=rules.prompt_logprobs, extra=rules.extra_ids)
            for row, x_V in enumerate(logits_RV.cpu().numpy())
        ]


def draw_one(raw_V: FloatArray, answer: Answer, *, mask: bytes | None = None) -> Drawn:
    """
    One token from one row of fp32 logits. Pure: neither `raw_V` nor the answer is changed.

    Args:
        raw_V: the model's logits.
        answer: whose turn it is; its rules and its tokens so far.
        mask: a constraint's bitmask, little-endian bits.
    """
    rules = answer.rules
    x_V = _changed(raw_V, answer, mask)
    maximum = x_V.max()
    if maximum == -np.inf:
        return Drawn(DEAD_END)
    if rules.is_greedy:
        token, survivors = int(x_V.argmax()), None
    else:
        x_V = (x_V - maximum) / rules.temperature
        random = uniform(rules.seed, choice=answer.choice, position=len(answer.tokens))
        token, survivors = _draw(x_V, answer, random)
    if rules.logprobs < 0:
        return Drawn(token)
    if rules.after_processing and survivors is not None:
        cut_V = np.full_like(x_V, -np.inf)
        cut_V[survivors] = x_V[survivors]
        x_V = cut_V
    reported_V = x_V if rules.after_processing else raw_V
    return Drawn(token, token_info(reported_V, token, top=rules.logprobs, extra=rules.extra_ids))


def beam_candidates(raw_V: FloatArray, answer: Answer, *, mask: bytes | None = None) -> Drawn:
    """
    The best tokens that may follow a beam. Pure, as `draw_one`.

    A token's gain is its log-probability under the model, changed by biases and penalties; masks only take tokens away.
    """
    rules = answer.rules
    x_V = _changed(raw_V, answer, mask)
    maximum = float(x_V.max())
    if maximum == -np.inf:
        return Drawn(DEAD_END)
    normalizer = log_normalizer(raw_V)
    ids = sorted_head(x_V, maximum=maximum, count=rules.num_candidates)[: rules.num_candidates].tolist()
    reported_V = x_V if rules.after_processing else raw_V
    infos = token_infos(reported_V, ids, top=rules.logprobs, extra=rules.extra_ids)
    gains = [float(x_V[token]) - normalizer for token in ids]
    return Drawn(ids[0], candidates=tuple(zip(gains, infos, strict=True)))


def _changed(raw_V: FloatArray, answer: Answer, mask: bytes | None) -> FloatArray:
    """The logits after biases, penalties and masks: a copy where there are any."""
    if not answer.must_change() and mask is None:
        return raw_V
    x_V = raw_V.copy()
    answer.change(x_V)
    if mask is not None:
        allowed = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), count=x_V.size, bitorder="little")
        x_V[allowed == 0] = -np.inf
    return x_V


def _draw(x_V: FloatArray, answer: Answer, random: float) -> tuple[int, IntArray | None]:
    """A token of softmax(x_V) after truncation, and the tokens that survived it (None: all). x_V's maximum is 0."""
    rules = answer.rules
    weights_V = exponentials(x_V)
    top_p = rules.top_p
    if rules.top_p_decay < 1.0:
        top_p = max(rules.top_p_floor, top_p * rules.top_p_decay**answer.since_reset)
    ids: IntArray | None = None
    if 0 < rules.top_k < x_V.size:
        ids = sorted_head(x_V, maximum=0.0, count=rules.top_k)[: rules.top_k]
    if rules.typical_p < 1.0:
        ids = _typical(np.arange(x_V.size) if ids is None else np.sort(ids), x_V, weights_V, rules.typical_p)
    if top_p < 1.0:
        if ids is None:
            mass = top_p * float(weights_V.sum(dtype=np.float64))
            ids = sorted_head(x_V, maximum=0.0, mass=mass, weights=weights_V)
            sums = np.cumsum(weights_V[ids], dtype=np.float64)
        else:
            sums = np.cumsum(weights_V[ids], dtype=np.float64)
            mass = top_p * float(sums[-1])
        ids = ids[: int(np.searchsorted(sums, mass, side="left")) + 1]
    if rules.min_p > 0.0:
        if ids is None:
            ids = sorted_head(x_V, maximum=0.0, count=int(np.count_nonzero(weights_V >= rules.min_p)))
        kept = weights_V[ids] >= np.float32(rules.min_p) * weights_V[ids[0]]
        kept[0] = True
        ids = ids[kept]
    truncated = ids
    if ids is None:
        total = float(weights_V.sum(dtype=np.float64))
        # A little more than the draw needs, so that rounding can't leave it outside of the head.
        ids = sorted_head(x_V, maximum=0.0, mass=min(total, random * total * (1 + 1e-9) + 1e-300), weights=weights_V)
        sums = np.cumsum(weights_V[ids], dtype=np.float64)
    else:
        sums = np.cumsum(weights_V[ids], dtype=np.float64)
        total = float(sums[-1])
    place = int(np.searchsorted(sums, random * total, side="right"))
    return int(ids[min(place, ids.size - 1)]), truncated


def _typical(ids: IntArray, x_V: FloatArray, weights_V: FloatArray, typical_p: float) -> IntArray:
    """
    Of some tokens (ascending) those whose surprise is nearest to the expected one, up to a mass; by likelihood.

    Source: locally typical sampling (Meister et al., arXiv 2202.00666). Like the head of a distribution, only the
    tokens within a distance that holds the mass are sorted.
    """
    ids = ids[weights_V[ids] > 0]
    weights = weights_V[ids].astype(np.float64)
    total = float(weights.sum())
    surprise = math.log(total) - np.log(weights)
    distance = np.abs(surprise - float((weights * surprise).sum()) / total)
    radius, near = 0.25, np.arange(ids.size)
    while radius < _LAST_RADIUS:
        inside = np.flatnonzero(distance <= radius)
        if float(weights[inside].sum()) >= typical_p * total:
            near = inside
            break
        radius *= 1.5
    order = near[np.lexsort((ids[near], -x_V[ids[near]], distance[near]))]
    count = int(np.searchsorted(np.cumsum(weights[order]), typical_p * total, side="left")) + 1
    return by_likelihood(np.sort(ids[order[:count]]), x_V)
