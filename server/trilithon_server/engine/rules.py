"""
What changes a row of logits before a token is drawn: prepared once per request, and what each answer has so far.

Order: biases, penalties, then masks, so that a bias never revives a forbidden token (serving contract, section 2).
"""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt

from trilithon_server.engine.wire_pb2 import Sampling

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

BAN_BIAS = -100.0  # a bias of -100 bans the token outright


class Rules:
    """One request's sampling parameters, ready to be applied; shared by its answers."""

    def __init__(self, sampling: Sampling) -> None:
        self.seed = sampling.seed
        self.temperature = np.float32(sampling.temperature)
        self.top_k = sampling.top_k
        self.top_p, self.min_p, self.typical_p = sampling.top_p, sampling.min_p, sampling.typical_p
        self.top_p_decay, self.top_p_floor = sampling.top_p_decay, sampling.top_p_floor
        self.reset_ids = frozenset(sampling.top_p_reset_token_ids)
        self.presence, self.frequency = sampling.presence_penalty, sampling.frequency_penalty
        self.repetition = np.float32(sampling.repetition_penalty)
        self.ngram = sampling.no_repeat_ngram
        self.bias_ids, self.bias_values = _bias(dict(sampling.logit_bias))
        self.allowed_ids = _ids(sampling.allowed_token_ids)
        self.ending_ids = _ids([*sampling.end_token_ids, *sampling.stop_token_ids])
        self.min_tokens = sampling.min_tokens
        self.logprobs, self.prompt_logprobs = sampling.logprobs, sampling.prompt_logprobs
        self.extra_ids = tuple(sampling.logprob_token_ids)
        self.after_processing = sampling.logprobs_after_processing
        # Candidates of a beam: enough that `width` go on even where every end token is among the best.
        width = sampling.num_sequences if sampling.HasField("beam") else 0
        self.num_candidates = max(2, 1 + self.ending_ids.size) * width
        words = [tuple(word.ids) for word in sampling.bad_words]
        banned = {word[0] for word in words if len(word) == 1}
        banned |= {token for token, bias in sampling.logit_bias.items() if bias <= BAN_BIAS}
        self.banned_ids = _ids(sorted(banned))
        # Bad words of several tokens by the token before their last: only those can be about to be completed.
        self.bad_words: dict[int, list[tuple[int, ...]]] = {}
        for word in words:
            if len(word) > 1:
                self.bad_words.setdefault(word[-2], []).append(word)
        self.penalizes = bool(self.presence or self.frequency)
        self.repeats = float(self.repetition) != 1.0
        self.changes_logits = bool(
            self.bias_ids.size or self.banned_ids.size or self.allowed_ids.size or self.bad_words
            or self.penalizes or self.repeats or self.ngram
        )  # fmt: skip

    @property
    def is_greedy(self) -> bool:
        """Temperature 0: the argmax, no draw."""
        return float(self.temperature) == 0.0


class Answer:
    """The tokens of one answer and what the rules need to know of them, kept up to date token by token."""

    def __init__(self, rules: Rules, prompt: list[int], *, choice: int) -> None:
        self.rules = rules
        self.choice = choice
        self.num_prompt = len(prompt)
        self.tokens: list[int] = []
        self.since_reset = 0  # generated tokens since the last reset token (factual-nucleus sampling)
        self._seen = _Counts()  # prompt and answer
        self._generated = _Counts()
        self._ngrams: dict[tuple[int, ...], list[int]] = {}
        for token in prompt:
            self._extend(token)

    def append(self, token: int) -> None:
        """Take a drawn token in."""
        self._extend(token)
        if self.rules.penalizes:
            self._generated.add(token)
        self.since_reset = 0 if token in self.rules.reset_ids else self.since_reset + 1

    def fork(self, token: int) -> Answer:
        """A copy of this answer that has taken one token more (beam search)."""
        twin = copy.copy(self)
        twin.tokens = list(self.tokens)
        twin._seen, twin._generated = self._seen.copy(), self._generated.copy()
        twin._ngrams = {key: list(tokens) for key, tokens in self._ngrams.items()}
        twin.append(token)
        return twin

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.num_prompt

    def must_change(self) -> bool:
        """Whether `change` would touch the logits of the next token."""
        return self.rules.changes_logits or self.num_generated < self.rules.min_tokens

    def change(self, x_V: FloatArray) -> None:
        """Apply biases, penalties and masks to fp32 logits, in place. The constraint's mask is the caller's."""
        rules = self.rules
        if rules.bias_ids.size:
            x_V[rules.bias_ids] += rules.bias_values
        if rules.repeats:
            ids = self._seen.ids
            seen = x_V[ids]
            x_V[ids] = np.where(seen > 0, seen / rules.repetition, seen * rules.repetition)
        if rules.penalizes and self._generated.ids.size:
            counts = self._generated.counts
            x_V[self._generated.ids] -= (rules.frequency * counts + rules.presence).astype(np.float32)
        if rules.allowed_ids.size:
            kept = x_V[rules.allowed_ids]
            x_V.fill(-np.inf)
            x_V[rules.allowed_ids] = kept
        if rules.banned_ids.size:
            x_V[rules.banned_ids] = -np.inf
        if rules.bad_words and self.tokens:
            for word in rules.bad_words.get(self.tokens[-1], ()):
                if tuple(self.tokens[1 - len(word) :]) == word[:-1]:
                    x_V[word[-1]] = -np.inf
        if rules.ngram:
            x_V[self._blocked_by_ngram()] = -np.inf
        if self.num_generated < rules.min_tokens and rules.ending_ids.size:
            x_V[rules.ending_ids] = -np.inf

    def _blocked_by_ngram(self) -> list[int]:
        size = self.rules.ngram - 1
        return self._ngrams.get(tuple(self.tokens[len(self.tokens) - size :]) if size else (), [])

    def _extend(self, token: int) -> None:
        size = self.rules.ngram - 1
        if size >= 0 and len(self.tokens) >= size:
            self._ngrams.setdefault(tuple(self.tokens[len(self.tokens) - size :]) if size else (), []).append(token)
        self.tokens.append(token)
        if self.rules.repeats:
            self._seen.add(token)


class _Counts:
    """Distinct tokens and how often each came, as arrays that grow in place: no pass over the vocabulary."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._ids = np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.int64)

    def copy(self) -> _Counts:
        twin = _Counts()
        twin._place = dict(self._place)
        twin._ids, twin._counts = self._ids.copy(), self._counts.copy()
        return twin

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        if place >= self._ids.size:
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> IntArray:
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> IntArray:
        return self._counts[: len(self._place)]


def _ids(values: object) -> IntArray:
    return np.unique(np.array(list(values), dtype=np.int64))  # type: ignore[call-overload]  # any iterable of ints


def _bias(bias: dict[int, float]) -> tuple[IntArray, FloatArray]:
    ids = sorted(bias)
    return np.array(ids, dtype=np.int64), np.array([bias[token] for token in ids], dtype=np.float32)
